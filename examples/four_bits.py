"""A base in 4 bits, as QLoRA has it, with a bio adapter in full precision over it.

    python examples/four_bits.py [--quick]

The base is a small language model that has read descriptions of functions. Perplexity is that of descriptions of
scikit-learn's functions, which neither base nor adapter has seen. It needs bitsandbytes.
"""

# %%
import sys
import tempfile

import torch
from _descriptions import descriptions, small_language_model
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bioadapt import BioConfig
from bioadapt.evaluation import LanguageModellingTask
from bioadapt.evaluation.models import LanguageModel
from bioadapt.evaluation.training import Schedule, fit

quick = "--quick" in sys.argv

# %%
texts = [f"{name}: {sentence}" for name, sentence in descriptions("sklearn", 24 if quick else 200)]
task = LanguageModellingTask("sklearn", {"train": {"text": texts[::2]}, "test": {"text": texts[1::2]}})
language = small_language_model(quick)
scores = {"full precision": task.evaluate(language).scores["perplexity"]}

# %%
quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
with tempfile.TemporaryDirectory() as folder:
    language.model.save_pretrained(folder)
    # Two of them: on some CPUs bitsandbytes packs the weights of a model once it is evaluated, and trains it no more.
    scored, base = (
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu") for _ in range(2)
    )
scores["4 bits"] = task.evaluate(LanguageModel(scored, language.tokenizer)).scores["perplexity"]

# %%
base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
model = get_peft_model(base, BioConfig(["divisive_normalization", "lateral_inhibition"]))
model.print_trainable_parameters()
adapted = LanguageModel(model, language.tokenizer)
fit(adapted, task, Schedule(epochs=1 if quick else 3, learning_rate=2e-3, batch_size=8))
scores["4 bits, adapted"] = task.evaluate(adapted).scores["perplexity"]
for name, score in scores.items():
    print(f"{name}: perplexity {score:.1f}")
