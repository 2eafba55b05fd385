"""Every registered primitive, bare and inside models: a new one is tested by existing."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

from bioadapt import list_primitives, primitive_info
from bioadapt.testing import AdapterConformance, PrimitiveConformance
from bioadapt.testing.adapter.merging import Merging


class TestPrimitives(PrimitiveConformance):
    # "inductor" runs generated code, in some seconds for each primitive.
    compile_backend = os.environ.get("BIOADAPT_COMPILE_BACKEND", "aot_eager")

    @pytest.fixture(params=list_primitives())
    def primitive(self, request):
        return request.param


class TestAdapters(AdapterConformance):
    @pytest.fixture(params=list_primitives())
    def primitive(self, request):
        return request.param


class TestAdapterOfAllPrimitives(AdapterConformance):
    @pytest.fixture
    def primitive(self):
        return list_primitives()


class TestMergingTogether(Merging):
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
