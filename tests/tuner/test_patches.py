"""What bioadapt changes of torch and transformers is where it was; these tests fail when one of those places moves."""

from __future__ import annotations

import gc
import importlib
import inspect
import weakref

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.models import awake, bert, bio_layers, classifier, close, needs_graphs, output, tokens
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from transformers import Cache, DynamicCache, PreTrainedModel, pytorch_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

from bioadapt.primitives._state import Memory
from bioadapt.tuner import patches


def adapted(model, primitives=("short_term_depression",), targets=("output.dense",)):
    torch.manual_seed(1)
    return get_peft_model(model, awake(list(primitives), list(targets))).eval()


# -- the forward of a stack --


def test_a_surrounded_model_is_in_all_else_what_it_was():
    plain, model = classifier(), adapted(classifier()).get_base_model()
    inner = model.bert
    assert isinstance(inner, type(plain.bert)) and type(inner).__name__ == "BertModel"
    assert repr(type(inner)) == repr(type(plain.bert))  # by which transformers looks up what a model can record
    assert inspect.signature(inner.forward) == inspect.signature(plain.bert.forward)
    assert inner(**tokens(), output_hidden_states=True, output_attentions=True).hidden_states is not None
    fresh = type(inner)(inner.config)  # of the same class, but surrounded by nothing
    assert fresh(**tokens()).last_hidden_state.shape == (3, 6, 16)


def test_the_class_comes_back_when_the_adapter_goes():
    base = bert()
    model = adapted(base)
    assert type(base) is not transformers.BertModel
    assert type(model.unload()) is transformers.BertModel and "bio_scope" not in vars(base)


def test_a_forward_that_somebody_put_on_the_model_still_runs():
    base, calls = bert(), []
    plain = base.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    base.forward = counted
    wanted = output(adapted(bert()), tokens())
    model = adapted(base)
    assert torch.equal(output(model, tokens()), wanted) and len(calls) == 1
    assert torch.equal(model.get_base_model().forward(**tokens()).last_hidden_state, wanted) and len(calls) == 2
    assert model.unload().forward is counted


@pytest.mark.compatible("Training", "accelerate")
def test_what_accelerate_wraps_it_unwraps():
    base = bert()
    base.add_adapter(awake(["short_term_depression"], ["output.dense"]))
    wanted = output(base, tokens())
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(base.train())
    prepared(**tokens()).last_hidden_state.sum().backward()
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(output(unwrapped, tokens()), wanted)
    assert torch.equal(unwrapped.forward(**tokens()).last_hidden_state, wanted)


@needs_graphs
@pytest.mark.compatible("Graphs", "torch.export with dynamic shapes")
@pytest.mark.parametrize(
    "primitive",
    [
        "lateral_inhibition",
        "short_term_depression",
        "predictive_coding",
        "complementary_fast_weights",
        "neuro_ada",
        "surround_suppression",
        "travelling_wave",
        "resonate_and_fire",
    ],
)
def test_models_are_exported_for_any_batch_and_length(primitive):
    model = adapted(bert(), [primitive], ["0.output.dense"]).get_base_model()
    given = {"input_ids": tokens()["input_ids"], "attention_mask": tokens()["attention_mask"]}
    shapes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=16)}
    program = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, shapes)).module()
    for batch, steps in ((3, 2), (1, 6), (2, 9), (3, 16)):
        new = tokens(length=steps + 1) if steps < 3 else tokens(length=steps)
        new = {name: value[:batch, -steps:] for name, value in new.items()}
        new["attention_mask"] = torch.ones_like(new["attention_mask"])
        new["attention_mask"][0, -1] = 0
        with torch.no_grad():
            found, wanted = program(**new)[0], model(**new)[0]
        assert close(found, wanted, 1e-5)


# -- gradient checkpointing --


def test_checkpointed_layers_take_their_function_from_an_attribute():
    assert "_gradient_checkpointing_func" in inspect.getsource(GradientCheckpointingLayer)
    assert "_gradient_checkpointing_func" in inspect.getsource(PreTrainedModel._set_gradient_checkpointing)
    base = bert()
    model = adapted(base).train()
    base.gradient_checkpointing_enable(dict(use_reentrant=False))
    layer = base.encoder.layer[0]
    function = layer._gradient_checkpointing_func
    model(**tokens())
    assert isinstance(layer._gradient_checkpointing_func, patches.CarriedThroughRecomputation)
    model.unload()
    assert layer._gradient_checkpointing_func is function


@pytest.mark.parametrize("before", [True, False], ids=["before the adapter", "after it"])
def test_torchs_checkpoint_wrappers_carry_the_mask_or_refuse(before):
    def gradients(wrapped):
        base = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if wrapped and before:
            base.encoder.layer[1] = checkpoint_wrapper(base.encoder.layer[1])
        torch.manual_seed(1)
        model = adapted(base).train()
        if wrapped and not before:
            base.encoder.layer[1] = checkpoint_wrapper(base.encoder.layer[1])
        model(**tokens()).last_hidden_state.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    if before:
        torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="computed again in the backward by a checkpoint"):
            gradients(True)


# -- caches --


def test_all_that_can_be_done_to_a_cache_is_followed():
    done = {name for name, value in vars(Cache).items() if inspect.isfunction(value) and not name.startswith("_")}
    reads = {"get_seq_length", "get_max_length", "has_previous_state", "get_mask_sizes", "get_query_offset",
             "is_recording_past", "get_conv_state", "get_recurrent_state"}  # fmt: skip
    of_a_layer = {"update", "update_conv_state", "update_recurrent_state", "update_indexer", "early_initialization"}
    elsewhere = {"offload", "prefetch", "activate_past_recording"}  # nothing moves along the batch or the time axis
    assert done - reads - of_a_layer - elsewhere == set(patches.FOLLOWED)


