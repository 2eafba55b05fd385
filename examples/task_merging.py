"""Two tasks as one adapter: a FlyLoRA for each, merged so that each keeps a competition of its own.

    python examples/task_merging.py [--quick]

Tasks: to find a function of scipy, and of networkx, from the first sentence of its docstring. Each adapter is trained
on one half of a library's sentences; scores are those of the other half. Merged by ``route`` the two are exactly
averaged.
"""

# %%
import sys

from peft import get_peft_model

from bioadapt import FlyLoraConfig
from bioadapt.evaluation import RetrievalTask
from bioadapt.evaluation.tasks.api_search import quiet, read_library
from bioadapt.evaluation.training import Schedule, adapt, fit, load_encoder

quick = "--quick" in sys.argv


# %%
def task_of(library: str, limit: int) -> RetrievalTask:
    with quiet():
        pairs = [(entry.sentence, entry.document) for entry in read_library(library) if entry.sentence][:limit]
    rows = [{"query": [q for q, _ in half], "document": [d for _, d in half]} for half in (pairs[::2], pairs[1::2])]
    return RetrievalTask(library, {"train": rows[0], "test": rows[1]})


# %%
tasks = {name: task_of(name, 24 if quick else 500) for name in ("scipy", "networkx")}
encoder, model = load_encoder(), None
scores = {f"zero-shot on {name}": task.evaluate(encoder).scores["mrr@10"] for name, task in tasks.items()}
for seed, (name, task) in enumerate(tasks.items()):
    config = FlyLoraConfig(r=16, k=4, seed=seed)
    if model is None:
        model = adapt(encoder, lambda base, name=name, c=config: get_peft_model(base, c, adapter_name=name))
    else:
        model.add_adapter(name, config)
        model.set_adapter(name)
    fit(encoder, task, Schedule(epochs=1 if quick else 2, learning_rate=2e-3, batch_size=12 if quick else 32))
    scores[f"own adapter on {name}"] = task.evaluate(encoder).scores["mrr@10"]
model.add_weighted_adapter(list(tasks), [0.5, 0.5], "both", combination_type="route")
model.set_adapter("both")
for name, task in tasks.items():
    scores[f"merged on {name}"] = task.evaluate(encoder).scores["mrr@10"]
for title, score in scores.items():
    print(f"{title}: MRR@10 {score:.1f}")
