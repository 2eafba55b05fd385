"""A bio adapter over a LoRA that is there already: trained by itself, saved by itself, loaded over it again.

    python examples/over_a_lora.py [--quick]

The task is that of first_adapter.py. The LoRA is trained first and then frozen, as one that is loaded from a file would
be. That the stack scores higher than the LoRA says little by itself: it has more numbers and more training. `bioadapt
evaluate` compares at equal size.
"""

# %%
import sys
import tempfile
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from bioadapt import BioConfig, catalogue
from bioadapt.evaluation import load_task
from bioadapt.evaluation.training import Schedule, adapt, fit, load_adapted, load_encoder

quick = "--quick" in sys.argv

# %%
task, encoder = load_task("api-search", limit=20 if quick else 300), load_encoder()
schedule = Schedule(epochs=1 if quick else 2, learning_rate=2e-3, batch_size=20 if quick else 32)
scores = {"zero-shot": task.evaluate(encoder).scores["mrr@10"]}

lora = adapt(encoder, lambda model: get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"])))
fit(encoder, task, schedule)
scores["LoRA"] = task.evaluate(encoder).scores["mrr@10"]

lora.requires_grad_(False)
bio = BioConfig(["lateral_inhibition", catalogue.predictive_coding(rank=4)])
stack: PeftModel = adapt(encoder, lambda model: get_peft_model(model, bio))
fit(encoder, task, schedule)
scores["LoRA + bio"] = task.evaluate(encoder).scores["mrr@10"]

with tempfile.TemporaryDirectory() as folder:
    lora.save_pretrained(f"{folder}/lora")
    stack.save_pretrained(f"{folder}/bio")
    for name in ("lora", "bio"):
        size = sum(path.stat().st_size for path in Path(folder, name).glob("*.safetensors"))
        print(f"{name}: {size / 1024:.0f} kB")
    again = load_adapted(load_encoder(), [f"{folder}/lora", f"{folder}/bio"])
scores["the same, loaded"] = task.evaluate(again).scores["mrr@10"]
for name, score in scores.items():
    print(f"{name}: MRR@10 {score:.1f}")
