"""Over a LoRA: every combination of what lies below with everything that is done to a stack.

What lies below is saved, switched and trained as if it were alone, and comes back as the object it was.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.models import (
    awake,
    bert,
    bio_layers,
    close,
    digest,
    output,
    own_parameters,
    record,
    step,
    tokens,
    unchanged,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

# Some layers carry both, some the LoRA alone, some the bio adapter alone.
LORA_TARGETS = ["query", "attention.output.dense"]
BIO = {
    "input-dependent": ["lateral_inhibition", "predictive_coding", "neuro_ada"],
    "mergeable": ["homeostatic_scaling", "neuro_ada", "heterosynaptic_scaling"],
}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def _lora(**fields) -> LoraConfig:
    return LoraConfig(**{"target_modules": LORA_TARGETS, "r": 4, "init_lora_weights": False, **fields})


def _one(**fields) -> PeftModel:
    model = get_peft_model(bert(), _lora(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.7, 1.3, parameter.numel()))
    return model.eval()


def _two(active: str | list[str]) -> PeftModel:
    model = _one()
    model.add_adapter("second", _lora(target_modules=["query", "output.dense"], r=2))
    model.base_model.set_adapter(active)
    model.active_adapter = active if isinstance(active, str) else active[0]
    return model.eval()


BELOW: dict[str, Callable[[], nn.Module]] = {
    "nothing": bert,
    "LoRA": _one,
    "DoRA": lambda: _one(use_dora=True),
    "rsLoRA": lambda: _one(use_rslora=True),
    "two, first active": lambda: _two("default"),
    "two, second active": lambda: _two("second"),
    "two, both active": lambda: _two(["default", "second"]),
}
LORAS = [name for name in BELOW if name != "nothing"]
INPUTS = tokens()


def below(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BELOW[name]()


def stack(under: nn.Module, named: str = "input-dependent", **fields) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(under, awake(BIO[named], **fields)).eval()


def copy_circuits(model: nn.Module, other: nn.Module) -> None:
    """Give ``other`` the tensors of ``model``'s adapter, layer by layer."""
    for ours, theirs in zip(bio_layers(other), bio_layers(model), strict=True):
        ours.circuits["default"].load_state_dict(theirs.circuits["default"].state_dict())


