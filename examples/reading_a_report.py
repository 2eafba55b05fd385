"""A search on a small objective, and what each part of its report says.

    python examples/reading_a_report.py [--quick]

The objective: which of four libraries does a description come from, by the lower two blocks of MiniLM? The report is
one HTML file; here its parts are read one after the other, and the winner is scored on rows that no trial has seen.
``--quick`` runs two trials.
"""

# %%
import sys
import tempfile
from pathlib import Path

import optuna
import torch
from _descriptions import descriptions
from transformers import AutoModel, AutoTokenizer

from bioadapt.evaluation.training import model_path
from bioadapt.search import ThompsonSampler, as_record, open_storage, search

quick = "--quick" in sys.argv
LIBRARIES = ("numpy", "scipy", "torch", "sklearn")


# %%
def two_blocks():
    model = AutoModel.from_pretrained(model_path())
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:2], 2
    return model


# %%
def objective_of(count: int, steps: int):
    """The rows of each library in turn train, score the trials, and stay fresh."""
    texts = [(text, number) for number, name in enumerate(LIBRARIES) for _, text in descriptions(name, count)[:count]]
    labels = torch.tensor([number for _, number in texts])
    given = dict(padding=True, truncation=True, max_length=48, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(model_path())([text for text, _ in texts], **given)
    part = torch.arange(len(labels)) % 3

    def features(model, chosen):
        inputs = {name: value[chosen] for name, value in tokens.items()}
        mask = inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    def logits(known, asked):
        """Cosines to the mean of each library's training rows."""
        means = torch.stack([known[labels[part == 0] == number].mean(0) for number in range(len(LIBRARIES))])
        return 10 * asked @ torch.nn.functional.normalize(means, dim=-1).T

    @torch.no_grad()
    def score(model, rows=1):
        model.eval()
        found = logits(features(model, part == 0), features(model, part == rows)).argmax(1)
        return 100 * (found == labels[part == rows]).float().mean().item()

    def train_and_score(model, learning_rate, report):
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:  # one trial may have no adapter
            return score(model)
        optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0)
        for step in range(1, steps + 1):
            model.train()
            known = features(model, part == 0)
            torch.nn.functional.cross_entropy(logits(known, known), labels[part == 0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 4 == 0:
                report(step, score(model))
        return score(model)

    return train_and_score, score


# %%
torch.manual_seed(0)
objective, score = objective_of(6 if quick else 120, 2 if quick else 12)
model = two_blocks()
if __name__ == "__main__":  # trials have processes of their own, which read a script again, though not a notebook
    folder = tempfile.TemporaryDirectory()
    settings = dict(trials=2, slots=1, primitives=("lateral_inhibition",)) if quick else dict(trials=24, slots=2)
    best = search(objective=objective, model=model, study="libraries", output=folder.name, **settings)
    storage = f"{folder.name}/study.journal"
    record = as_record("libraries", storage)  # what the page shows, as plain data

    # "The trials": how many have ended, and how. A pruned one was stopped because it could hardly become the best.
    ended = [trial["state"] for trial in record["trials"]]
    print("The trials:", {state: ended.count(state) for state in sorted(set(ended))})

    # Beside the scores: what the model of all trials expects. The best of many scores was lucky, too.
    study = optuna.load_study(study_name="libraries", storage=open_storage(storage))
    sampler = ThompsonSampler()
    expected = sampler.expected(study)
    for trial in sorted(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)), key=lambda t: -t.value)[:3]:
        mean, sd = expected.get(trial.number, (trial.value, float("nan")))
        print(f"Trial {trial.number}: scored {trial.value:.1f}, expected {mean:.1f} ± {sd:.1f}")

    # "Which mechanisms help", "Which work together": an interval that includes zero leaves the question open.
    for effect in sampler.effects(study)[:5]:
        print(f"{effect.name}: {effect.mean:+.2f} ± {2 * effect.sd:.2f}, seen in {effect.support} trials")

    # "The winner, to copy": a script. Its score on rows that no trial was scored by is the one to believe.
    script = record["best"]["script"]
    winner = {"objective": objective, "model": two_blocks()}
    exec(script, winner)
    scores = {
        "before": score(model),
        "winner, as reported": best["score"],
        "winner, expected": expected.get(best["number"], (best["score"],))[0],
        "before, fresh rows": score(model, 2),
        "winner, fresh rows": score(winner["adapted"], 2),
    }
    page = Path(best["report"])
    print(f"The report has {page.stat().st_size // 1000} kB: open {page.name} in a browser.")
    folder.cleanup()
    print("accuracy, %:", ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))
