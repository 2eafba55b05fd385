"""Conformance of the bare module, ``module(x, context) -> delta``."""

from .birth import Birth
from .costs import Costs
from .decoding import Decoding
from .learning import LocalLearning
from .merging import Merging
from .numerics import Numerics
from .time import Time


class PrimitiveConformance(Birth, Time, Decoding, Numerics, LocalLearning, Merging, Costs):
    """What every primitive keeps, tested on the bare module.

    Subclass it under a name that pytest collects and override the fixture ``primitive``: it returns the name of a
    registered primitive, or a dict of its name and settings. The rest is read from the registry.

    To be overridden where there is a reason: ``saved_at_most`` (multiples of the bytes of x that may be kept for
    backward) and ``compile_backend`` (set it to ``"inductor"`` to run generated code). A test that a primitive cannot
    keep is overridden by a method of the same name that calls ``pytest.skip`` with the reason.
    """


__all__ = ["PrimitiveConformance"]
