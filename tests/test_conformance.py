"""Every registered primitive, bare and inside models: a new one is tested by existing."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

from bioadapt import list_primitives, primitive_info
from bioadapt.testing import AdapterConformance, PrimitiveConformance
from bioadapt.testing.adapter.merging import AdapterMerging

# An encoder that is read both ways, and a decoder with a cache: all that differs for a primitive. What else an
# architecture brings (transposed weights, cross-attention, images, channels first) is the tuner's to undo, whichever
# primitive of its nature is inside: those of `REPRESENTATIVES` meet it alone, and all of them meet it together.
ENOUGH_HOSTS = ("bert", "qwen2")


def of_each_nature() -> list[str]:
    """For every combination of what a primitive can declare, the first that declares it."""
    found: dict[tuple, str] = {}
    for name in list_primitives():
        info = primitive_info(name)
        found.setdefault((info.kind, info.zero_at, info.merge, info.learns), name)
    return sorted(found.values())


REPRESENTATIVES = of_each_nature()
OTHERS = [name for name in list_primitives() if name not in REPRESENTATIVES]


class TestPrimitives(PrimitiveConformance):
    # "inductor" runs generated code, in some seconds for each primitive.
    compile_backend = os.environ.get("BIOADAPT_COMPILE_BACKEND", "aot_eager")
    parameters_more: ClassVar = {"neuro_lora": 0.011}  # the published size of FlyLoRA, and a gate on top

    @pytest.fixture(params=list_primitives())
    def primitive(self, request):
        return request.param


class TestAdapters(AdapterConformance):
    hosts = ENOUGH_HOSTS

    @pytest.fixture(params=OTHERS, scope="class")  # one primitive after the other: its models are made once
    def primitive(self, request):
        return request.param


class TestAdaptersOnAllHosts(AdapterConformance):
    @pytest.fixture(params=REPRESENTATIVES, scope="class")
    def primitive(self, request):
        return request.param


class TestAdapterOfAllPrimitives(AdapterConformance):
    """They live together: in one stream, one cache, one file, one training step."""

    hosts = (*ENOUGH_HOSTS, "resnet")
    alive_within = 8  # what is rectified waits for an input that the others let through

    @pytest.fixture
    def primitive(self):
        return list_primitives()


class TestMergingTogether(AdapterMerging):
    """All that merge, in one adapter: primitives on the weight, and linear maps of what these have changed."""

    @pytest.fixture
    def primitive(self):
        return [name for name in list_primitives() if primitive_info(name).mergeable]


class TestAdapterOnAPopulation(AdapterConformance):
    """Between a down- and an up-projection: one primitive of each nature that can run there."""

    fields: ClassVar = {"rank": 8}

    @pytest.fixture
    def primitive(self):
        return ["lateral_inhibition", "predictive_coding", "homeostatic_scaling"]
