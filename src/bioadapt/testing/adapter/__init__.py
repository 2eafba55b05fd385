"""Conformance of an adapter inside models."""

from .birth import AdapterBirth, Refusals
from .decoding import AdapterDecoding
from .leaks import Leaks
from .merging import AdapterMerging
from .precision import Checkpointing, Precision
from .rate import LearningRate
from .saving import Saving
from .switching import Stacking, Switching


class AdapterConformance(
    AdapterBirth,
    Refusals,
    LearningRate,
    Leaks,
    AdapterDecoding,
    Precision,
    Checkpointing,
    Saving,
    Switching,
    Stacking,
    AdapterMerging,
):
    """What every adapter keeps, tested inside tiny BERT, GPT-2, Qwen2, T5, ViT and ResNet models.

    Subclass it under a name that pytest collects and override the fixture ``primitive``: it returns the name of a
    registered primitive, a dict of its name and settings, or a list of these for an adapter of several. What is
    expected (whether it merges, learns, may act on a causal model) is read from the registry.

    To be overridden where there is a reason: ``fields``, further fields of the `BioConfig` such as ``{"rank": 8}``, and
    ``hosts``, the models to test in, such as ``("bert", "qwen2", "resnet")``. A test that an adapter cannot keep is
    overridden by a method of the same name that calls ``pytest.skip`` with the reason.
    """


__all__ = ["AdapterConformance"]
