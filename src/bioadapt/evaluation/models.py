"""Models of images and causal language models, and small ones of both that are made from a configuration.

No weights of small vision or language models come with a package, so these are trained here first: a `small-vit` or a
`small-convnet` to tell by how much an image was turned, a `small-lm` to foresee texts. Labels take no part in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    ConvNextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    ViTConfig,
)

from .._extras import require
from .tasks.images import ImageTask, as_pixels
from .tasks.language import padded
from .tasks.task import IMAGES, LANGUAGE, SENTENCES, Task
from .training import DEFAULT_MODEL, load_encoder, without_progress_bars

SMALL_VIT, SMALL_CONVNET, SMALL_LM = "small-vit", "small-convnet", "small-lm"
SMALL = {SMALL_VIT: IMAGES, SMALL_CONVNET: IMAGES, SMALL_LM: LANGUAGE}
NICKNAMES = {"minilm": DEFAULT_MODEL}

_TURNS = 4
_IMAGE_STEPS, _TEXT_STEPS = 600, 1500
_IMAGE_BATCH, _TEXT_BATCH = 64, 16
_PRETRAINING_RATE = 1e-3
_VOCABULARY, _LENGTH = 4000, 128
_END = "<|end|>"


@dataclass
class ImageModel:
    """A vision model and what it reads.

    Attributes:
        model: of transformers, for image classification; its own head is not used.
    """

    model: Any

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model beneath all adapters."""
        return next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def channels(self) -> int:
        return self.plain.config.num_channels

    @property
    def size(self) -> int:
        size = self.plain.config.image_size
        return size if isinstance(size, int) else size[0]

    def features(self, pixels: Tensor) -> Tensor:
        """What the model's own head reads, (n, d); gradients pass."""
        seen: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = head_of(self.plain).register_forward_pre_hook(look)
        try:
            self.model(pixel_values=pixels)
        finally:
            handle.remove()
        return seen[-1].flatten(1)

    def with_head(self, classes: int) -> nn.Module:
        """A module that trains the model with a fresh head; its forward returns a loss."""
        return _WithHead(self, classes)


