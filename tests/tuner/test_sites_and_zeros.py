"""How fast what is zero at birth learns, which factor that is, and adapters on what a module reads."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

from bioadapt import BioConfig, build_primitive, list_primitives, primitive_info
from bioadapt.primitives.base import Context

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
}
NAMES = list_primitives()
ON_FEATURES = [name for name in NAMES if primitive_info(name).kind != "weight"]
# Three have no effect before their first local update, and one fires only when driven for longer than a few tokens.
SILENT_AT_FIRST = ("homeostatic_scaling", "efference_copy", "logogen", "resonate_and_fire")
AT_INPUT = {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL)).eval().requires_grad_(False)


def words(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def output(model: nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).last_hidden_state


def primitives_of(model: nn.Module) -> list:
    return [primitive for layer in model.base_model.layers() for primitive in layer.primitives()]


# -- zero_scale --


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_is_that_of_the_primitive_only_in_a_fresh_configuration(name):
    def scale(**fields):
        return BioConfig(primitives=[name], **fields).primitives[0]["zero_scale"]

    info = primitive_info(name)
    assert scale() == info.fresh_zero_scale
    assert scale(bioadapt_version="0.1.0") == 1.0  # a file of a time before
    if info.kind != "weight":
        assert scale(rank=4) == 1.0  # what is zero is the up-projection, which learns like a LoRA's
    given = BioConfig(primitives=[{"name": name, "zero_scale": 3.0}])
    assert given.primitives[0]["zero_scale"] == 3.0


@pytest.mark.parametrize("name", [n for n in NAMES if primitive_info(n).zero_at != "update"])
def test_the_scale_multiplies_the_gate_and_nothing_else(name):
    def change(zero_scale):
        torch.manual_seed(1)
        primitive = build_primitive(name, 24, 32, zero_scale=zero_scale)
        primitive.wake()
        torch.manual_seed(2)
        with torch.no_grad():
            primitive.gate.copy_(torch.rand_like(primitive.gate) / zero_scale)
        x, v = torch.randn(2, 5, 32), torch.randn(2, 5, 24)
        return primitive.eval()(x, Context(x_in=v))

    torch.testing.assert_close(change(8.0), change(1.0))  # a power of two is exact


@pytest.mark.parametrize("name", [n for n in NAMES if primitive_info(n).zero_at == "update"])
def test_the_scale_of_an_update_multiplies_the_update(name):
    """These have no gate: eight times what one unit of training wrote is what eight units wrote."""
    changes = {}
    for zero_scale in (1.0, 8.0):
        torch.manual_seed(1)
        primitive = build_primitive(name, 24, 32, zero_scale=zero_scale).eval()
        with torch.no_grad():
            zero = {"fly_lora": "B", "neuro_lora": "B", "neuro_ada": "values", "san_scaling": "theta"}[name]
            tensor = getattr(primitive, zero)
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) / zero_scale)
        x, v = (torch.randn(2, 5, d, generator=torch.Generator().manual_seed(d)) for d in (32, 24))
        changes[zero_scale] = primitive(x, Context(x_in=v))
        assert changes[zero_scale].abs().max() > 0.1
    torch.testing.assert_close(changes[8.0], changes[1.0])


@pytest.mark.parametrize("name", [n for n in NAMES if primitive_info(n).mergeable])
def test_a_scaled_adapter_merges_exactly(name):
    model = get_peft_model(bert(), BioConfig(primitives=[{"name": name, "zero_scale": 8.0}], init_weights=False)).eval()
    ids = words(2, 7)
    expected = output(model, ids)
    assert not torch.allclose(expected, output(bert(), ids), atol=1e-4)
    torch.testing.assert_close(output(model.merge_and_unload(), ids), expected, atol=1e-5, rtol=1e-4)


def test_a_file_without_the_scale_keeps_its_function(tmp_path):
    model = get_peft_model(
        bert(), BioConfig(primitives=[{"name": "lateral_inhibition", "zero_scale": 1.0}], init_weights=False)
    ).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    for entry in content["primitives"]:
        del entry["zero_scale"]
    content = {key: value for key, value in content.items() if "fingerprint" not in key}
    path.write_text(json.dumps(content))
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(output(loaded, words(2, 7)), output(model, words(2, 7)))


# -- one zero under rank --


@pytest.mark.parametrize("name", ON_FEATURES)
def test_under_rank_the_up_projection_alone_is_zero_and_the_mechanism_fully_on(name):
    model = get_peft_model(bert(), BioConfig(primitives=[name], rank=6)).eval()
    ids = words(3, 7)
    assert torch.equal(output(model, ids), output(bert(), ids))
    for layer in model.base_model.layers():
        circuit = layer.circuits["default"]
        assert not circuit.up.count_nonzero()
        assert (circuit[name].gate == 1).all()
        population = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
        v = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            change = circuit[name](population, Context(x_in=v))
        assert name in SILENT_AT_FIRST or change.norm() > 0.01 * population.norm()


# -- at the input of a module --


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("rank", [None, 4])
def test_at_the_input_a_fresh_adapter_is_the_identity_and_a_woken_one_is_not(name, rank):
    ids, mask = words(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    plain = output(bert(), ids, attention_mask=mask)
    fresh = get_peft_model(bert(), BioConfig(primitives=[name], rank=rank, **AT_INPUT)).eval()
    assert torch.equal(output(fresh, ids, attention_mask=mask), plain)
    widths = {primitive.d_out for primitive in primitives_of(fresh)}
    assert rank is not None or widths == {32, 48}  # outputs of the keys and inputs of the last projections
    woken = get_peft_model(bert(), BioConfig(primitives=[name], rank=rank, init_weights=False, **AT_INPUT)).eval()
    found = output(woken, ids, attention_mask=mask)
    assert not torch.allclose(found, plain, atol=1e-5)
    alone = output(woken, ids[1:2, :4])
    torch.testing.assert_close(found[1:2, :4], alone, atol=1e-5, rtol=1e-4)


def test_the_change_is_that_of_the_input():
    model = get_peft_model(bert(), BioConfig(primitives=["gap_junction"], init_weights=False, **AT_INPUT)).eval()
    layer = model.base_model.model.encoder.layer[0].output.dense
    v = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.base_layer(v + layer.circuits["default"](v, Context()))
        torch.testing.assert_close(layer(v), expected)


@pytest.mark.parametrize("name", [n for n in ON_FEATURES if primitive_info(n).mergeable])
def test_an_adapter_at_the_input_merges_exactly_and_comes_out_again(name):
    model = get_peft_model(bert(), BioConfig(primitives=[name], init_weights=False, **AT_INPUT)).eval()
    ids = words(2, 7)
    expected = output(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(output(model, ids), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, ids), expected)


def test_a_pointwise_convolution_merges_what_was_at_its_input():
    host = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1))
    config = BioConfig(
        primitives=["gap_junction"], target_modules=["0"], feedforward_modules=["0"], init_weights=False, causal=False
    )
    model = get_peft_model(host, config).eval()
    image = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        expected = model(image)
        model.merge_adapter()
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-4)


def test_several_adapters_add_up_and_samples_choose_their_own():
    config = BioConfig(primitives=["lateral_inhibition"], init_weights=False, **AT_INPUT)
    model = get_peft_model(bert(), config, adapter_name="one").eval()
    model.add_adapter("two", BioConfig(primitives=["divisive_normalization"], init_weights=False, **AT_INPUT))
    ids = words(2, 7)
    layer = model.base_model.model.encoder.layer[0].output.dense
    v = torch.randn(2, 5, 48)
    found = {}
    with torch.no_grad():
        for names in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(names)
            found[len(names), names[0]] = layer(v)
        plain = layer.base_layer(v)
    both = found[1, "one"] + found[1, "two"] - plain
    torch.testing.assert_close(found[2, "one"], both, atol=1e-5, rtol=1e-4)
    apart = {}
    for name in ("one", "two"):
        model.base_model.set_adapter(name)
        apart[name] = output(model, ids)
    mixed = output(model, ids, adapter_names=["two", "one"])
    torch.testing.assert_close(mixed[0], apart["two"][0])
    torch.testing.assert_close(mixed[1], apart["one"][1])


def test_saved_and_loaded(tmp_path):
    model = get_peft_model(bert(), BioConfig(primitives=["lateral_inhibition"], init_weights=False, **AT_INPUT)).eval()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".output.dense." in key and key.endswith("lateral_inhibition.gate") for key in keys)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert loaded.peft_config["default"].feedforward_modules == {"output.dense"}
    assert torch.equal(output(loaded, words(2, 7)), output(model, words(2, 7)))


def test_decoding_remembers_what_the_input_was():
    torch.manual_seed(0)
    host = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, bos_token_id=1, eos_token_id=None)).eval()
    config = BioConfig(primitives=["short_term_depression"], init_weights=False)
    model = get_peft_model(host, config).eval()
    assert model.peft_config["default"].feedforward_modules == {"down_proj"}
    ids = words(2, 6)
    found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    again = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", [n for n in NAMES if primitive_info(n).kind == "weight"])
def test_what_acts_on_a_weight_is_refused_at_an_input(name):
    host = bert()
    before = {key: id(module) for key, module in host.named_modules()}
    with pytest.raises(ValueError, match="feedforward_modules asks for a change of the module's input"):
        get_peft_model(host, BioConfig(primitives=[name], **AT_INPUT))
    assert {key: id(module) for key, module in host.named_modules()} == before


def test_feedforward_modules_are_among_the_targets():
    with pytest.raises(ValueError, match="feedforward_modules.*'value' is not in target_modules"):
        BioConfig(primitives=["gap_junction"], target_modules=["key"], feedforward_modules=["value"])
    with pytest.raises(ValueError, match="feedforward_modules.*needs target_modules"):
        BioConfig(primitives=["gap_junction"], feedforward_modules=["value"])


# -- default targets --


def test_what_compares_tokens_goes_to_the_embedding_of_a_language_model():
    def targets(model, *primitives):
        return get_peft_model(model, BioConfig(primitives)).peft_config["default"].target_modules

    decoder = Qwen2Config(**SMALL, num_key_value_heads=2)
    assert targets(Qwen2ForCausalLM(decoder), "sequence_memory") == {"embed_tokens"}
    alone = "sequence_memory belongs at 'embed_tokens', but goes to .*'o_proj', 'down_proj'.*: give it a configuration"
    with pytest.warns(UserWarning, match=alone):
        assert targets(Qwen2ForCausalLM(decoder), "sequence_memory", "leaky_integrator") == {"o_proj", "down_proj"}
    with pytest.warns(UserWarning, match="belongs at the embedding of a language model, and none is known of 'bert'"):
        assert targets(bert(), "sequence_memory") == {"output.dense"}


def test_what_has_a_unit_for_each_word_goes_to_the_head_of_a_language_model():
    decoder = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    model = get_peft_model(decoder, BioConfig("logogen"))
    assert [layer.path for layer in model.base_model.layers()] == ["lm_head"]
    with pytest.warns(
        UserWarning, match="logogen belongs at the head of a language model, and none is known of 'bert'"
    ):
        assert get_peft_model(bert(), BioConfig("logogen")).peft_config["default"].target_modules == {"output.dense"}


def test_two_with_different_homes_are_told_that_one_configuration_has_one_list_of_modules():
    decoder = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    with pytest.warns(UserWarning) as said:
        get_peft_model(decoder, BioConfig(["logogen", "sequence_memory"]))
    homes = {str(one.message).partition(", but")[0] for one in said if "belongs at" in str(one.message)}
    assert homes == {"logogen belongs at 'lm_head'", "sequence_memory belongs at 'embed_tokens'"}


def test_where_the_user_puts_it_nothing_is_said():
    decoder = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*belongs at")
        get_peft_model(decoder, BioConfig("logogen", target_modules=["down_proj"]))


def test_gains_go_where_ia3_goes_and_the_rest_into_the_residual_stream():
    def config(**fields):
        return get_peft_model(bert(), BioConfig(**fields)).peft_config["default"]

    gains = config(primitives=["lateral_inhibition", "attention_gain"])
    assert gains.target_modules == {"key", "value", "output.dense"} and gains.feedforward_modules == {"output.dense"}
    for fields in (
        {"primitives": ["leaky_integrator"]},
        {"primitives": ["lateral_inhibition", "leaky_integrator"]},
        {"primitives": ["lateral_inhibition"], "rank": 4},
    ):
        found = config(**fields)
        assert found.target_modules == {"output.dense"} and found.feedforward_modules is None