def saved(folder) -> dict[str, str]:
    """Relative path -> content of what a save wrote, the cards left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


def is_lora(key: str) -> bool:
    return ".lora_" in key


def tensors_of_lora(model: nn.Module) -> dict[str, str]:
    return digest({name: tensor for name, tensor in model.state_dict().items() if is_lora(name)})


@pytest.mark.parametrize("name", BELOW)
def test_a_fresh_adapter_changes_nothing(name):
    under = below(name)
    plain = output(under, INPUTS)
    fresh = get_peft_model(under, awake(BIO["input-dependent"], init_weights=True))
    assert torch.equal(output(fresh, INPUTS), plain)
    assert not close(output(stack(below(name)), INPUTS), plain, 1e-3)


# -- save --


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("name", LORAS)
def test_save_what_lies_below_is_saved_as_if_it_were_alone(name, safe, tmp_path):
    under = below(name)
    wanted = output(under, INPUTS)
    under.save_pretrained(tmp_path / "before", safe_serialization=safe)
    model = stack(under)
    under.save_pretrained(tmp_path / "within", safe_serialization=safe)
    if safe:
        assert saved(tmp_path / "within") == saved(tmp_path / "before")
    before = get_tensors(tmp_path / "before")
    assert digest(get_tensors(tmp_path / "within")) == digest(before) and before
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "within")
    if "second" in under.peft_config:
        loaded.load_adapter(tmp_path / "within" / "second", "second")
        loaded.base_model.set_adapter(under.active_adapters)
    assert close(output(loaded, INPUTS), wanted, 1e-6)
    step(model, INPUTS)
    trained = output(model, INPUTS)
    under.save_pretrained(tmp_path / "trained", safe_serialization=safe)
    with model.disable_adapter():
        wanted = output(model, INPUTS)
    assert not close(trained, wanted, 1e-3)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "trained")
    if "second" in under.peft_config:
        loaded.load_adapter(tmp_path / "trained" / "second", "second")
        loaded.base_model.set_adapter(under.active_adapters)
    assert close(output(loaded, INPUTS), wanted, 1e-6)


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"bias": "lora_only"}, {"target_modules": ["word_embeddings"]}])
def test_save_what_lies_below_may_hold_more_than_its_own_tensors(fields, tmp_path):
    """Biases of layers that it does not adapt, or embeddings, some of which now carry a bio adapter."""

    def under() -> PeftModel:
        return get_peft_model(bert(), _lora(**fields))

    alone, stacked = under(), under()
    torch.manual_seed(0)
    get_peft_model(stacked, awake("pointwise", ["output.dense", "query", "word_embeddings", "position_embeddings"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells what it saves beside
        alone.save_pretrained(tmp_path / "alone")
        stacked.save_pretrained(tmp_path / "stacked")
    assert saved(tmp_path / "alone") == saved(tmp_path / "stacked")


def get_tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("adapter_model.*")):
        read = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found.update({f"{path.parent.relative_to(folder)}/{key}": tensor for key, tensor in read.items()})
    return found


@pytest.mark.parametrize("name", LORAS)
def test_save_in_either_order_gives_the_same_files(name, tmp_path):
    for order in ("lora first", "bio first"):
        under = below(name)
        model = stack(under)
        pair = [(under, "lora"), (model, "bio")]
        for owner, folder in pair if order == "lora first" else reversed(pair):
            owner.save_pretrained(tmp_path / order / folder)
    for folder in ("lora", "bio"):
        first, second = saved(tmp_path / "lora first" / folder), saved(tmp_path / "bio first" / folder)
        assert first == second and first


@pytest.mark.parametrize("name", BELOW)
def test_save_the_bio_checkpoint_has_the_same_keys_over_anything(name, tmp_path):
    stack(below(name)).save_pretrained(tmp_path / "stacked")
    stack(bert()).save_pretrained(tmp_path / "plain")
    keys = load_file(tmp_path / "stacked" / SAFETENSORS_WEIGHTS_NAME).keys()
    assert keys == load_file(tmp_path / "plain" / SAFETENSORS_WEIGHTS_NAME).keys()
    assert keys and not any("lora" in key or "base_layer" in key or "default" in key for key in keys)
    model = stack(below(name))
    paths = {f"base_model.model.{layer.path}" for layer in bio_layers(model)}
    assert {key.partition(".nrn_circuit.")[0] for key in keys} == paths


# -- load --


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", BELOW)
def test_load_over_the_same_again(name, low_cpu_mem_usage, tmp_path):
    model = stack(below(name))
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(below(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert close(output(loaded, INPUTS), wanted, 1e-6)
    assert not any(parameter.requires_grad for parameter in own_parameters(loaded).values())


@pytest.mark.parametrize("name", LORAS)
def test_load_over_the_merged_base(name, tmp_path):
    model = stack(below(name))
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    merged = below(name).merge_and_unload()
    with pytest.warns(UserWarning, match="was trained over .*LORA adapter .*has been merged into the base"):
        loaded = PeftModel.from_pretrained(merged, tmp_path)
    assert close(output(loaded, INPUTS), wanted, 1e-4)


@pytest.mark.parametrize("trained", BELOW)
@pytest.mark.parametrize("found", ["nothing", "LoRA"])
def test_load_over_something_else_applies_the_same_tensors(trained, found, tmp_path):
    model = stack(below(trained))
    model.save_pretrained(tmp_path)
    wanted_model = stack(below(found))
    copy_circuits(model, wanted_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(below(found), tmp_path, is_trainable=True)
    assert torch.equal(output(loaded, INPUTS), output(wanted_model, INPUTS))


@pytest.mark.parametrize("name", LORAS)
def test_load_a_second_adapter_into_a_stack(name, tmp_path):
    model = stack(below(name))
    first = output(model, INPUTS)
    stack(below(name), "mergeable").save_pretrained(tmp_path)
    other = output(stack(below(name), "mergeable"), INPUTS)
    before = tensors_of_lora(model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(output(model, INPUTS), first)
    model.set_adapter("other")
    assert close(output(model, INPUTS), other, 1e-6)
    model.add_adapter("third", awake(BIO["mergeable"], ["intermediate.dense"]))
    model.delete_adapter("third")
    assert tensors_of_lora(model) == before


# -- disable --


@pytest.mark.parametrize("name", BELOW)
def test_disable_leaves_what_lies_below(name):
    under = below(name)
    plain = output(under, INPUTS)
    model = stack(under)
    wanted = output(model, INPUTS)
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), plain)
        with torch.no_grad():
            assert torch.equal(output(under, INPUTS), plain)
    assert torch.equal(output(model, INPUTS), wanted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(output(model, INPUTS), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(output(model, INPUTS), wanted)


@pytest.mark.parametrize("name", LORAS)
def test_disable_below_leaves_the_bio_adapter_over_the_base(name):
    under = below(name)
    model = stack(under)
    over_base = stack(bert())
    copy_circuits(model, over_base)
    for layer in [module for module in model.modules() if is_lora_layer(module)]:
        layer.enable_adapters(False)
    assert close(output(model, INPUTS), output(over_base, INPUTS), 1e-6)


def is_lora_layer(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and not hasattr(type(module), "circuits")


# -- unload --


@pytest.mark.parametrize("name", BELOW)
def test_unload_returns_the_very_object(name):
    under = below(name)
    plain, before = output(under, INPUTS), record(under)
    model = stack(under)
    assert record(under)["modules"] != before["modules"]
    bare = model.unload()
    assert bare is under
    assert torch.equal(output(bare, INPUTS), plain)
    after = record(bare)
    if name == "nothing":  # PEFT freezes the base with the first adapter and leaves it so
        assert not any(after.pop("requires_grad").values())
        before.pop("requires_grad")
    assert {aspect: after[aspect] for aspect in before} == before
    assert not close(output(stack(bare), INPUTS), plain, 1e-3)


@pytest.mark.parametrize("name", LORAS)
def test_unload_what_comes_back_still_merges_and_saves(name, tmp_path):
    wanted = output(below(name), INPUTS)
    under = stack(below(name)).unload()
    under.save_pretrained(tmp_path / "unloaded")
    below(name).save_pretrained(tmp_path / "never stacked")
    assert saved(tmp_path / "unloaded") == saved(tmp_path / "never stacked")
    assert close(output(under.merge_and_unload(), INPUTS), wanted, 1e-4)


# -- merge --


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", BELOW)
def test_merge_and_unload_keeps_all_contributions(name, safe):
    model = stack(below(name), "mergeable")
    wanted = output(model, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload(safe_merge=safe)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in bert().named_modules()}
    assert close(output(merged, INPUTS), wanted, 1e-4)
    assert not close(wanted, output(below(name), INPUTS), 1e-3)


@pytest.mark.parametrize("name", BELOW)
def test_merge_in_place_and_back(name):
    model = stack(below(name), "mergeable")
    wanted, before = output(model, INPUTS), digest(model.state_dict())
    for _ in range(2):
        model.merge_adapter()
        assert close(output(model, INPUTS), wanted, 1e-4)
        model.unmerge_adapter()
        assert digest(model.state_dict()) == before
        assert torch.equal(output(model, INPUTS), wanted)


@pytest.mark.parametrize("name", BELOW)
def test_merge_is_refused_for_what_depends_on_its_input(name):
    model = stack(below(name))
    for call in (model.merge_adapter, model.merge_and_unload):
        with unchanged(model), pytest.raises(ValueError, match="lateral_inhibition"):
            call()


@pytest.mark.parametrize("name", LORAS)
def test_merge_what_lies_below_was_merged_before(name):
    under = below(name)
    under.merge_adapter()
    model, other = stack(under, "mergeable"), stack(below(name), "mergeable")
    copy_circuits(other, model)
    wanted = output(model, INPUTS)
    assert close(wanted, output(other, INPUTS), 1e-4)
    model.merge_adapter()
    assert close(output(model, INPUTS), wanted, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, INPUTS), wanted)
    assert close(output(model.merge_and_unload(), INPUTS), wanted, 1e-4)


@pytest.mark.parametrize("where", ["query", "attention.output.dense"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "two, both active"])
def test_merge_with_broken_numbers_below_is_refused(name, safe, where):
    model = stack(below(name), "mergeable")
    named = dict(model.named_parameters())
    named[next(key for key in named if "layer.1" in key and f"{where}.lora_B" in key)].data[0, 0] = torch.nan
    for call in (model.merge_adapter, model.merge_and_unload):
        with unchanged(model), pytest.raises(ValueError, match=f"layer.1.*{where}.*not finite"):
            call(safe_merge=safe)


# -- delete --


@pytest.mark.parametrize("name", BELOW)
def test_delete_leaves_what_lies_below(name):
    under = below(name)
    plain = output(under, INPUTS)
    model = stack(under)
    model.add_adapter("other", awake(BIO["mergeable"]))
    before = tensors_of_lora(model)
    first = output(model, INPUTS)
    model.delete_adapter("other")
    assert torch.equal(output(model, INPUTS), first)
    model.delete_adapter("default")
    assert not own_parameters(model) and not model.peft_config
    assert torch.equal(output(model.base_model, INPUTS), plain)
    assert tensors_of_lora(model) == before
    if name != "nothing":
        assert torch.equal(output(under, INPUTS), plain)


@pytest.mark.parametrize("name", LORAS)
def test_delete_while_what_lies_below_is_merged(name):
    under = below(name)
    under.merge_adapter()
    plain = output(under, INPUTS)
    model = stack(under)
    model.delete_adapter("default")
    assert torch.equal(output(under, INPUTS), plain)


# -- train --


def _groups(model: nn.Module) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, torch.Tensor]] = {"bio": {}, "lora": {}, "base": {}}
    for name, parameter in model.named_parameters():
        groups["bio" if ".nrn_" in name else "lora" if is_lora(name) else "base"][name] = parameter
    return {group: digest(found) for group, found in groups.items()}


@pytest.mark.parametrize("name", BELOW)
def test_train_along_what_is_trainable(name):
    model = stack(below(name))
    active = [] if name == "nothing" else model.base_model.under.active_adapters
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before = _groups(model)
    assert set(before["bio"]) <= trainable
    assert trainable & set(before["lora"]) == {n for n in before["lora"] if any(f".{a}" in n for a in active)}
    assert not trainable & set(before["base"])
    step(model, INPUTS)
    after = _groups(model)
    for group, found in before.items():
        for key, value in found.items():
            assert (after[group][key] != value) == (key in trainable), key


@pytest.mark.parametrize("name", LORAS)
def test_train_over_what_was_loaded_frozen(name, tmp_path):
    below(name).save_pretrained(tmp_path)
    under = PeftModel.from_pretrained(bert(), tmp_path)
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        under.load_adapter(folder, folder.name)
    model = stack(under)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(_groups(model)["bio"])
    before = _groups(model)
    step(model, INPUTS)
    after = _groups(model)
    assert after["lora"] == before["lora"] and after["base"] == before["base"]
    assert all(after["bio"][key] != value for key, value in before["bio"].items())
    model.unload()
    assert not any(parameter.requires_grad for parameter in under.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_train_the_users_choice_outlasts_every_switch(frozen):
    under = below("LoRA")
    for key, parameter in under.named_parameters():
        if is_lora(key):
            parameter.requires_grad = not frozen
    model = stack(under)

    def trainable() -> set[bool]:
        return {parameter.requires_grad for key, parameter in model.named_parameters() if is_lora(key)}

    assert trainable() == {not frozen}
    model.add_adapter("other", awake(BIO["mergeable"]))
    model.set_adapter("other")
    with model.disable_adapter():
        assert trainable() == {not frozen}
    model.delete_adapter("default")
    assert trainable() == {not frozen}
    model.unload()
    assert {p.requires_grad for key, p in under.named_parameters() if is_lora(key)} == {not frozen}


# -- what lies below stays its owner's --


@pytest.mark.parametrize("name", LORAS)
def test_the_table_of_what_lies_below_is_untouched(name):
    under = below(name)
    table, configs = under.peft_config, {key: dict(vars(config)) for key, config in under.peft_config.items()}
    model = stack(under)
    model.add_adapter("other", awake(BIO["mergeable"]))
    assert under.peft_config is table and under.base_model.model.peft_config is table
    assert {key: dict(vars(config)) for key, config in table.items()} == configs
    assert set(model.peft_config) == {"default", "other"}
    assert {config.peft_type for config in model.peft_config.values()} == {"BIO"}
    assert model.base_model.under is under and model.get_base_model() is under.get_base_model()


def test_switching_below_while_stacked():
    under = below("two, first active")
    model = stack(under)
    first = output(model, INPUTS)
    under.set_adapter("second")
    fresh = stack(below("two, second active"))
    copy_circuits(model, fresh)
    assert torch.equal(output(model, INPUTS), output(fresh, INPUTS))
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), output(below("two, second active"), INPUTS))
    under.set_adapter("default")
    assert torch.equal(output(model, INPUTS), first)
    assert model.active_adapters == ["default"]


def test_names_inside_a_stack_are_those_without_it():
    under = below("LoRA")
    before = digest(under.state_dict())
    names = {name for name, _ in under.named_parameters() if is_lora(name)}
    model = stack(under)
    assert {name for name, _ in model.named_parameters() if is_lora(name)} == names
    assert digest(under.state_dict()) == before
    result = model.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys


def test_each_sample_has_its_bio_adapter_over_one_lora():
    under = below("LoRA")
    plain = output(under, INPUTS)
    model = stack(under)
    alone = output(model, INPUTS)
    with torch.no_grad():
        mixed = model(**INPUTS, adapter_names=["default", "__base__", "default"])[0]
    assert close(mixed, torch.stack([alone[0], plain[1], alone[2]]))


def test_a_stack_can_be_copied():
    model = stack(below("LoRA"))
    wanted = output(model, INPUTS)
    twin = copy.deepcopy(model)
    step(twin, INPUTS)
    assert torch.equal(output(model, INPUTS), wanted)
    under = twin.unload()
    assert type(under) is type(model.base_model.under) and under is not model.base_model.under
    assert not hasattr(under.base_model.model, "bio_scope")


# -- what it was trained over --


def _trained_over(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())["trained_over"]


@pytest.mark.parametrize("name", BELOW)
def test_what_it_was_trained_over_is_recorded(name, tmp_path):
    under = below(name)
    (under if name == "nothing" else under.get_base_model()).name_or_path = "some/base"
    stack(under).save_pretrained(tmp_path, save_embedding_layers=False)
    recorded = _trained_over(tmp_path)
    active = [] if name == "nothing" else under.active_adapters
    assert recorded["base"] == "some/base"
    assert [adapter["name"] for adapter in recorded["adapters"]] == active
    assert all(adapter["peft_type"] == "LORA" and len(adapter["fingerprint"]) == 64 for adapter in recorded["adapters"])


def test_another_lora_is_warned_of_with_both_names(tmp_path):
    stack(below("LoRA")).save_pretrained(tmp_path)
    was = _trained_over(tmp_path)["adapters"][0]["fingerprint"][:8]
    other = get_peft_model(bert(), _lora(r=3), adapter_name="other")
    with pytest.warns(UserWarning) as caught:
        PeftModel.from_pretrained(other, tmp_path)
    found = [str(w.message) for w in caught if "was trained over" in str(w.message)]
    assert len(found) == 1
    assert f"LORA adapter 'default' ({was})" in found[0] and "LORA adapter 'other' (" in found[0]


@pytest.mark.parametrize(("trained", "found"), [("nothing", "LoRA"), ("LoRA", "nothing"), ("LoRA", "two, both active")])
def test_more_or_less_than_before_is_warned_of(trained, found, tmp_path):
    stack(below(trained)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained over .*, but is loaded over "):
        PeftModel.from_pretrained(below(found), tmp_path)


def test_another_base_is_warned_of(tmp_path):
    stack(bert()).save_pretrained(tmp_path)
    other = bert()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="whose weights differ"):
        PeftModel.from_pretrained(other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(bert().to(torch.bfloat16), tmp_path)


def test_the_same_lora_under_another_name_is_the_same(tmp_path):
    model = stack(below("LoRA"))
    model.save_pretrained(tmp_path / "bio")
    wanted = output(model, INPUTS)
    model.base_model.under.save_pretrained(tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        under = PeftModel.from_pretrained(bert(), tmp_path / "lora", adapter_name="called otherwise")
        loaded = PeftModel.from_pretrained(under, tmp_path / "bio", adapter_name="taste")
    assert close(output(loaded, INPUTS), wanted, 1e-6)
