"""The model card that is saved beside an adapter."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from bioadapt import BioConfig, add_scores, primitive_info

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES))


@pytest.fixture
def stack() -> PeftModel:
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    return get_peft_model(lora, BioConfig(["lateral_inhibition", "predictive_coding"], init_weights=False)).eval()


def test_the_card_names_primitives_references_and_what_lies_underneath(tmp_path, stack):
    stack.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    for name in ("lateral_inhibition", "predictive_coding"):
        assert name in card.data.tags
        assert " ".join(primitive_info(name).reference.split()) in card.text
    assert {"bioadapt"} <= set(card.data.tags) and card.data.library_name == "peft"
    assert "`default` of the type LORA, which is in the folder `trained_along/default`" in card.text
    assert "pip install bioadapt" in card.text and "More Information Needed" not in card.text


def test_the_loading_snippet_loads_the_same(tmp_path, stack, monkeypatch):
    tokens = torch.randint(1, 50, (2, 5))
    expected = stack(tokens).last_hidden_state
    bert().save_pretrained(tmp_path / "base")
    stack.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    found: dict = {}
    exec(snippet.replace("the base model", str(tmp_path / "base")).replace("FOLDER", str(tmp_path / "mine")), found)
    torch.testing.assert_close(found["model"].eval()(tokens).last_hidden_state, expected)


def test_several_adapters_load_by_the_snippet(tmp_path):
    model = get_peft_model(bert(), BioConfig("lateral_inhibition", init_weights=False), adapter_name="one").eval()
    model.add_adapter("two", BioConfig("k_winners_take_all", init_weights=False))
    bert().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    found: dict = {}
    exec(snippet.replace("the base model", str(tmp_path / "base")).replace("FOLDER", str(tmp_path / "mine")), found)
    primitives = {config.primitives[0]["name"] for config in found["model"].peft_config.values()}
    assert primitives == {"lateral_inhibition", "k_winners_take_all"}


def test_a_card_of_ours_is_renewed_and_one_of_yours_stays(tmp_path, stack):
    stack.save_pretrained(tmp_path)
    alone = stack.unload().unload()
    get_peft_model(alone, BioConfig("neuro_ada")).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "neuro_ada" in text and "lateral_inhibition" not in ModelCard(text).text
    assert "lateral_inhibition" not in ModelCard(text).data.tags

    changed = text.replace("# A bio adapter", "# My adapter")
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    get_peft_model(bert(), BioConfig("gap_junction")).save_pretrained(tmp_path)
    kept = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# My adapter" in kept and "neuro_ada" in kept and "- `gap_junction`" not in kept


def test_a_readme_without_metadata_keeps_its_words(tmp_path):
    (tmp_path / "README.md").write_text("My notes.\n", encoding="utf-8")
    get_peft_model(bert(), BioConfig("gap_junction")).save_pretrained(tmp_path)
    assert "My notes." in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_module_that_is_not_of_transformers(tmp_path):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), BioConfig("gap_junction", target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert "model = ...  # Sequential" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_scores_are_added_replaced_and_renewed_with_the_adapter(tmp_path, stack):
    with pytest.raises(ValueError, match="is not a card that bioadapt has written"):
        add_scores(tmp_path, "stsb", {"spearman": 80.0})
    stack.save_pretrained(tmp_path)
    add_scores(tmp_path, "stsb", {"spearman": 80.0}, kind="sts")
    add_scores(tmp_path, "mine", {"accuracy": 70.12345})
    add_scores(tmp_path, "stsb", {"spearman": 81.5}, kind="sts")
    card = ModelCard.load(tmp_path / "README.md")
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {("stsb", "spearman"): 81.5, ("mine", "accuracy"): round(70.12345, 4)}
    assert "| stsb | spearman | 81.5 |" in card.text and card.text.count("## Scores") == 1 and "80" not in card.text
    stack.save_pretrained(tmp_path)  # it is still ours, and renewed
    assert "## Scores" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("# Mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a card that bioadapt has written"):
        add_scores(tmp_path, "stsb", {"spearman": 80.0})


def test_transformers_own_saving_writes_the_card_too(tmp_path, monkeypatch):
    model, tokens = bert().eval(), torch.randint(1, 50, (2, 5))
    bert().save_pretrained(tmp_path / "base")
    model.add_adapter(BioConfig("lateral_inhibition", init_weights=False), "mine")
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert {"bioadapt", "lateral_inhibition"} <= set(card.data.tags) and card.data.library_name == "peft"
    snippet = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[-1]
    found: dict = {}
    exec(snippet.replace("the base model", str(tmp_path / "base")).replace("FOLDER", str(tmp_path / "saved")), found)
    torch.testing.assert_close(
        found["model"].eval()(tokens).last_hidden_state, model(tokens).last_hidden_state, msg="another adapter"
    )
    (tmp_path / "saved" / "README.md").write_text("# Mine", encoding="utf-8")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text(encoding="utf-8") == "# Mine"