def test_a_cache_of_a_class_of_ones_own_is_followed_once():
    class Louder(DynamicCache):
        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)

    cache, memory = Louder(), Memory()
    memory.append("trace", torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), keep=1)
    patches.follow_cache(cache, memory)
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert memory.series["trace"].latest(1).flatten().tolist() == [2, 3, 1]
    cache.batch_repeat_interleave(2)
    assert memory.series["trace"].latest(1).flatten().tolist() == [2, 2, 3, 3, 1, 1]
    cache.batch_select_indices(torch.tensor([0, 4]))
    assert memory.series["trace"].latest(1).flatten().tolist() == [2, 1]
    cache.reset()
    assert not memory.series and patches.followed_memory(cache) is memory


def test_a_cache_with_a_memory_is_freed_as_soon_as_nobody_holds_it():
    cache = DynamicCache()
    patches.follow_cache(cache, Memory())
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


# -- chunked feed-forward blocks --


def test_feed_forward_blocks_take_the_size_of_their_chunks_from_an_attribute():
    assert "chunk_size > 0" in inspect.getsource(pytorch_utils.apply_chunking_to_forward)
    assert bert(chunk_size_feed_forward=2).encoder.layer[0].chunk_size_feed_forward == 2


# -- who has hooked a module --


def test_hooks_of_a_module_and_of_all_are_seen():
    hooks = [
        lambda layer: layer.register_forward_hook(lambda *run: None),
        lambda layer: layer.register_forward_pre_hook(lambda *run: None),
        lambda layer: layer.register_full_backward_hook(lambda *run: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *run: None),
        lambda layer: register_module_forward_hook(lambda *run: None),
        lambda layer: register_module_forward_pre_hook(lambda *run: None),
        lambda layer: register_module_full_backward_hook(lambda *run: None),
    ]
    layer = nn.Linear(2, 2)
    for hook in hooks:
        assert patches.left_alone(layer)
        with hook(layer):
            assert not patches.left_alone(layer)


def test_a_forward_in_the_place_of_the_layers_is_seen(monkeypatch):
    layer = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", layer.forward)
        assert not patches.left_alone(layer)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert not patches.left_alone(nn.Linear(2, 2))


# -- logits_to_keep --


def test_language_models_take_logits_to_keep_as_an_argument():
    parameters = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert parameters["logits_to_keep"].default == 0


# -- torch's fast path --


def test_torch_leaves_layers_with_hooks_to_run_part_by_part():
    source = inspect.getsource(nn.TransformerEncoderLayer.forward)
    assert "_forward_pre_hooks" in source and "torch._transformer_encoder_layer_fwd" in source
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    called = []
    patches.run_part_by_part(layer.linear1, [layer])
    layer.linear1.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    assert called


def test_adapters_in_a_layer_of_torchs_own_run_in_eval():
    model = get_peft_model(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), awake("pointwise", ["linear2"])
    ).eval()
    ran = []
    (layer,) = bio_layers(model)
    layer.circuits["default"].register_forward_hook(lambda *_: ran.append(1))
    layer.circuits["default"].applied = lambda y, context, state: ran.append(1) or y
    with torch.no_grad():
        model(torch.randn(2, 3, 8))
    assert ran


# -- read alone: feature vectors of sound --


@pytest.mark.parametrize("pooled", [False, True], ids=["plain", "pooled"])
@pytest.mark.parametrize("model", ["Wav2Vec2", "Data2VecAudio"])
def test_speech_models_translate_a_mask_of_samples(model, pooled):
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, output_hidden_size=16
    )
    config = getattr(transformers, f"{model}Config")(
        **sizes, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, add_adapter=pooled,
    )  # fmt: skip
    stack = getattr(transformers, f"{model}Model")(config)
    mask = torch.ones(2, 800).long()
    mask[1, 400:] = 0
    count = stack.feature_extractor(torch.randn(1, 800)).shape[-1]
    real = patches.feature_vectors(stack, mask, count)
    assert real.shape == (2, count) and real.dtype == torch.bool
    half = stack.feature_extractor(torch.randn(1, 400)).shape[-1]
    assert real.sum(1).tolist() == [count, half]
    assert patches.feature_vectors(stack, mask, count + 1) is None
    assert patches.feature_vectors(bert(), mask, count) is None


# -- read alone: padding that a model adds --


@pytest.mark.parametrize(
    "cls",
    [
        transformers.LongformerModel,
        transformers.models.led.modeling_led.LEDEncoder,
        transformers.BigBirdModel,
        transformers.models.bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusEncoder,
        transformers.ReformerModel,
    ],
)
def test_models_that_pad_by_themselves_have_a_method_for_it(cls):
    assert patches.pads_by_itself(cls.__new__(cls))
    assert not patches.pads_by_itself(bert())


# -- read alone: blocks whose first axis is time --


@pytest.mark.parametrize("name", patches.TIME_FIRST)
def test_blocks_whose_first_axis_is_time_are_there(name):
    module, _, cls = name.partition(".")
    module = importlib.import_module(f"transformers.models.{module.removeprefix('modeling_')}.{module}")
    block = getattr(module, cls)
    assert patches.has_time_first(block.__new__(block))
    assert not patches.has_time_first(bert().encoder.layer[0])


# -- read alone: which models predict which tokens --


def test_the_tables_of_the_auto_classes_tell_what_models_predict():
    assert "bert" in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and patches.predicts_masked_tokens("modernbert")
    assert "gpt2" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and patches.predicts_next_tokens("mamba")
    assert not patches.predicts_masked_tokens("llama") and not patches.predicts_next_tokens("modernbert")
