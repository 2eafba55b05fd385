"""Images and causal language models: what is scored, what learns, and the small models that are made for it."""

import io
import shutil

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers")
pytest.importorskip("sklearn")

from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from bioadapt.evaluation import ImageTask, LanguageModellingTask, MultipleChoiceTask, evaluate, load_task, models
from bioadapt.evaluation.models import ImageModel, LanguageModel, load_model
from bioadapt.evaluation.tasks.images import as_pixels, features
from bioadapt.evaluation.tasks.language import losses
from bioadapt.evaluation.training import Schedule, fit

TEXTS = ["the cat sleeps", "a dog runs home", "the old tree", "red", "a blue bird sings in the rain"]


@pytest.fixture(autouse=True)
def hardly_pretrained(monkeypatch):
    """Small models see a few batches only: the tests ask what is done with them, not how good they are."""
    monkeypatch.setattr(models, "_IMAGE_STEPS", 3)
    monkeypatch.setattr(models, "_TEXT_STEPS", 3)


class Words:
    """A tokenizer of one token a word; word 0 starts every text."""

    bos_token_id = 0
    words = sorted({word for text in TEXTS for word in text.split()})

    def __call__(self, text, add_special_tokens, truncation, max_length):
        return {"input_ids": [1 + self.words.index(word) for word in text.split()][:max_length]}


