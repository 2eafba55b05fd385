"""Build the wheel, install it into empty environments, and use it there: ``make test-wheel``.

One environment has no extra; each other one has a single extra. Without an extra, what needs it is refused by its name.
Names of extras as arguments check these alone; ``none`` is the one without.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PLAIN = """
import tempfile
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel
from bioadapt import BioConfig, list_primitives
tiny = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
torch.manual_seed(0)
base, tokens = BertModel(tiny).eval(), torch.arange(12).view(2, 6)
plain = base(tokens).last_hidden_state
model = get_peft_model(base, BioConfig("lateral_inhibition", init_weights=False)).eval()
changed = model(tokens).last_hidden_state
assert not torch.equal(plain, changed) and len(list_primitives()) > 60
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(model.unload(), folder).eval()
assert torch.equal(again(tokens).last_hidden_state, changed)
"""
# What shows that an extra brings what it is for.
USES = {
    "search": """
import tempfile
import torch
from transformers import BertConfig, BertModel
from bioadapt.search import search
tiny = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
def objective(model, learning_rate, report):
    return float(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = search(objective=objective, model=BertModel(tiny), trials=2, slots=1, budget_params=5000, output=folder)
    assert found["score"] <= 5000
""",
    "cluster": """
from bioadapt.search import open_storage
for address in ("postgresql://me:word@127.0.0.1:9/none", "mysql://me:word@127.0.0.1:9/none"):
    try:
        open_storage(address)
    except OSError as error:
        assert "word" not in str(error)
    else:
        raise AssertionError(address)
""",
    "circuits": """
import numpy as np
from bioadapt.circuits import FlyCLClassifier
x = np.random.default_rng(0).normal(size=(60, 20))
y = np.arange(60) % 3
x[np.arange(60), y] += 5
assert FlyCLClassifier(expand_dim=200).fit(x, y).score(x, y) > 0.9
""",
    "rl": """
from stable_baselines3 import PPO
from bioadapt.circuits import CerebellarExpansion, cerebellar_policy
""",
    "testing": """
import pytest
import bioadapt.testing
""",
    "st": """
from sentence_transformers import SentenceTransformer
import bioadapt
""",
    "demo": """
from bioadapt import BioConfig
from bioadapt.evaluation import load_task
from bioadapt.evaluation.training import Schedule, fit, load_encoder
task, encoder = load_task("api-search", limit=20), load_encoder(device="cpu")
encoder.add_adapter(BioConfig("lateral_inhibition"))
fit(encoder, task, Schedule(epochs=1, learning_rate=1e-3, batch_size=20))
assert 0 < task.evaluate(encoder).scores["mrr@10"] <= 100
""",
}
# What is refused without an extra, which the message has to name.
REFUSED = {
    "search": "import bioadapt.search; bioadapt.search.search",
    "circuits": "from bioadapt.circuits import FlyCLClassifier",
    "demo": "from bioadapt.evaluation.training import load_encoder; load_encoder()",
}


def check(extra: str, wheel: Path, folder: Path) -> None:
    """One environment.

    Raises:
        RuntimeError: something does not run there, or is not refused.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wanted = str(wheel) if extra == "none" else f"{wheel}[{extra}]"
    _run([python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted])
    _run([python, "-m", "bioadapt", "--version"])
    _run([python, "-m", "bioadapt", "list", "--stage", "memory"])
    _run([python, "-c", PLAIN])
    script = folder / "use.py"
    script.write_text(USES.get(extra, ""), encoding="utf-8")
    _run([python, script])
    for other, code in REFUSED.items() if extra == "none" else ():
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder)
        if done.returncode == 0 or f"pip install bioadapt[{other}]" not in done.stderr:
            raise RuntimeError(f"without the extra {other}: {code!r} does not name it:\n{done.stderr}")


def _run(words: list[object]) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))[:200]}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", made, ROOT])
        (wheel,) = Path(made).glob("*.whl")
        for extra in sys.argv[1:] or ("none", *USES):
            with tempfile.TemporaryDirectory() as folder:
                check(extra, wheel, Path(folder))
            print(f"{wheel.name}, {'without extras' if extra == 'none' else extra}: works", flush=True)
