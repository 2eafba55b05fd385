"""What the user asked for, validated once."""

from __future__ import annotations

import functools
import html
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from peft.config import PeftConfig
from peft.utils import PeftType, TaskType

from ._values import as_flag, as_integer, as_names, as_plain
from ._version import __version__
from ._words import suggest
from .checkpoint import check_trained_over, complete_saving, write_configuration
from .record import family_of
from .record import suggest as ranked
from .registry import primitive_info

Composition = Literal["staged", "serial", "parallel"]
COMPOSITIONS = get_args(Composition)

# Fields that users of other methods or of trainers may look for in a BioConfig, and where to find them instead.
_SCALE = "how fast a primitive learns is its setting zero_scale, and fly_lora has an alpha of its own"
_RATE = (
    "it belongs to the optimiser, such as TrainingArguments(learning_rate=...); what trains a LoRA trains this as well"
)
_DROPOUT = "no primitive shares one; fly_lora has a setting of that name"
ELSEWHERE = {
    "r": "the size of the population that primitives run on is called rank; fly_lora and neuro_lora have a setting r",
    "lora_alpha": _SCALE,
    "alpha": _SCALE,
    "use_rslora": _SCALE,
    "learning_rate": _RATE,
    "lr": _RATE,
    "lora_dropout": _DROPOUT,
    "dropout": _DROPOUT,
    "bias": "biases of the base stay frozen; name modules that are to be trained in full in modules_to_save",
    "primitive": "it is called primitives, and is the first argument: a name, or a list of names",
    "layers": "it is called layers_to_transform",
    "target_parameters": (
        "a primitive runs on what a module reads or writes, and experts fused into one parameter are no modules: put a "
        "LoRA with target_parameters on the experts, and the bio adapter over it on other modules in target_modules"
    ),
    "ensure_weight_tying": (
        "two modules with one weight each get an adapter of their own; name only one of them in target_modules, or "
        "load the model with tie_word_embeddings=False"
    ),
    "trainable_token_indices": (
        "give it to a LoraConfig or a TrainableTokensConfig, and put the bio adapter over that model"
    ),
}

C = TypeVar("C", bound=type)