class _WithHead(nn.Module):
    def __init__(self, images: ImageModel, classes: int) -> None:
        super().__init__()
        self.model = images.model  # so that its parameters are trained
        self._images = (images,)
        self.head = nn.Linear(head_of(images.plain).in_features, classes).to(images.device)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self._images[0].features(pixel_values)), labels)}


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer of an image classifier.

    Raises:
        ValueError: it has none.
    """
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"(^|\.)(classifier|head|fc)(\.|$)", name)
    ]
    if not linear:
        raise ValueError(
            f"no head was found in a {type(model).__name__}; an image classifier of transformers is needed"
        )
    return linear[-1]


@dataclass
class LanguageModel:
    """A causal language model and its tokenizer; ``length`` is the most tokens of a text that are read."""

    model: Any
    tokenizer: Any
    length: int = _LENGTH

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tokens(self, text: str, start: bool = True) -> list[int]:
        """Token ids of a text, cut at ``length``, behind the token that starts texts if ``start``."""
        ids = self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=self.length - 1)["input_ids"]
        first = self.tokenizer.bos_token_id
        if first is None:
            first = self.tokenizer.eos_token_id
        return [first, *ids] if start and first is not None else list(ids)


def load_model(
    name: str, task: Task, device: str | None = None, folder: str | Path | None = None, *, steps: int | None = None
) -> Any:
    """The model that a task is for: a sentence encoder, an `ImageModel` or a `LanguageModel`.

    Args:
        name: ``minilm``, a name on the hub, a folder, a ``config.json`` of a vision model or of a causal language
            model, or one of ``small-vit``, ``small-convnet`` and ``small-lm``. What has no weights is trained on the
            task's unlabelled rows first.
        task: says which kind of model it reads.
        device: where to put it; the fastest there is if None.
        folder: where small models are kept once they are trained.
        steps: for how many steps a small model is trained; for long enough, if None.

    Raises:
        ValueError: no such model, or one that the task is not for.
    """
    name = NICKNAMES.get(name, name)
    if not fits(name, task):
        raise ValueError(f"model {name!r} is {kind_of(name)}, task {task.name!r} is for {task.reads}")
    if task.reads == SENTENCES:
        return load_encoder(name, device)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name in SMALL or Path(name).suffix == ".json":
        path: str | Path = _made(name, task, Path(folder or "small_models"), place, steps)
    else:
        path = name
    try:
        with without_progress_bars():
            if task.reads == IMAGES:
                return ImageModel(AutoModelForImageClassification.from_pretrained(path).float().to(place).eval())
            model = AutoModelForCausalLM.from_pretrained(path).float().to(place).eval()
            return LanguageModel(model, AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def kind_of(name: str) -> str | None:
    """What kind of model a name or path is, None if nothing says it."""
    if name in SMALL:
        return SMALL[name]
    if NICKNAMES.get(name, name) == DEFAULT_MODEL or Path(name, "modules.json").is_file():
        return SENTENCES
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    if type(config) in AutoModelForImageClassification._model_mapping:
        return IMAGES
    if Path(name).suffix == ".json":
        return LANGUAGE
    causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
    return LANGUAGE if causal else SENTENCES


def fits(name: str, task: Task) -> bool:
    """Whether a model can be evaluated on a task; sentences can be read by any model of text."""
    kind = kind_of(name)
    if kind is None or task.reads == kind:
        return True
    return task.reads == SENTENCES and kind == LANGUAGE and name not in SMALL


# -- small models --


def _made(name: str, task: Task, folder: Path, device: torch.device, steps: int | None) -> Path:
    """The folder of a small model, which is trained if it is not there yet."""
    kind = name if name in SMALL else Path(name).parent.name or "config"
    trained = "" if steps is None else f"-{steps}"
    path = folder / f"{kind}-{task.fingerprint('train')[:12]}{trained}"
    if not (path / "config.json").is_file():
        with without_progress_bars():
            if task.reads == IMAGES:
                _vision_model(name, task, path, device, steps or _IMAGE_STEPS)
            else:
                _language_model(name, task, path, device, steps or _TEXT_STEPS)
    return path


def _vision_model(name: str, task: Task, path: Path, device: torch.device, steps: int) -> None:
    assert isinstance(task, ImageTask)
    images = task.rows("train")["images"]
    size, channels = images[0].shape[0], 1 if images[0].ndim == 2 else images[0].shape[-1]
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(_vision_config(name, size, channels)).to(device)
    pixels, draw = as_pixels(images, model.config.num_channels, size), torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        chosen = torch.randint(len(pixels), (_IMAGE_BATCH,), generator=draw)
        turns = torch.randint(_TURNS, (_IMAGE_BATCH,), generator=draw)
        turned = torch.stack([p.rot90(int(t), (1, 2)) for p, t in zip(pixels[chosen], turns, strict=True)])
        return model(pixel_values=turned.to(device), labels=turns.to(device)).loss

    _optimise(model, batch, steps)
    model.save_pretrained(path)


def _vision_config(name: str, size: int, channels: int) -> Any:
    if Path(name).suffix == ".json":
        config = AutoConfig.from_pretrained(name)
        config.num_labels = _TURNS
        return config
    if name == SMALL_VIT:
        patch = max(2, size // 8)
        return ViTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=size,
            patch_size=patch, num_channels=channels, num_labels=_TURNS,
        )  # fmt: skip
    config = ConvNextConfig(
        num_channels=channels, patch_size=max(1, size // 16), hidden_sizes=[32, 64, 128], depths=[2, 2, 2],
        num_stages=3, image_size=size, num_labels=_TURNS,
    )  # fmt: skip
    return config


def _language_model(name: str, task: Task, path: Path, device: torch.device, steps: int) -> None:
    texts = task.texts("train")
    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    config = _language_config(name, tokenizer)
    model = AutoModelForCausalLM.from_config(config).to(device)
    language, draw = LanguageModel(model, tokenizer), torch.Generator().manual_seed(0)
    sequences = [ids for ids in map(language.tokens, texts) if len(ids) > 1]

    def batch() -> Tensor:
        chosen = torch.randint(len(sequences), (_TEXT_BATCH,), generator=draw).tolist()
        part = padded([(sequences[place], sequences[place]) for place in chosen])
        return model(**{key: values.to(device) for key, values in part.items()}).loss

    _optimise(model, batch, steps)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _language_config(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if Path(name).suffix == ".json":
        config = AutoConfig.from_pretrained(name)
        config.update({"vocab_size": len(tokenizer), "pad_token_id": None, **special})
        return config
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4 * _LENGTH, tie_word_embeddings=True, **special,
    )  # fmt: skip


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    library = require("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)


def _optimise(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PRETRAINING_RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
    model.eval()
