"""With a torch that is too old for graphs of all primitives: refused where asked for, and never wrong numbers."""

from __future__ import annotations

import pytest
import torch
from helpers.models import awake, bert, close, output, tokens
from peft import get_peft_model

from bioadapt import compile_adapters
from bioadapt.tuner import compilation, patches
from bioadapt.tuner.layer import BioLayer
from bioadapt.tuner.scope import Scope


@pytest.fixture
def old(monkeypatch):
    """As if this torch were older than the graphs that are promised."""
    monkeypatch.setattr(patches, "HAS_GRAPHS", False)
    monkeypatch.setattr(compilation, "HAS_GRAPHS", False)
    monkeypatch.setattr(BioLayer, "forward", patches.kept_out_of_old_graphs(BioLayer.forward))


def test_graphs_are_refused_with_the_version_that_has_them(old):
    model = get_peft_model(bert(), awake())
    with pytest.raises(RuntimeError, match=r"compile_adapters needs torch>=2\.13, and torch .* is installed"):
        compile_adapters(model)


@torch.no_grad()
@pytest.mark.parametrize(("place", "method"), [(Scope, "run"), (BioLayer, "_changed")], ids=["model", "layer"])
def test_what_is_adapted_stays_out_of_graphs(old, monkeypatch, place, method):
    """`cortical_column` is what torch 2.6 would get wrong in one."""
    host, inputs, seen = bert(), tokens(), []
    host.__class__ = type("OfThisTest", (type(host),), {})  # so that the class that runs it is made anew
    model = get_peft_model(host, awake(["cortical_column"]))
    expected, watched = output(model, inputs), getattr(place, method)

    def watching(*args):
        seen.append(torch.compiler.is_compiling())
        return watched(*args)

    monkeypatch.setattr(place, method, watching)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert close(output(compiled, inputs), expected)
    torch._dynamo.reset()
    assert seen and not any(seen)
