"""One model, several adapters, many threads: each request names its adapter, and gets what it would get alone.

python examples/server.py [--quick]
"""

# %%
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from bioadapt import BioConfig
from bioadapt.evaluation.training import model_path

quick = "--quick" in sys.argv

# %%
TEXTS = ["A heron waits.", "The river is high after a week of rain.", "Nobody knows why the bell rang twice.", "Go!"]

# %%
torch.manual_seed(0)
tokenizer, base = AutoTokenizer.from_pretrained(model_path()), AutoModel.from_pretrained(model_path())
# Adapters as after a training: with init_weights=False a fresh one is not the identity.
model = get_peft_model(base, BioConfig("lateral_inhibition", init_weights=False), adapter_name="calm")
model.add_adapter("quick", BioConfig("short_term_depression", init_weights=False))
model.eval()


def answer(request: tuple[str, list[str]]) -> torch.Tensor:
    text, names = request
    tokens = tokenizer([text] * len(names), return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, adapter_names=names).last_hidden_state[:, 0]


requests = [(text, names) for text in TEXTS for names in (["calm"], ["quick"], ["quick", "__base__", "calm"])]
requests *= 1 if quick else 10
alone = [answer(request) for request in requests]
started = time.perf_counter()
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(answer, requests))
seconds = time.perf_counter() - started

gap = max((a - b).abs().max().item() for a, b in zip(alone, together, strict=True))
apart = (alone[0] - alone[1]).abs().max().item()
print(f"{len(requests)} requests from 4 threads, {len(requests) / seconds:.0f} a second")
print(f"largest difference from the same request alone: {gap:.1g}; between the two adapters: {apart:.2f}")
scores = {"gap": gap, "apart": apart}
