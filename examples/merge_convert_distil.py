"""Ways to serve an adapter without bioadapt: merged into the weights, as a converted or a distilled LoRA, as ONNX.

    python examples/merge_convert_distil.py [--quick]

The adapters are as after a training (``init_weights=False``). Metaplasticity changes the weight by a matrix of low
rank: merged, and as a LoRA of that rank, it is the same function. FlyLoRA's units compete, so no weight does the same:
a LoRA is fitted to what it does on real texts, and what it misses is measured on texts that it was not fitted to. As
ONNX any mechanism can be had, with batches and texts of any length; it needs onnx, onnxscript and onnxruntime.
"""

# %%
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModel, AutoTokenizer

from bioadapt import BioConfig, catalogue, distill_to_lora
from bioadapt.evaluation.tasks.api_search import read_library
from bioadapt.evaluation.training import model_path

quick = "--quick" in sys.argv

# %%
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_path())
texts = [entry.sentence for entry in read_library("networkx") if entry.sentence][: 80 if quick else 320]
batches = [dict(tokenizer(texts[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, len(texts), 8)]


def adapted(entry: dict) -> PeftModel:
    config = BioConfig([entry], layers_to_transform=[5], target_modules=["output.dense"], init_weights=False)
    return get_peft_model(AutoModel.from_pretrained(model_path()), config).eval()


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    return model(**batches[0]).last_hidden_state


# %%
scores = {}
model = adapted(catalogue.metaplasticity(rank=8))
expected, plain = output(model), output(AutoModel.from_pretrained(model_path()).eval())
size = (expected - plain).norm()
with tempfile.TemporaryDirectory() as folder:
    save_as_lora(folder, model, rank=8)
    lora = PeftModel.from_pretrained(AutoModel.from_pretrained(model_path()), folder).eval()
scores["converted"] = ((output(lora) - expected).norm() / size).item()
scores["merged"] = ((output(model.merge_and_unload()) - expected).norm() / size).item()

distilled = distill_to_lora(adapted(catalogue.fly_lora(r=16, k=8)), batches, rank=16)
scores["distilled"] = max(distilled.residuals.values())
with tempfile.TemporaryDirectory() as folder:
    distilled.save_pretrained(folder)
    print("an ordinary LoRA checkpoint:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))

# %%
if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
    import onnxruntime

    model = adapted(catalogue.fly_lora(r=16, k=8))
    expected = output(model)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=512)}
    shown = dict(tokenizer(["A graph of two nodes.", "A tree."], padding=True, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(
            model.get_base_model(), (), f"{folder}/model.onnx", kwargs=shown, dynamo=True, verbose=False,
            dynamic_shapes=dict.fromkeys(shown, sizes),
        )  # fmt: skip
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
        # Another number of texts than the export was shown, and longer ones.
        found = session.run(None, {name: values.numpy() for name, values in batches[0].items()})[0]
    scores["as ONNX"] = ((torch.from_numpy(found) - expected).norm() / (expected - plain).norm()).item()

# %%
for name, missed in scores.items():
    print(f"{name}: misses {missed:.2%} of what the adapter does")
