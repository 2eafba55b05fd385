"""Adapters of several tasks as one: exact where the words say so, refused where they mean nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.models import bert, close, output, tokens, unchanged
from peft import PeftModel, get_peft_model

from bioadapt import BioConfig

LINEAR = ["query", "value"]
FLY = {"name": "fly_lora", "r": 8, "k": 3}
NEURO = {"name": "neuro_lora", "r": 8, "k": 3}


def tasks(*primitives: dict, seeds: tuple[int, ...] = (0, 1, 2)) -> tuple[PeftModel, list[str]]:
    """A model with one adapter per task, each trained away from zero in its own direction."""
    names = [f"task{index}" for index in range(len(seeds))]
    entries = primitives if len(primitives) == len(seeds) else primitives * len(seeds)
    model = None
    for index, (name, entry, seed) in enumerate(zip(names, entries, seeds, strict=True)):
        torch.manual_seed(10 + index)
        config = BioConfig(primitives=[entry], target_modules=LINEAR, seed=seed, init_weights=False)
        if model is None:
            model = get_peft_model(bert(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval(), names


@torch.no_grad()
def changes(model: PeftModel, name: str, seed: int = 5) -> torch.Tensor:
    """What one adapter alone adds at the first layer that it sits on, for random features."""
    layer = next(m for m in model.modules() if hasattr(m, "circuits"))
    x = torch.randn(2, 6, layer.in_features, generator=torch.Generator().manual_seed(seed))
    model.set_adapter(name)
    return layer(x) - layer.base_layer(x)


@pytest.mark.parametrize("entry", [FLY, NEURO], ids=["fly_lora", "neuro_lora"])
def test_route_is_the_weighted_sum_of_the_adapters(entry, tmp_path):
    model, names = tasks(entry)
    weights = [0.5, 0.25, -1.0]
    wanted = sum(weight * changes(model, name) for weight, name in zip(weights, names, strict=True))
    model.add_weighted_adapter(names, weights, "all", combination_type="route")
    torch.testing.assert_close(changes(model, "all"), wanted, rtol=1e-4, atol=1e-5)
    # and so it is after saving and loading, beside no other adapter
    model.set_adapter("all")
    expected = output(model, tokens())
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    again = PeftModel.from_pretrained(bert(), tmp_path / "all")
    assert close(output(again, tokens()), expected, 1e-5)


def test_dense_is_the_sum_of_the_products_and_merges():
    model, names = tasks(FLY)
    model.add_weighted_adapter(names, [1 / 3] * 3, "all", combination_type="dense")
    layer = next(m for m in model.modules() if hasattr(m, "circuits"))
    parts = [layer.circuits[name]["fly_lora"] for name in names]
    product = sum(part.scale * part.B @ part.A for part in parts) / 3
    torch.testing.assert_close(layer.get_delta_weight("all"), product, rtol=1e-4, atol=1e-5)
    model.set_adapter("all")
    expected = output(model, tokens())
    assert close(output(model.merge_and_unload(), tokens()), expected, 1e-4)


def test_average_of_B_needs_one_projection():
    model, names = tasks(FLY, seeds=(4, 4, 4))
    model.add_weighted_adapter(names, [0.2, 0.3, 0.5], "mean", combination_type="average_B")
    layer = next(m for m in model.modules() if hasattr(m, "circuits"))
    parts = [layer.circuits[name]["fly_lora"].B for name in names]
    wanted = 0.2 * parts[0] + 0.3 * parts[1] + 0.5 * parts[2]
    torch.testing.assert_close(layer.circuits["mean"]["fly_lora"].B, wanted)
    other, names = tasks(FLY)
    for way, density in (("average_B", None), ("ties", 0.5), ("dare_linear", 0.5)):
        with (
            unchanged(other),
            pytest.raises(ValueError, match="fly_lora at .*where A is the same"),
        ):
            other.add_weighted_adapter(names, [1.0] * 3, "mean", combination_type=way, density=density)


def test_gates_are_averaged_with_a_warning():
    model, names = tasks(NEURO, seeds=(4, 4))
    with pytest.warns(UserWarning, match="gates of NeuroLoRA"):
        model.add_weighted_adapter(names, [0.5, 0.5], "mean", combination_type="average_B")
    layer = next(m for m in model.modules() if hasattr(m, "circuits"))
    parts = [layer.circuits[name]["neuro_lora"] for name in (*names, "mean")]
    for tensor in ("B", "U", "V", "c"):
        one, other, mean = (getattr(part, tensor) for part in parts)
        torch.testing.assert_close(mean, (one + other) / 2)


def test_adapters_of_other_size_enter_with_their_own_alpha():
    model, names = tasks({**FLY, "alpha": 4.0}, {**FLY, "alpha": 32.0}, seeds=(0, 1))
    wanted = changes(model, names[0]) + changes(model, names[1])
    model.add_weighted_adapter(names, [1.0, 1.0], "all", combination_type="route")
    torch.testing.assert_close(changes(model, "all"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_value_wise_ways_are_pefts(way):
    model, names = tasks(FLY, seeds=(4, 4))
    torch.manual_seed(0)
    model.add_weighted_adapter(names, [0.7, 0.3], "merged", combination_type=way, density=0.5)
    layers = [m for m in model.modules() if hasattr(m, "circuits")]
    from peft.utils import merge_utils

    torch.manual_seed(0)
    for layer in layers:  # in the same order, since two of them draw
        tensors = [layer.circuits[name]["fly_lora"].B.detach() for name in names]
        wanted = getattr(merge_utils, way)(tensors, torch.tensor([0.7, 0.3]), 0.5)
        torch.testing.assert_close(layer.circuits["merged"]["fly_lora"].B.detach(), wanted)


def test_the_result_is_an_adapter_like_any_other():
    model, names = tasks(FLY)
    model.set_adapter(names[0])
    before = output(model, tokens())
    model.add_weighted_adapter(names, [1.0] * 3, "all", combination_type="route")
    assert model.active_adapters == [names[0]] and torch.equal(output(model, tokens()), before)
    model.add_weighted_adapter(["all", names[0]], [1.0, -1.0], "rest", combination_type="route")
    rest = changes(model, "rest")
    torch.testing.assert_close(rest, changes(model, names[1]) + changes(model, names[2]), rtol=1e-3, atol=1e-4)
    model.delete_adapter("all")
    assert torch.equal(changes(model, "rest"), rest)


# -- NeuroAda --

ADA = {"name": "neuro_ada", "k": 3}
ANYWHERE = {**ADA, "selection": "random"}


def layers(model: PeftModel) -> list:
    return [module for module in model.modules() if hasattr(module, "circuits")]


@pytest.mark.parametrize(
    "entries", [(ADA, ADA), (ADA, {**ADA, "k": 5}), tuple({**ADA, "selection": "random"} for _ in "ab")]
)
def test_neuro_adas_add_up_on_the_union_of_their_synapses(entries):
    model, names = tasks(*entries, seeds=(0, 1))
    model.add_weighted_adapter(names, [0.5, -2.0], "all")
    for layer in layers(model):
        one, other, both = (layer.get_delta_weight(name) for name in (*names, "all"))
        torch.testing.assert_close(both, 0.5 * one - 2.0 * other)
        index = layer.circuits["all"]["neuro_ada"].index
        assert all(len(set(row)) == len(row) for row in index.tolist())
        columns = ((one != 0) | (other != 0)).sum(1)
        assert index.shape[1] == columns.max()  # no wider than the widest row has to be


@pytest.mark.parametrize("way", ["ties", "magnitude_prune"])
def test_value_wise_ways_see_the_synapses_alone(way):
    from peft.utils import merge_utils

    model, names = tasks(ANYWHERE, seeds=(0, 1))
    model.add_weighted_adapter(names, [0.7, 0.3], "merged", combination_type=way, density=0.5)
    for layer in layers(model):
        one, other, both = (layer.get_delta_weight(name) for name in (*names, "merged"))
        anywhere = (one != 0) | (other != 0)
        wanted = getattr(merge_utils, way)([one[anywhere], other[anywhere]], torch.tensor([0.7, 0.3]), 0.5)
        torch.testing.assert_close(both[anywhere].sort().values, wanted.sort().values)
        assert torch.count_nonzero(both[~anywhere]) == 0


def test_neuro_adas_of_different_rows_are_refused():
    model, names = tasks({**ADA, "row_fraction": 0.5}, seeds=(0, 1))
    with unchanged(model), pytest.raises(ValueError, match="neuro_ada at .*different rows"):
        model.add_weighted_adapter(names, [1, 1], "all")
    model, names = tasks({**ADA, "row_fraction": 0.5}, seeds=(4, 4))
    model.add_weighted_adapter(names, [1, 1], "all")
    layer = layers(model)[0]
    torch.testing.assert_close(layer.get_delta_weight("all"), sum(layer.get_delta_weight(name) for name in names))


# -- SAN --


def test_gains_are_averaged_as_they_are_or_as_logarithms():
    model, names = tasks({"name": "san_scaling", "beta": True}, seeds=(0, 1))
    model.add_weighted_adapter(names, [0.25, 0.75], "mean")
    model.add_weighted_adapter(names, [0.25, 0.75], "powers", combination_type="log")
    for layer in layers(model):
        one, other, mean, powers = (layer.circuits[name]["san_scaling"] for name in (*names, "mean", "powers"))
        first, second = (1 + part.change_of_gain() for part in (one, other))
        torch.testing.assert_close(1 + mean.change_of_gain(), 0.25 * first + 0.75 * second)
        torch.testing.assert_close(1 + powers.change_of_gain(), first**0.25 * second**0.75)
        torch.testing.assert_close(mean.shift, 0.25 * one.shift + 0.75 * other.shift)
    with torch.no_grad():
        layers(model)[0].circuits[names[0]]["san_scaling"].theta[0] = -1.5
    with unchanged(model), pytest.raises(ValueError, match="has no logarithm"):
        model.add_weighted_adapter(names, [1, 1], "other", combination_type="log")
    with unchanged(model), pytest.raises(ValueError, match="'ties' means nothing for san_scaling"):
        model.add_weighted_adapter(names, [1, 1], "other", combination_type="ties", density=0.5)


# -- refusals --


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(adapters=["task0", "task9"], weights=[1, 1]), "adapters contains 'task9'"),
        (dict(adapters=["task0", "task1"], weights=[1]), "2 different adapters and 1 weights"),
        (dict(adapters=[], weights=[]), "0 different adapters"),
        (dict(combination_type="svd"), "combination_type='svd' means nothing for fly_lora; accepted: route, dense"),
        (dict(combination_type="ties"), "density=None: 'ties' needs"),
        (dict(combination_type="ties", density=1.5), "density=1.5"),
        (dict(density=0.5), "density=0.5 means nothing for 'route'"),
        (dict(combination_type="ties", density=0.5, majority_sign_method="all"), "majority_sign_method='all'"),
        (dict(adapter_name="task1"), "adapter_name='task1' is taken"),
    ],
)
def test_what_means_nothing_is_refused(how, words):
    model, _ = tasks(FLY, seeds=(0, 1))
    given = {
        "adapters": ["task0", "task1"],
        "weights": [1, 1],
        "adapter_name": "all",
        "combination_type": "route",
        **how,
    }
    with unchanged(model), pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(**given)


def test_a_primitive_without_a_combination_is_named():
    model, names = tasks({"name": "lateral_inhibition"}, seeds=(0, 1))
    with unchanged(model), pytest.raises(ValueError, match="'linear' means nothing for lateral_inhibition"):
        model.add_weighted_adapter(names, [1, 1], "all")
    mixed, names = tasks(FLY, NEURO, seeds=(0, 1))
    with unchanged(mixed), pytest.raises(ValueError, match="are not of one kind"):
        mixed.add_weighted_adapter(names, [1, 1], "all", combination_type="route")
    unequal, names = tasks(FLY, {**FLY, "k": 4}, seeds=(0, 1))
    with unchanged(unequal), pytest.raises(ValueError, match="k=3 in one adapter and 4 in another"):
        unequal.add_weighted_adapter(names, [1, 1], "all", combination_type="route")
