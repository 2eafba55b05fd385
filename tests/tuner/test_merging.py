"""Merging is exact or refused by name; unmerging restores every bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import (
    KINDS,
    PRIMITIVES,
    B,
    Chain,
    D,
    T,
    adapted,
    awake,
    base_and_inputs,
    bio_layers,
    close,
    digest,
    gpt2,
    output,
    own_parameters,
    pairs,
    tokens,
    unchanged,
)
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune

from bioadapt import list_primitives, primitive_info

MERGING_PAIRS = pairs(merging=True)


@pytest.mark.parametrize(("kind", "named"), MERGING_PAIRS)
def test_merged_it_gives_what_it_gave(kind, named):
    base, inputs = base_and_inputs(kind)
    plain, types = output(base, inputs), {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, awake(named, KINDS[kind].targets))
    wanted = output(model, inputs)
    assert not close(wanted, plain, 1e-3)
    merged = model.merge_and_unload()
    assert close(output(merged, inputs), wanted)
    assert merged is base and {name: type(module) for name, module in merged.named_modules()} == types


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("kind", "named"), MERGING_PAIRS)
def test_unmerging_restores_every_bit(kind, named, safe):
    model, inputs = adapted(kind, named)
    wanted, before = output(model, inputs), digest(model.state_dict())
    for _ in range(2):
        model.merge_adapter(safe_merge=safe)
        assert close(output(model, inputs), wanted)
        assert digest(model.state_dict()) != before
        model.unmerge_adapter()
        assert digest(model.state_dict()) == before
        assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize("named", ["mergeable weight", "ranked mergeable"])
def test_merging_twice_is_merging_once(named):
    model, inputs = adapted("mlp", named)
    model.merge_adapter()
    once, wanted = digest(model.state_dict()), output(model, inputs)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert digest(model.state_dict()) == once
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        assert torch.equal(output(model.merge_and_unload(), inputs), wanted)


def test_unmerging_what_is_not_merged_does_nothing():
    model, _ = adapted("mlp", "mergeable")
    with unchanged(model), pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_unloading_unmerges_first():
    base, inputs = base_and_inputs("mlp")
    plain, before = output(base, inputs), digest(base.state_dict())
    model = get_peft_model(base, awake("mergeable weight", ("lin0", "lin1")))
    model.merge_adapter()
    bare = model.unload()
    assert digest(bare.state_dict()) == before and torch.equal(output(bare, inputs), plain)


def test_disabling_unmerges_first():
    base, inputs = base_and_inputs("mlp")
    plain = output(base, inputs)
    model = get_peft_model(base, awake("mergeable weight", ("lin0", "lin1")))
    wanted = output(model, inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), wanted)


def test_switching_adapters_unmerges_first():
    model, inputs = adapted("mlp", "mergeable")
    wanted = output(model, inputs)
    model.add_adapter("other", awake("mergeable", ("lin0",)))
    model.merge_adapter()
    model.set_adapter("other")
    assert not close(output(model, inputs), wanted, 1e-3)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), wanted)


def test_parameters_stay_the_objects_an_optimiser_knows():
    model, _ = adapted("mlp", "mergeable weight")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.merge_adapter()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    model.unmerge_adapter()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("named", ["pointwise", "causal", "ranked"])
def test_what_depends_on_its_input_is_refused_by_name(named):
    model, _ = adapted("mlp over tokens", named)
    for call in (model.merge_adapter, model.merge_and_unload):
        with unchanged(model), pytest.raises(ValueError) as refusal:
            call()
        for entry in PRIMITIVES[named]["primitives"]:
            assert entry in str(refusal.value)
        assert "lin0" in str(refusal.value)


@pytest.mark.parametrize("kind", ["layer norm", "rms norm", "group norm"])
def test_layers_without_a_matrix_are_refused_by_name(kind):
    model, _ = adapted(kind, "mergeable")
    with unchanged(model), pytest.raises(ValueError, match="norm .* has no matrix"):
        model.merge_and_unload()


def test_grouped_convolutions_are_refused_by_name():
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 8, 3, groups=2)), awake("mergeable", ("0",)))
    with unchanged(model), pytest.raises(ValueError, match="no matrix"):
        model.merge_adapter()


# -- numbers that are none --


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_with_broken_numbers_is_refused(value, safe):
    model, _ = adapted("mlp", "mergeable weight")
    list(own_parameters(model).values())[-1].data.view(-1)[0] = value  # in the last layer: the first would be merged
    for call in (model.merge_adapter, model.merge_and_unload):
        with unchanged(model), pytest.raises(ValueError, match="'default'.*lin1.*not finite"):
            call(safe_merge=safe)


def test_a_base_with_broken_numbers_is_refused_and_what_was_merged_already_is_undone():
    model, _ = adapted("mlp", "mergeable weight")
    model.base_model.model.lin1.base_layer.weight.data[0, 0] = float("nan")
    for call in (model.merge_adapter, model.merge_and_unload):
        with unchanged(model), pytest.raises(ValueError, match="lin1.*not finite"):
            call()


def test_a_weight_that_half_precision_cannot_hold_is_refused():
    model = get_peft_model(mlp_of_large_numbers(), awake("mergeable", ("lin0",)))
    layer = bio_layers(model)[0]
    with torch.no_grad():
        layer.circuits["default"]["homeostatic_scaling"].gate.fill_(3.0)
        layer.circuits["default"]["homeostatic_scaling"].scale.fill_(4.0)
    with unchanged(model), pytest.raises(ValueError, match="lin0.*not finite"):
        model.merge_adapter()


def mlp_of_large_numbers() -> nn.Module:
    model = Chain(lin0=nn.Linear(D, D)).half()
    model.lin0.weight.data.fill_(30000.0)  # the largest number in half precision is 65504
    return model


# -- tied weights --


def test_merging_into_a_tied_weight_is_refused():
    base = gpt2(tie_word_embeddings=True)
    assert base.lm_head.weight is base.transformer.wte.weight
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tied")  # the adapter alone does no harm to it
        model = get_peft_model(base, awake("mergeable", ["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of the same
        with unchanged(model), pytest.raises(ValueError, match="lm_head is tied"):
            model.merge_adapter()


def test_a_tied_head_that_is_trained_itself_is_warned_of():
    config = awake("mergeable")
    config.modules_to_save = ["lm_head"]
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        get_peft_model(gpt2(tie_word_embeddings=True), config)


def test_beside_a_tied_weight_merging_is_allowed():
    model = get_peft_model(gpt2(tie_word_embeddings=True), awake("mergeable"))
    wanted = output(model, tokens())
    merged = model.merge_and_unload()
    assert close(output(merged, tokens()), wanted, 1e-4)
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_a_weight_tied_between_plain_modules_is_refused():
    base = Chain(one=nn.Linear(D, D), two=nn.Linear(D, D))
    base.two.weight = base.one.weight
    model = get_peft_model(base, awake("mergeable", ("two",)))
    with unchanged(model), pytest.raises(ValueError, match="weight of two is tied"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("dtype", "size", "lost"),
    [(torch.float32, 1e-4, 0.0), (torch.bfloat16, 1e-4, 1.0), (torch.bfloat16, 1e-2, 0.0)],
    ids=["float32", "too small for bfloat16", "large enough"],
)
def test_what_rounding_loses_is_told(dtype, size, lost):
    """The largest weights of a row are where half precision is coarsest."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 16))
    with torch.no_grad():
        base[0].weight.copy_(0.02 * torch.randn(16, 32)).view(-1)[::32] = 0.07
    model = get_peft_model(base.to(dtype), awake([{"name": "neuro_ada", "k": 1}], ["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.circuits["default"]["neuro_ada"].values.fill_(size)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert layer.lost_in_rounding == lost
    assert any("100% of the weights to be changed are too coarse" in str(w.message) for w in told) is (lost == 1.0)


# -- weights of double precision, and weights that are not the layer's own --


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", [name for name in list_primitives() if primitive_info(name).mergeable])
def test_a_merge_in_double_precision_is_one(name, rank):
    if rank is not None and primitive_info(name).kind == "weight":
        pytest.skip("it has a size of its own")
    torch.manual_seed(0)
    layer = nn.Linear(D, D).double()
    model = get_peft_model(Chain(lin0=layer), awake([name], ["lin0"], rank=rank)).eval()
    inputs, before = torch.randn(B, T, D, dtype=torch.float64), layer.weight.detach().clone()
    wanted = output(model, inputs)
    merged = model.merge_and_unload()
    assert merged.lin0.weight.dtype == torch.float64 and not torch.equal(merged.lin0.weight, before)
    assert close(output(merged, inputs), wanted, 1e-12), "something went through fp32"


def test_a_sparse_merge_in_double_precision_changes_its_synapses_alone():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).double()
    before = layer.weight.detach().clone()
    model = get_peft_model(Chain(lin0=layer), awake([{"name": "neuro_ada", "k": 2}], ["lin0"]))
    values = model.base_model.model.lin0.circuits["default"]["neuro_ada"]
    wanted = before.scatter_add(1, values.index.long(), (values.zero_scale * values.values.detach()).double())
    merged = model.merge_and_unload().lin0.weight
    assert ((merged != before).sum(1) == 2).all()
    assert close(merged, wanted, 1e-9)


class Quantising(nn.Linear):
    """As optimum-quanto's layers: the forward computes with something else than the weight it shows."""

    __module__ = "optimum.quanto.nn.qlinear"


class Packed(torch.Tensor):
    """As a tensor of a quantiser that PEFT does not know."""


def _packed() -> nn.Linear:
    layer = nn.Linear(D, D)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    return layer


COMPUTED = {
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
    "weight norm of old": lambda: nn.utils.weight_norm(nn.Linear(D, D)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)),
    "spectral norm of old": lambda: nn.utils.spectral_norm(nn.Linear(D, D)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(D, D)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.5),
    "pruned bias": lambda: prune.l1_unstructured(nn.Linear(D, D), "bias", 0.5),
    "convolution": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(D, D, 1)),
    "quantising": lambda: Quantising(D, D),
    "packed": _packed,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("primitives", ["mergeable", ["neuro_ada"]], ids=str)
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_merged_exactly_or_refused_by_name(kind, primitives):
    torch.manual_seed(0)
    spatial = kind == "convolution"
    first = nn.Conv1d(D, D, 1) if spatial else nn.Linear(D, D)
    model = get_peft_model(Chain(lin0=first, lin1=COMPUTED[kind]()), awake(primitives, ["lin0", "lin1"])).eval()
    inputs = torch.randn(B, D, T) if spatial else torch.randn(B, T, D)
    wanted = output(model, inputs)
    with unchanged(model), pytest.raises(ValueError, match="lin1.*(computes its|form of numbers|quantises)"):
        model.merge_and_unload()
    assert torch.equal(output(model, inputs), wanted)
