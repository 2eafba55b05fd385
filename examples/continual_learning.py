"""Learning class after class without keeping data: Fly-CL on frozen MiniLM features, next to a head trained by SGD.

    python examples/continual_learning.py [--quick]

The classes are scipy's subpackages, the texts the first sentences of their docstrings: to which one does a function
belong? Two classes come at a time, and their texts are never seen again.
"""

# %%
import sys
from collections import defaultdict

import numpy as np
from sklearn.linear_model import SGDClassifier

from bioadapt.circuits import FlyCLClassifier
from bioadapt.evaluation.tasks.api_search import quiet, read_library
from bioadapt.evaluation.training import load_encoder

quick = "--quick" in sys.argv

# %%
texts = defaultdict(list)
with quiet():
    for entry in read_library("scipy"):
        if entry.sentence:
            texts[entry.name.split(".")[1]].append(entry.sentence)
names = sorted(sorted(texts, key=lambda name: -len(texts[name]))[: 4 if quick else 8])
sentences = [text for name in names for text in texts[name][: 10 if quick else 100]]
y = np.array([name for name in names for _ in texts[name][: 10 if quick else 100]])
x = load_encoder().encode(sentences, show_progress_bar=False)
test = np.arange(len(y)) % 5 == 0

heads = {
    "Fly-CL": FlyCLClassifier(expand_dim=500 if quick else 2000),
    "softmax by SGD": SGDClassifier(loss="log_loss", random_state=0),
}
scores = {}
for title, head in heads.items():
    for start in range(0, len(names), 2):
        now = ~test & np.isin(y, names[start : start + 2])
        head.partial_fit(x[now], y[now], **({} if title == "Fly-CL" else {"classes": names}))
    scores[title] = 100 * head.score(x[test], y[test])
    print(f"{title}: {scores[title]:.1f} % of all {len(names)} classes after the last two were learned")
