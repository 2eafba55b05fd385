"""A search for the adapter that makes a number of your own high, on a model of your own.

    python examples/own_objective.py [--quick]

The number here: how well MiniLM's features tell which of scipy's subpackages a sentence comes from, by cosine to the
mean of each class. ``--quick`` trains one adapter without the search.
"""

# %%
import sys
from collections import defaultdict

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from bioadapt import BioConfig
from bioadapt.evaluation.tasks.api_search import quiet, read_library
from bioadapt.evaluation.training import model_path
from bioadapt.search import search

quick = "--quick" in sys.argv

# %%
CLASSES = ("linalg", "optimize", "signal", "stats")


def rows(count: int) -> tuple[list[str], torch.Tensor]:
    """As many sentences of each class, and their class's number."""
    texts = defaultdict(list)
    with quiet():
        for entry in read_library("scipy"):
            if entry.sentence:
                texts[entry.name.split(".")[1]].append(entry.sentence)
    chosen = [(text, number) for number, name in enumerate(CLASSES) for text in texts[name][:count]]
    return [text for text, _ in chosen], torch.tensor([number for _, number in chosen])


def objective_of(count: int, steps: int):
    texts, labels = rows(count)
    tokens = AutoTokenizer.from_pretrained(model_path())(texts, padding=True, return_tensors="pt")
    held_out = torch.arange(len(labels)) % 2 == 1

    def logits(model, chosen):
        """Cosines of the sentences to the mean of each class of the training rows among them."""
        inputs = {name: value[chosen] for name, value in tokens.items()}
        mask = inputs["attention_mask"][..., None]
        hidden = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        hidden = torch.nn.functional.normalize(hidden, dim=-1)
        own = labels[chosen]
        known = ~held_out[chosen]
        means = torch.stack([hidden[(own == number) & known].mean(0) for number in range(len(CLASSES))])
        return 10 * hidden @ torch.nn.functional.normalize(means, dim=-1).T

    def score(model):
        model.eval()
        with torch.no_grad():
            found = logits(model, torch.ones_like(held_out)).argmax(1)
        return 100 * (found == labels)[held_out].float().mean().item()

    def train_and_score(model, learning_rate, report):
        """What the search calls for every trial; everything but the adapter is frozen."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:  # one trial may have no adapter
            return score(model)
        optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0)
        for step in range(1, steps + 1):
            model.train()
            torch.nn.functional.cross_entropy(logits(model, ~held_out), labels[~held_out]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                report(step, score(model))  # lets a bad trial be stopped
        return score(model)

    return train_and_score, score


# %%
torch.manual_seed(0)
train_and_score, score = objective_of(4 if quick else 40, 2 if quick else 15)
model = AutoModel.from_pretrained(model_path())
if __name__ == "__main__":  # trials have processes of their own, which read a script again, though not a notebook
    scores = {"before": score(model)}
    if quick:
        adapted = get_peft_model(model, BioConfig("lateral_inhibition"))
        scores["after"] = train_and_score(adapted, 4e-3, lambda step, value: None)
    else:
        best = search(objective=train_and_score, model=model, trials=6, slots=2, output="own_objective_output")
        print("configuration:", best["configs"], "rate:", best["learning_rate"], "report:", best["report"])
        scores["after"] = best["score"]
    print(f"accuracy on held-out sentences, %: {scores['before']:.1f} -> {scores['after']:.1f} (the best by it)")
