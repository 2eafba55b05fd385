"""Image classification with a small vision transformer: trained on five digits, adapted to the other five.

    python examples/images.py [--quick]

The images are scikit-learn's. The transformer learns 0 to 4 from scratch, is frozen, and then 5 to 9 are learned by a
new head alone, by the head with gains, and by the head with a LoRA.
"""

# %%
import copy
import sys

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from bioadapt import BioConfig

quick = "--quick" in sys.argv

# %%
SHAPE = dict(image_size=8, patch_size=2, num_channels=1, num_labels=5)
SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)


def train(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, steps: int, rate: float) -> None:
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0)
    for _ in range(steps):
        rows = torch.randint(0, len(labels), (32,))
        model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()


# %%
torch.manual_seed(0)
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
old, test = labels < 5, torch.arange(len(labels)) % 4 == 0
base = ViTForImageClassification(ViTConfig(**SHAPE, **SIZES))
train(base, pixels[old & ~test], labels[old & ~test], 20 if quick else 600, 1e-3)
print(f"0 to 4, from scratch: {accuracy(base, pixels[old & test], labels[old & test]):.1f} %")

configs: dict[str, PeftConfig] = {
    "head and gains": BioConfig("divisive_normalization", modules_to_save=["classifier"]),
    "head and LoRA": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
}
scores = {}
for title in ("head alone", *configs):
    model = copy.deepcopy(base)
    nn.init.zeros_(model.classifier.weight)
    model.requires_grad_(False)
    if title in configs:
        model = get_peft_model(model, configs[title])
    else:
        model.classifier.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, pixels[~old & ~test], labels[~old & ~test] - 5, 10 if quick else 200, 5e-3)
    scores[title] = accuracy(model, pixels[~old & test], labels[~old & test] - 5)
    print(f"5 to 9, {title}: {scores[title]:.1f} % ({count:,} numbers trained)")