@pytest.fixture
def language():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1 + len(Words.words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return LanguageModel(Qwen2ForCausalLM(config).eval(), Words())


def loss_of(language, text):
    """Summed loss of a text, and how many tokens were foreseen, one text at a time."""
    ids = torch.tensor([language.tokens(text)])
    logits = language.model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1


def test_perplexity_is_that_of_each_text_by_itself(language):
    found = LanguageModellingTask("texts", {"test": {"text": TEXTS}}).evaluate(language)
    sums = np.array([loss_of(language, text) for text in TEXTS])
    # Batches take sums in another order than single texts.
    assert found.rows["perplexity"] == pytest.approx(sums, abs=1e-4)
    assert found.scores["perplexity"] == pytest.approx(np.exp(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5)


def test_training_on_texts_lowers_their_perplexity(language):
    task = LanguageModellingTask("texts", {split: {"text": TEXTS * 2} for split in ("train", "test")})
    before = task.evaluate(language).scores["perplexity"]
    history = fit(language, task, Schedule(epochs=20, learning_rate=1e-2, batch_size=4))
    assert history.steps == 60
    assert task.evaluate(language).scores["perplexity"] < 0.5 * before


def test_the_likeliest_choice_counts_by_its_summed_likelihood(language):
    choices = ["cat", "dog runs home", "tree", "red"]
    contexts = ["the", "a", "the old", "blue"]
    expected = []
    for context in contexts:
        own = [loss_of(language, f"{context} {choice}")[0] - loss_of(language, context)[0] for choice in choices]
        expected.append(int(np.argmin(own)))
    rows = {"context": contexts, "choices": [choices, choices, " | ".join(choices), choices], "label": expected}
    task = MultipleChoiceTask("choose", {"test": rows})
    assert task.evaluate(language).scores["accuracy"] == 100.0
    wrong = {**rows, "label": [(label + 1) % 4 for label in expected]}
    assert MultipleChoiceTask("choose", {"test": wrong}).evaluate(language).scores["accuracy"] == 0.0
    with pytest.raises(ValueError, match=r"choose', test, row 1: label=4; accepted is a place from 0 to 3"):
        MultipleChoiceTask("choose", {"test": {**rows, "label": [0, 4, 0, 0]}})


def test_a_choice_learns_what_it_is_asked_and_not_the_context(language):
    rows = {"context": ["the old"], "choices": [["tree", "cat"]], "label": [1]}
    ((ids, labels),) = MultipleChoiceTask("choose", {"train": rows}).examples(language, "train")
    assert ids == [*language.tokens("the old"), 1 + Words.words.index("cat")]
    assert labels == [-100, -100, -100, ids[-1]]
    assert len(losses(language, [(ids, labels)])[0]) == 1


def test_a_set_can_be_read_as_another_family():
    tables = {"train": {"text": ["good film", "bad film"], "label": ["up", "down"]}}
    texts = load_task("mood:language_modelling", tables)
    assert (texts.family, texts.rows("train")) == ("language_modelling", {"text": ["good film", "bad film"]})
    asked = load_task("mood:multiple_choice", tables).rows("train")
    assert asked == {"context": ["good film", "bad film"], "choices": [["down", "up"]] * 2, "label": [1, 0]}
    with pytest.raises(ValueError, match="unknown family 'multiple_chioce'; did you mean 'multiple_choice'"):
        load_task("mood:multiple_chioce", tables)
    with pytest.raises(ValueError, match="columns text, label and cannot be read as sts"):
        load_task("mood:sts", tables)


# -- images --


@pytest.mark.parametrize("name", ["small-vit", "small-convnet"])
def test_an_image_model_is_trained_with_a_head_that_is_thrown_away(name, tmp_path):
    task = load_task("digits", limit=60)
    model = load_model(name, task, "cpu", tmp_path)
    before = features(model, task.pixels("test", model))
    assert before.shape == (60, model.features(task.pixels("test", model)[:1]).shape[1])
    count = sum(p.numel() for p in model.model.parameters())
    fit(model, task, Schedule(epochs=1, learning_rate=1e-2, batch_size=20))
    assert sum(p.numel() for p in model.model.parameters()) == count
    assert np.abs(features(model, task.pixels("test", model)) - before).max() > 1e-3
    again = features(load_model(name, task, "cpu", tmp_path), task.pixels("test", model))
    assert again == pytest.approx(before, abs=1e-6)  # made once, and kept


def test_images_become_what_the_model_reads():
    grey = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    assert as_pixels(grey, 1, 4).shape == (2, 1, 4, 4)
    coloured = as_pixels(grey, 3, 8)
    assert coloured.shape == (2, 3, 8, 8) and torch.equal(coloured[:, 0], coloured[:, 2])
    colours = np.zeros((1, 4, 4, 3), np.uint8)
    colours[..., 1] = 255
    assert as_pixels(colours, 3, 4)[0, :, 0, 0].tolist() == [-1.0, 1.0, -1.0]


def test_digits_are_those_of_scikit_learn():
    task = load_task("digits")
    assert task.sizes == {"train": 1200, "validation": 297, "test": 300}
    assert task.classes == 10 and task.rows("test")["images"][0].shape == (8, 8)


def test_damaged_images_are_named():
    images = [np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)]
    for odd, said in (
        (np.zeros((4, 4)), r"row 1: an image of shape \(4, 4\) and type float64; accepted are"),
        (np.zeros(4, np.uint8), r"row 1: an image of shape \(4,\)"),
        (np.zeros((4, 4, 3), np.uint8), "some images have colours, others have none"),
    ):
        with pytest.raises(ValueError, match=rf"'odd', test.*{said}"):
            ImageTask("odd", {"test": {"images": [images[0], odd], "labels": [0, 1]}})
    with pytest.raises(ValueError, match=r"'odd', test: columns of different lengths: 2 images, 1 labels"):
        ImageTask("odd", {"test": {"images": images, "labels": [0]}})


def test_a_folder_of_images_of_different_sizes_is_a_task(tmp_path):
    picture = pytest.importorskip("PIL.Image")
    for number in range(24):
        folder = tmp_path / "pets" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.new("RGB", (8 + number % 3, 8), (number, 0, 255)).save(folder / f"{number}.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
    task = load_task(tmp_path / "pets")
    assert (task.name, task.family) == ("pets", "image_classification")
    assert task.sizes == {"train": 17, "validation": 2, "test": 5}
    assert set(task.labels("train")) == {0, 1} and set(task.rows("train")["labels"]) == {"cat", "dog"}
    again = load_task(str(tmp_path / "pets"))
    assert again.fingerprints() == task.fingerprints()
    pixels = as_pixels(task.rows("train")["images"], 3, 8)
    assert pixels.shape == (17, 3, 8, 8) and pixels[:, 2].sub(1).abs().max() < 1e-5  # as interpolation rounds
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "pets", tmp_path / "parted" / split)
    assert load_task(tmp_path / "parted").sizes == {"train": 24, "test": 24}


def test_a_model_that_a_task_is_not_for_is_refused(encoder_folder):
    with pytest.raises(ValueError, match="is a sentence encoder, task 'digits' is for an image model"):
        load_model(encoder_folder, load_task("digits", limit=5))
    with pytest.raises(ValueError, match="'small-lm' is a causal language model, task 'digits' is for an image model"):
        load_model("small-lm", load_task("digits", limit=5))


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("small-vit", load_task("digits", limit=40)),
        ("small-convnet", load_task("digits", limit=40)),
        ("small-lm", LanguageModellingTask("texts", {"train": {"text": [f"{n} {t}" for n in range(9) for t in TEXTS]},
                                                     "test": {"text": TEXTS}})),
    ],
)  # fmt: skip
def test_all_arms_run_on_images_and_on_language_models(model, task, tmp_path):
    results = evaluate(
        task, model=model, arms=["zero-shot", "lora", "lora-equal", "lora+bio", "lora+placebo"], seeds=1, rates=[1e-2],
        primitives=["predictive_coding"], output=str(tmp_path), device="cpu", batch_size=16,
        console=Console(file=io.StringIO(), width=200),
    )  # fmt: skip
    cells = {cell["arm"]: cell for cell in results["cells"]}
    assert len(cells) == 6
    assert len({(cell["dev"], cell["test"]) for cell in cells.values()}) > 1  # something was learned
    wanted = cells["lora+bio"]["params"]
    for name in ("lora-equal@lora-sites", "lora-equal@bio-sites", "lora+placebo"):
        assert cells[name]["params"] == pytest.approx(wanted, rel=0.02)


def test_a_config_alone_makes_a_model(tmp_path):
    from transformers import ViTConfig

    ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1,
    ).save_pretrained(tmp_path / "mine")  # fmt: skip
    model = load_model(str(tmp_path / "mine" / "config.json"), load_task("digits", limit=10), "cpu", tmp_path / "made")
    assert isinstance(model, ImageModel) and model.plain.config.hidden_size == 16


def test_a_language_model_is_made_from_a_config_too(tmp_path, capsys):
    from transformers import MistralConfig

    MistralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        sliding_window=3,
    ).save_pretrained(tmp_path / "mine")  # fmt: skip
    task = LanguageModellingTask("texts", {"train": {"text": TEXTS}})
    model = load_model(str(tmp_path / "mine" / "config.json"), task, "cpu", tmp_path / "made", steps=1)
    assert isinstance(model, LanguageModel) and model.model.config.sliding_window == 3
    assert model.model.config.vocab_size == len(model.tokenizer)
    assert not capsys.readouterr().err  # no progress bar of another library