def _named_unknown_fields(cls: C) -> C:
    """Say which field is unknown and what was meant, for typing errors and for files of a newer version alike.

    PEFT drops the fields it does not know with a warning, which can turn a saved adapter into another function.
    """
    generated: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [spec.name for spec in fields(cls)]
        unknown = {name: value for name, value in kwargs.items() if name not in known and value not in (None, [], {})}
        if unknown:
            name, value = next(iter(unknown.items()))
            hint = ELSEWHERE.get(name) or (
                f"{suggest(name, known)} If it comes from a saved file, that file was written by a newer version: "
                "upgrade bioadapt or peft."
            )
            raise TypeError(f"{cls.__name__} has no field {name!r} (got {value!r}); {hint}")
        generated(self, *args, **{name: value for name, value in kwargs.items() if name in known})

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_named_unknown_fields
@dataclass(kw_only=True, repr=False)
class BioConfig(PeftConfig):
    """Configuration of a bio adapter.

    Args:
        primitives: a registry name, or an ordered list of names, ``{"name": ..., **settings}`` or
            ``catalogue.name(**settings)``; the one argument that may be given by position. After construction every
            entry is a dict with all settings, so a saved file does not change its meaning with a later version's
            defaults.
        target_modules: names (suffixes), a regular expression, ``"all-linear"``, or None for the sites that suit the
            primitives on a known model type: for gains alone the keys, the values and the hidden units of the
            feed-forward block, otherwise the projections that write into the residual stream.
        feedforward_modules: names or a regular expression, as in PEFT's `IA3Config`: at those of the target modules the
            primitives run on the module's input instead of its output. For the last projection of a feed-forward block
            that is the population of hidden units, after their activation.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: index or indices of the layers to adapt; all if None. Needs ``target_modules`` as a list.
        layers_pattern: name of the module list that the indices count in, such as ``"layers"``.
        modules_to_save: further modules to train and save in full, such as a classification head.
        rank: None: primitives run on the target's full output. r: they run on a population of r units between a
            down- and an up-projection.
        composition: ``staged``: primitives on the weight first, then stage by stage, parallel within a stage, whatever
            the order of the list. ``serial``: on the weight first, then one after the other as listed. ``parallel``:
            all read the same features.
        init_weights: True: the fresh adapter is the identity. False: it is not, for tests.
        causal: whether time may only be read backwards; None finds out from the model. Set it for models of your own.
        batch_first: whether activations are (batch, tokens, features) or (tokens, batch, features); None finds out from
            the model. Set it for models of your own with modules that have ``batch_first=False``.
        seed: fixes the frozen random matrices.
        trained_over: written on saving: name and fingerprint of what lay underneath.
        fingerprint: written on saving: hash of the adapter's tensors, checked on loading.
        settings_fingerprint: written on saving: hash of the fields that change what the adapter computes, checked on
            loading.
        bioadapt_version: written on saving.

    Raises:
        ValueError: a wrong value; the message names the field, the value, what is accepted and the nearest match.
        TypeError: an unknown field.
    """

    primitives: Any = field(
        kw_only=False,
        default_factory=list,
        metadata={"help": "Names of primitives, or dicts of name and settings, in order."},
    )
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "The modules to adapt."})
    feedforward_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Those of the adapted modules whose input is adapted, not their output."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "The modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of adapted layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    rank: int | None = field(default=None, metadata={"help": "Size of the population, None for the full output."})
    composition: Composition = field(default="staged", metadata={"help": f"One of {', '.join(COMPOSITIONS)}."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the fresh adapter is the identity."})
    causal: bool | None = field(default=None, metadata={"help": "Whether time is read backwards only."})
    batch_first: bool | None = field(default=None, metadata={"help": "Whether the batch axis comes before time."})
    seed: int = field(default=0, metadata={"help": "Seed of the frozen random matrices."})
    trained_over: dict[str, Any] | None = field(default=None, metadata={"help": "What lay underneath; set on saving."})
    fingerprint: str | None = field(default=None, metadata={"help": "Hash of the tensors; set on saving."})
    settings_fingerprint: str | None = field(default=None, metadata={"help": "Hash of the fields; set on saving."})
    bioadapt_version: str | None = field(default=None, metadata={"help": "Version that wrote it; set on saving."})

    # PEFT's own fields once more, because they are given by position where PEFT declares them.
    task_type: str | TaskType | None = field(default=None, metadata={"help": "Task type"})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "Always BIO."})
    auto_mapping: dict[str, Any] | None = field(default=None, metadata={"help": "Class and module of the base model."})
    peft_version: str | None = field(default=None, metadata={"help": "PEFT's version; set by itself."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Name of the base model."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    inference_mode: bool = field(default=False, metadata={"help": "Whether the adapter is not trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type not in (None, "BIO"):
            raise ValueError(f"peft_type={self.peft_type!r}: {type(self).__name__} is of the type BIO and of no other")
        self.peft_type = PeftType("BIO")
        self._convert()
        self.primitives = normalise_primitives(self.primitives, self._is_scaled, self._is_from_file)
        self._check()

    @property
    def _is_scaled(self) -> bool:
        """Whether ``zero_scale``, where it is not given, is what a new primitive learns with at a LoRA's rate."""
        return not self._is_from_file and self.rank is None

    @property
    def _is_from_file(self) -> bool:
        """Whether what the configuration does not say was not yet there when it was written."""
        return self.bioadapt_version is not None

    def _convert(self) -> None:
        """Every field in Python's own types, or an error that names the field, its value and what is accepted."""
        self.seed = as_integer("seed", self.seed)
        self.init_weights = as_flag("init_weights", self.init_weights)
        self.inference_mode = as_flag("inference_mode", self.inference_mode)
        if self.causal is not None:
            self.causal = as_flag("causal", self.causal, "True, False, or None for what the model says")
        if self.batch_first is not None:
            self.batch_first = as_flag("batch_first", self.batch_first, "True, False, or None for what the model says")
        if self.rank is not None:
            self.rank = as_integer("rank", self.rank, low=1, accepted="None or an integer of at least 1")
        if self.layers_to_transform is not None:
            self.layers_to_transform = _layers(self.layers_to_transform)
        for name, form in (
            ("target_modules", set),
            ("feedforward_modules", set),
            ("exclude_modules", set),
            ("layers_pattern", list),
            ("modules_to_save", list),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, form(as_names(name, value, "None, a string or a list of names")))
        if isinstance(self.modules_to_save, str):  # PEFT would read it letter by letter
            self.modules_to_save = [self.modules_to_save]
        for name in ("base_model_name_or_path", "revision", "fingerprint", "settings_fingerprint", "bioadapt_version"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise ValueError(f"{name}={value!r}: accepted are None or a string")
            setattr(self, name, None if value is None else os.fspath(value))
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise ValueError(f"auto_mapping={self.auto_mapping!r}: accepted are None or a dict")

    def _check(self) -> None:
        if self.composition not in COMPOSITIONS:
            raise ValueError(f"composition={self.composition!r}: {suggest(self.composition, COMPOSITIONS)}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} names no module; None is for sites that suit the primitives"
            )
        for entry in self.primitives if self.rank is not None else ():
            if primitive_info(entry["name"]).kind == "weight":
                raise ValueError(
                    f"rank={self.rank}: {entry['name']!r} acts on the layer's weight and has a size of its own; "
                    "use rank=None with it"
                )
        self._check_feedforward_modules()
        check_trained_over(self.trained_over)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names, "
                f"got the expression {self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")

    def _check_feedforward_modules(self) -> None:
        given, targets = self.feedforward_modules, self.target_modules
        if given is None:
            return
        if targets is None:
            raise ValueError(f"feedforward_modules={given!r} needs target_modules, of which they are a part")
        if isinstance(given, set) and isinstance(targets, set) and not given <= targets:
            raise ValueError(
                f"feedforward_modules={sorted(given)!r}: {', '.join(map(repr, sorted(given - targets)))} is not in "
                f"target_modules={sorted(targets)!r}; list every module there, and here those whose input is adapted"
            )

    def adapts_input_of(self, path: str) -> bool:
        """Whether the primitives run on the input of the target module at ``path``."""
        given = self.feedforward_modules or ()
        if isinstance(given, str):
            return re.fullmatch(given, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in given)

    def seed_of(self, path: str) -> int:
        """The seed of a layer's frozen random matrices: another one for every layer, the same on every machine."""
        return zlib.crc32(f"{self.seed}/{path}".encode())

    def __repr__(self) -> str:
        """The call that makes this configuration, with what differs from the defaults alone."""
        (_, primitives), *rest = self._given()
        words = [repr(primitives), *(f"{name}={value!r}" for name, value in rest)]
        return f"{type(self).__name__}({', '.join(words)})"

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = (f"<tr><th>{name}</th><td>{html.escape(repr(value))}</td></tr>" for name, value in self._given())
        table = f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"
        return f"<div style='text-align: left'>{table}</div>"

    def _given(self) -> Iterator[tuple[str, Any]]:
        """The primitives, and each field that differs from its default, in order."""
        yield "primitives", [self._shortest(entry) for entry in self.primitives]
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name not in ("primitives", "peft_type", "peft_version") and value != _default(spec):
                value = sorted(value) if isinstance(value, set) else value
                yield spec.name, str(value) if isinstance(value, TaskType) else value

    def _shortest(self, entry: dict[str, Any]) -> str | dict[str, Any]:
        """The shortest entry that means the same."""
        (default,) = normalise_primitives([entry["name"]], to_scale=self._is_scaled)
        given = {word: value for word, value in entry.items() if value != default[word]}
        return {"name": entry["name"], **given} if given else entry["name"]

    @classmethod
    def recommended(cls, model: Any, task: str | None = None) -> BioConfig:
        """The mechanism that the record has furthest over a LoRA of its size, as it was measured.

        The record (`bioadapt.record`, ``bioadapt suggest``) says how far that is and how sure: where no mechanism was
        found ahead, this is the one that lost least.

        Args:
            model: what it is for. A model without a ``model_type`` gets a mechanism that reads no time, since it is not
                known there in which direction time runs.
            task: a task of the record or a family of tasks; None for what was measured of models of this kind, which
                are image models, causal language models, and encoders of sentences for all others.

        Raises:
            ValueError: nothing was measured on such a task; the nearest names are given.
        """
        typed = bool(getattr(getattr(model, "config", None), "model_type", None))
        able = (
            one
            for one in ranked(task or family_of(model), causal=True)
            if typed or primitive_info(one.primitive).kind != "causal"
        )
        best = next(able)
        return cls([{"name": best.primitive, "zero_scale": best.zero_scale}])

    def to_dict(self) -> dict[str, Any]:
        """All fields; sets as sorted lists, so that two saves of one configuration are the same file."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` whole or not at all: a save that is cut off leaves the old file."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory={save_directory!r} is a file, a folder is needed")
        self.bioadapt_version = __version__
        content = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_configuration(folder, content)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> BioConfig:
        """Load the configuration."""
        complete_saving(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _default(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _layers(value: Any) -> int | list[int]:
    """Indices of layers, which are counted from 0.

    Raises:
        ValueError: no index, a negative one, or none at all.
    """
    accepted, value = "None for all layers, an index from 0, or some of them", as_plain(value)
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return as_integer("layers_to_transform", value, low=0, accepted=accepted)
    layers = [as_integer("layers_to_transform", index, low=0, accepted=accepted) for index in value]
    if not layers:
        raise ValueError(f"layers_to_transform={value!r} names no layer; accepted is {accepted}")
    return layers


def normalise_primitives(primitives: Any, to_scale: bool = True, from_file: bool = False) -> list[dict[str, Any]]:
    """Canonical names and complete, checked settings, in the order given.

    Args:
        primitives: a name or a dict of a name and settings, or a list of them.
        to_scale: whether ``zero_scale``, where it is not given, is what a new primitive learns with at a LoRA's rate;
            otherwise it is 1.
        from_file: whether a setting that is not given has the value of the time before there was such a setting.

    Raises:
        ValueError: not a list, an unknown name or setting, a value out of range, or a primitive listed twice.
    """
    if isinstance(primitives, (str, dict)):
        primitives = [primitives]
    if not isinstance(primitives, (list, tuple)):
        raise ValueError(
            f"primitives={primitives!r}: a name, or a list of names or of dicts with a 'name' is needed, such as "
            "['lateral_inhibition']"
        )
    if not primitives:
        raise ValueError("primitives=[]: name at least one; bioadapt.list_primitives() lists them")
    entries: list[dict[str, Any]] = []
    for index, entry in enumerate(primitives):
        where = f"primitives[{index}]"
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or "name" not in given:
            raise ValueError(f"{where}={entry!r}: a name or a dict with a 'name' is needed")
        settings = {key: value for key, value in given.items() if key != "name"}
        try:
            info = primitive_info(given["name"])
            if to_scale:
                settings = {"zero_scale": info.fresh_zero_scale} | settings
            if from_file:
                declared = info.factory.declared_settings()
                settings = {key: s.before for key, s in declared.items() if s.before is not None} | settings
            settings = info.factory.check_settings(settings)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if any(info.name == other["name"] for other in entries):
            raise ValueError(f"{where}={info.name!r} is listed twice; give one entry the settings you want")
        entries.append({"name": info.name, **settings})
    return entries
