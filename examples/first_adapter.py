"""First adapter in a minute: a sentence encoder that finds a library's functions from a description.

    python examples/first_adapter.py [--quick]

The texts are docstrings of the libraries that are installed. It trains on numpy, scipy, torch and transformers and is
tested on scikit-learn.
"""

# %%
import sys

from bioadapt import BioConfig
from bioadapt.evaluation import load_task
from bioadapt.evaluation.training import Schedule, fit, load_encoder, trainable_parameters

quick = "--quick" in sys.argv

# %%
task, encoder = load_task("api-search", limit=20 if quick else 300), load_encoder()
before = task.evaluate(encoder).scores["mrr@10"]
encoder.add_adapter(BioConfig("lateral_inhibition"))
print(f"trained: {trainable_parameters(encoder):,} of {sum(p.numel() for p in encoder.parameters()):,} numbers")
fit(encoder, task, Schedule(epochs=1 if quick else 2, learning_rate=4e-3, batch_size=20 if quick else 32))
after = task.evaluate(encoder).scores["mrr@10"]
print(f"MRR@10 on scikit-learn: {before:.1f} -> {after:.1f}")
scores = {"before": before, "after": after}
