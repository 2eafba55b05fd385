"""A search with a training of one's own: an encoder, a causal language model and a vision transformer."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("cloudpickle")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import torch
from rich.console import Console
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from bioadapt.search import open_storage, search

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = torch.arange(12).view(2, 6)
MODELS = {
    "encoder": lambda: (BertModel(BertConfig(vocab_size=30, **SIZES)), TOKENS),
    "causal": lambda: (GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2)), TOKENS),
    "vision": lambda: (
        ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)),
        torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
    ),
}


def objective_of(inputs):
    """Defined within a function, as in a notebook: it travels by value."""

    def train_and_score(model, learning_rate, report):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=learning_rate) if trained else None
        for step in range(2):
            loss = model(inputs)[0].square().mean()
            report(step, -loss.item())
            if optimiser is not None:
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return -loss.item()

    return train_and_score


@pytest.mark.parametrize("kind", MODELS)
def test_a_function_and_a_model_are_enough(tmp_path, kind):
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {"trials": 3, "slots": 1, "budget_params": 10_000, "primitives": ("lateral_inhibition", "neuro_ada")}

    def go():
        return search(
            objective=objective_of(inputs), model=model, output=tmp_path, console=Console(quiet=True), **wanted
        )

    found = go()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    study_of(tmp_path, type(model).__name__, 3)
    assert found["score"] < 0 and found["number"] in range(3) and "</html>" in Path(found["report"]).read_text()
    assert set(found["configuration"]) == {"slots", "rank", "composition", "learning_rate"}
    assert go() == found  # it has ended: nothing is trained again
    study = study_of(tmp_path, type(model).__name__, 3)
    script = study.user_attrs["best"]["script"]
    assert script in html.unescape(Path(found["report"]).read_text())
    names = {"objective": objective_of(inputs), "model": MODELS[kind]()[0]}
    names["model"].load_state_dict(before)
    exec(compile(script, "best.py", "exec"), names)
    assert names["score"] == pytest.approx(found["score"], abs=1e-5)  # processes round differently


def study_of(folder, name, trials):
    import optuna

    study = optuna.load_study(study_name=name, storage=open_storage(str(folder / "study.journal")))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * trials, [t.user_attrs for t in study.trials]
    return study


def test_what_means_nothing_without_a_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task='stsb' means nothing with an objective; accepted: .*trials"):
        search(objective=print, model=torch.nn.Linear(2, 2), task="stsb")
    with pytest.raises(TypeError, match="search has no setting 'trails' .got 1.; did you mean 'trials'"):
        search(objective=print, model=torch.nn.Linear(2, 2), trails=1)
    with pytest.raises(ValueError, match=r"objective=3: a function objective\(model, learning_rate, report\)"):
        search(objective=3, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="trials 0"):
        search(objective=print, model=torch.nn.Linear(2, 2), trials=0, output=tmp_path)
    with pytest.raises(ValueError, match="model=None: an objective needs the model that it trains"):
        search(objective=print)
