"""With the tools that people train, serve and export with, run for real on tiny models."""

from __future__ import annotations

import pytest
import torch
from helpers.models import VOCAB, awake, bert, bio_layers, close, digest, gpt2, output, own_parameters, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast

from bioadapt import BioConfig, BioTrainerCallback

ONE_OF_EACH_KIND = ["lateral_inhibition", "short_term_depression", "neuro_ada"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="w2", eos_token="w1", unk_token="w0", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


# -- TRL --

SHORT = dict(
    max_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    gradient_checkpointing=False, disable_tqdm=True,
)  # fmt: skip


def stacked() -> PeftModel:
    under = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False), "below")
    under.requires_grad_(False)
    return get_peft_model(under, awake(["homeostatic_scaling", "short_term_depression"]))


def assert_only_ours_moved(model: nn.Module, before: dict[str, str]) -> None:
    after = digest(dict(model.named_parameters()))
    moved = {name for name in before if after[name] != before[name]}
    assert moved and all(".nrn_circuit." in name or "modules_to_save" in name for name in moved)


@pytest.mark.compatible("Training", "TRL: GRPO over a LoRA")
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["without a reference", "with a reference"])
def test_grpo_over_a_lora(beta, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    settings = trl.GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        beta=beta,
        disable_dropout=True,
        **SHORT,
    )
    model, prompts = stacked(), [{"prompt": "w3 w4 w5"}, {"prompt": "w6"}] * 2

    def reward(completions, **_):
        return [float(len(completion) % 5) for completion in completions]

    trainer = trl.GRPOTrainer(
        model, reward, args=settings, train_dataset=datasets.Dataset.from_list(prompts), processing_class=tokenizer()
    )
    before = digest(dict(model.named_parameters()))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 2
    if beta:
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference starts where the policy does
    assert_only_ours_moved(model, before)


@pytest.mark.compatible("Training", "TRL: reward models")
def test_a_reward_model(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = gpt2().config
    config.num_labels, config.pad_token_id = 1, 2
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(config)
    model = get_peft_model(base, awake(["homeostatic_scaling"], task_type="SEQ_CLS"))
    pairs = datasets.Dataset.from_list([{"chosen": "w3 w4 w5", "rejected": "w6 w7"}] * 4)
    settings = trl.RewardConfig(str(tmp_path), per_device_train_batch_size=2, **SHORT)
    before = digest(dict(model.named_parameters()))
    trl.RewardTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer()).train()
    assert_only_ours_moved(model, before)


# -- sentence-transformers --


def sentence_encoder(folder, way: str):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    if not (folder / "config.json").exists():
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    transformer = parts.Transformer(str(folder))
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, parts.Pooling(transformer.get_word_embedding_dimension())], device="cpu"
    )
    torch.manual_seed(1)
    if way == "add_adapter":
        model.add_adapter(BioConfig(["homeostatic_scaling", "short_term_depression"]))
    else:
        place = "auto_model" if "auto_model" in transformer._modules else "model"
        config = BioConfig(["lateral_inhibition"]) if way == "bio" else LoraConfig(target_modules=["query"])
        setattr(transformer, place, get_peft_model(getattr(transformer, place), config))
    return model


def train_sentences(model, folder, steps: int, resume=None, loss="MultipleNegativesRankingLoss", **given) -> None:
    import sentence_transformers as st
    import sentence_transformers.losses
    from datasets import Dataset

    rows = Dataset.from_dict({"anchor": ["w3 w4", "w5 w6 w7", "w8"] * 4, "positive": ["w4 w3", "w7", "w8 w9"] * 4})
    settings = st.SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=4, seed=3, lr_scheduler_type="constant",
        **SHORT | dict(max_steps=steps, save_strategy="steps", save_steps=2),
    )  # fmt: skip
    criterion = getattr(st.losses, loss)(model, **given)
    trainer = st.SentenceTransformerTrainer(
        model, settings, train_dataset=rows, loss=criterion, callbacks=[BioTrainerCallback()]
    )
    trainer.train(resume_from_checkpoint=resume)


def embedded(model) -> torch.Tensor:
    return model.encode(["w3 w4 w5", "w9"], convert_to_tensor=True)


@pytest.mark.compatible("Training", "sentence-transformers: resuming")
def test_sentence_transformers_resumes_what_it_added(tmp_path):
    base = tmp_path / "base"
    whole, half, resumed = (sentence_encoder(base, "add_adapter") for _ in range(3))
    train_sentences(whole, tmp_path / "whole", 4)
    train_sentences(half, tmp_path / "half", 2)
    checkpoint = tmp_path / "half" / "checkpoint-2"
    train_sentences(resumed, tmp_path / "half", 4, resume=str(checkpoint))
    assert torch.equal(embedded(resumed), embedded(whole)) and not close(embedded(half), embedded(whole), 1e-6)


