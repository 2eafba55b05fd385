"""An adapted language model, scored by lm-evaluation-harness, which knows nothing of bioadapt.

    python examples/lm_harness.py [--quick]

It needs ``pip install "lm-eval[hf]"``. The task lies in a folder: which of four libraries does a function belong to?
``bioadapt run lm_eval ...`` starts the tool with the method registered; what it finds is compared with bioadapt's own
score of the same questions.
"""

# %%
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from _descriptions import descriptions, small_language_model
from peft import get_peft_model

from bioadapt import BioConfig
from bioadapt.evaluation import MultipleChoiceTask
from bioadapt.evaluation.models import LanguageModel
from bioadapt.evaluation.training import Schedule, fit

quick = "--quick" in sys.argv

# %%
libraries = ["numpy", "scipy", "sklearn", "torch"]
rows = [
    {"context": f"{name}: {sentence} This is from", "choices": libraries, "label": label}
    for label, library in enumerate(libraries)
    for name, sentence in descriptions(library, 12 if quick else 100)
]
random.Random(0).shuffle(rows)
columns = ("context", "choices", "label")
task = MultipleChoiceTask(
    "which_library",
    {
        split: {column: [row[column] for row in part] for column in columns}
        for split, part in {"train": rows[::2], "test": rows[1::2]}.items()
    },
)

# %%
language = small_language_model(quick)
scores = {"before": task.evaluate(language).scores["accuracy"]}
folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
language.model.save_pretrained(here / "base")
language.tokenizer.save_pretrained(here / "base")
model = get_peft_model(language.model, BioConfig(["divisive_normalization", "lateral_inhibition"]))
adapted = LanguageModel(model, language.tokenizer)
fit(adapted, task, Schedule(epochs=1 if quick else 3, learning_rate=2e-3, batch_size=8))
model.save_pretrained(here / "adapter")
scores["by bioadapt"] = task.evaluate(adapted).scores["accuracy"]

# %%
begin = language.tokenizer.bos_token or language.tokenizer.eos_token or ""  # the tool does not put it before a text
recipe = {
    "task": "which_library",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(here / "test.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": begin + "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}
(here / "which_library.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML, too
(here / "test.jsonl").write_text("\n".join(map(json.dumps, rows[1::2])), encoding="utf-8")
words = f"""lm_eval --model hf --model_args pretrained={here}/base,peft={here}/adapter,dtype=float32
    --tasks which_library --include_path {here} --device cpu --batch_size 16 --output_path {here}/results"""
surroundings = {**os.environ, "HF_DATASETS_CACHE": str(here / "cache"), "HF_HUB_OFFLINE": "1"}
done = subprocess.run(
    [sys.executable, "-m", "bioadapt", "run", *words.split()], env=surroundings, capture_output=True, text=True
)
if done.returncode:
    raise RuntimeError(done.stderr)
(results,) = (here / "results").rglob("results*.json")
found = json.loads(results.read_text(encoding="utf-8"))["results"]["which_library"]
scores["by the tool"] = 100 * found["acc,none"]
folder.cleanup()
for name, score in scores.items():
    print(f"{name}: {score:.1f} % of the functions are put into their library")
