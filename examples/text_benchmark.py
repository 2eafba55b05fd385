"""An adapted sentence encoder, saved, loaded, and scored by MTEB on a task of one's own.

    python examples/text_benchmark.py [--quick]

It needs ``pip install mteb``. Two sentences from scipy's docstrings are alike if they come from the same subpackage.
MTEB knows nothing of bioadapt: the encoder is an ordinary `SentenceTransformer` with an adapter in it.
"""

# %%
import random
import sys
import tempfile

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from bioadapt import BioConfig
from bioadapt.evaluation import StsTask
from bioadapt.evaluation.tasks.api_search import quiet, read_library
from bioadapt.evaluation.training import Schedule, fit, load_encoder

quick = "--quick" in sys.argv

# %%
with quiet():
    texts = [(entry.name.split(".")[1], entry.sentence) for entry in read_library("scipy") if entry.sentence]
draw = random.Random(0)
draw.shuffle(texts)
half = len(texts) // 2


def pairs(part: list[tuple[str, str]], count: int) -> dict[str, list]:
    """As many pairs of one subpackage as of two."""
    drawn = []
    while len(drawn) < count:
        first, second = draw.sample(part, 2)
        if (first[0] == second[0]) == (len(drawn) % 2 == 0):
            drawn.append((first[1], second[1], float(first[0] == second[0])))
    return dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*drawn, strict=True)), strict=True))


rows = {"train": pairs(texts[:half], 24 if quick else 1000), "test": pairs(texts[half:], 24 if quick else 500)}


# %%
class SameSubpackage(AbsTaskSTS):
    """The test rows as MTEB has its tasks."""

    metadata = TaskMetadata(
        name="SameSubpackage",
        description="Whether two sentences of scipy's docstrings come from the same subpackage.",
        dataset={"path": "bioadapt/same-subpackage", "revision": "1"},  # never loaded: the rows are at hand
        type="STS",
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )
    min_score, max_score = 0, 1

    def load_data(self, *arguments, **more) -> None:
        self.dataset = DatasetDict(test=Dataset.from_dict(rows["test"]))
        self.data_loaded = True


# %%
task, encoder = StsTask("same-subpackage", rows), load_encoder(device="cpu")
scores = {"before": task.evaluate(encoder).scores["spearman"]}
encoder.add_adapter(BioConfig(["lateral_inhibition", "predictive_coding"]))
fit(encoder, task, Schedule(epochs=1, learning_rate=2e-3, batch_size=12 if quick else 32))
scores["by bioadapt"] = task.evaluate(encoder).scores["spearman"]
with tempfile.TemporaryDirectory() as folder:
    encoder.save_pretrained(folder)
    again = SentenceTransformer(folder, device="cpu")
found = mteb.evaluate(again, SameSubpackage(), cache=None, co2_tracker=False, show_progress_bar=False)
scores["by the tool"] = 100 * found.task_results[0].scores["test"][0]["cosine_spearman"]
for name, score in scores.items():
    print(f"{name}: Spearman correlation {score:.2f}")