@pytest.mark.compatible("Training", "sentence-transformers: resuming with a PeftModel in its place")
def test_sentence_transformers_resumes_no_peft_model_of_any_method(tmp_path, record_property):
    for way in ("lora", "bio"):
        train_sentences(sentence_encoder(tmp_path / "base", way), tmp_path / way, 2)
        again = sentence_encoder(tmp_path / "base", way)
        with pytest.raises(RuntimeError, match="Error.s. in loading state_dict for SentenceTransformer"):
            train_sentences(again, tmp_path / way, 4, resume=str(tmp_path / way / "checkpoint-2"))
    record_property(
        "limit", "sentence-transformers loads its checkpoint without the PeftModel, also a LoRA's: use its add_adapter"
    )


@pytest.mark.compatible("Training", "sentence-transformers: GradCache")
def test_cached_losses_train_as_whole_batches_do(tmp_path):
    found = []
    losses = {"MultipleNegativesRankingLoss": {}, "CachedMultipleNegativesRankingLoss": {"mini_batch_size": 1}}
    for loss, given in losses.items():
        model = sentence_encoder(tmp_path / "base", "add_adapter")
        plain = embedded(model)
        train_sentences(model, tmp_path / loss, 2, loss=loss, **given)
        found.append(embedded(model))
    assert close(*found, 1e-5) and not close(found[0], plain, 1e-4)


# -- serving and exporting --


@pytest.mark.compatible("Serving", "hotswap")
def test_peft_hotswaps_loras_alone(tmp_path, record_property):
    model = get_peft_model(bert(), awake(["lateral_inhibition"]))
    model.save_pretrained(tmp_path)
    wanted = output(model, tokens())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA") as refusal:
        hotswap_adapter(model, str(tmp_path), "default")
    record_property("limit", f"PEFT: {refusal.value}")
    assert torch.equal(output(model, tokens()), wanted)


@pytest.fixture
def runtime():
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    return pytest.importorskip("onnxruntime")


@pytest.mark.compatible("Graphs", "ONNX with dynamic shapes")
@pytest.mark.parametrize("primitive", ONE_OF_EACH_KIND)
def test_onnx_serves_any_batch_and_length(primitive, tmp_path, runtime):
    model = get_peft_model(bert(), awake([primitive], ["0.output.dense"])).eval().get_base_model()
    given = {name: tokens()[name] for name in ("input_ids", "attention_mask")}
    shapes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    shapes = dict.fromkeys(given, shapes)
    torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=given, dynamic_shapes=shapes, dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch, length in ((2, 6), (1, 9), (3, 4)):
        new = {name: value[:batch, :length] for name, value in tokens(length=9).items() if name in given}
        with torch.no_grad():
            wanted = model(**new).last_hidden_state
        found = session.run(None, {name: value.numpy() for name, value in new.items()})[0]
        assert close(torch.from_numpy(found)[new["attention_mask"].bool()], wanted[new["attention_mask"].bool()], 1e-4)


@pytest.mark.parametrize("primitive", [*ONE_OF_EACH_KIND, "liquid_reservoir", "resonate_and_fire"])
def test_onnx_serves_one_length_without_complex_numbers(primitive, tmp_path, runtime):
    model = get_peft_model(bert(), awake([primitive], ["0.output.dense"])).eval().get_base_model()
    given = {name: tokens()[name] for name in ("input_ids", "attention_mask")}
    torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=given, dynamo=True)
    with torch.no_grad():
        wanted = model(**given).last_hidden_state
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
    real = given["attention_mask"].bool()
    assert close(torch.from_numpy(found)[real], wanted[real], 1e-4)


# -- models of other libraries --


def vision_transformer() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


IMAGES = {
    "timm": (vision_transformer, ["attn.proj", "mlp.fc2"], lambda: (torch.randn(2, 3, 32, 32),)),
    "diffusers": (unet, ["to_out.0"], lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 8))),
}


@pytest.mark.parametrize(
    "library",
    [
        pytest.param("timm", marks=pytest.mark.compatible("Models of other libraries", "timm")),
        pytest.param("diffusers", marks=pytest.mark.compatible("Models of other libraries", "diffusers")),
    ],
)
def test_models_of_images_are_adapted_trained_saved_and_loaded(library, tmp_path):
    make, targets, given = IMAGES[library]
    torch.manual_seed(0)
    base = make().eval()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inputs = given()

    def result(model):
        found = model.eval()(*inputs)
        return (found if isinstance(found, torch.Tensor) else found.sample).detach().clone()

    plain = result(base)
    model = get_peft_model(base, awake(["lateral_inhibition", "predictive_coding"], targets))
    assert not any(layer.causal for layer in bio_layers(model)) and not close(result(model), plain, 1e-4)
    optimiser = torch.optim.SGD(own_parameters(model).values(), lr=0.1)
    found = model.train()(*inputs)
    (found if isinstance(found, torch.Tensor) else found.sample).square().mean().backward()
    optimiser.step()
    model.save_pretrained(tmp_path)
    again = make()
    again.load_state_dict(start)
    assert close(result(PeftModel.from_pretrained(again, tmp_path)), result(model), 1e-5)
