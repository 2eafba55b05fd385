"""Loading a saved adapter as one transaction: checked in full, or the model is as before.

PEFT and transformers inject an adapter first and read its tensors afterwards, and neither has a hook around the two.
The functions here therefore stand around theirs (see `bridge`). Each takes the function in whose place it is called as
its first argument.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.utils.loading_report import LoadStateDictInfo

from ..checkpoint import (
    ROOT,
    bare,
    check_settings,
    check_tensors,
    complete_saving,
    refuse_unreadable,
    settings_fingerprint,
    weights_file,
)
from ..config import BioConfig
from . import provenance
from .model import BioModel
from .tree import bio_layers, stacked_over, undone_on_failure

ReplacedFunction = Callable[..., Any]


@dataclass
class Saved:
    """An adapter as it was saved: where, its ``adapter_config.json`` as it stands there, and what that says.

    ``uncovered`` are the names of its tensors that no fingerprint covers, once they have been read.
    """

    place: str
    hub: dict[str, Any]
    content: dict[str, Any]
    config: BioConfig
    uncovered: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, place: Any, hub: Mapping[str, Any]) -> Saved | None:
        """The bio adapter in a folder or a repository; None if there is none, or one of another method.

        Raises:
            TypeError: its configuration has an unknown field.
            ValueError: its configuration has a wrong value, or was changed since it was saved.
        """
        hub = {key: value for key, value in hub.items() if key in inspect.signature(hf_hub_download).parameters}
        folder = Path(place, hub.get("subfolder") or "")
        complete_saving(folder)
        path: Any = folder / CONFIG_NAME
        if not path.is_file():
            try:
                path = hf_hub_download(str(place), CONFIG_NAME, **hub)
            except Exception:  # the caller says so in its own words
                return None
        try:
            content = PeftConfig.from_json_file(path)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read, it may be cut off: {error}") from error
        if content.get("peft_type") != "BIO":
            return None
        config = BioConfig(**content)
        check_settings(content, str(folder))
        return cls(str(place), hub, content, config)

    def tensors(self, read: ReplacedFunction, **options: Any) -> dict[str, Tensor]:
        """The tensors, read once, and held against what the configuration says they were when they were saved."""
        folder = Path(self.place, self.hub.get("subfolder") or "")
        file: Any = weights_file(folder)
        if file is None and folder.is_dir():
            raise ValueError(f"{folder} has an {CONFIG_NAME}, but no {SAFETENSORS_WEIGHTS_NAME} beside it")
        with refuse_unreadable(file or self.place):
            found = read(self.place, **options, **self.hub)
        self.uncovered = check_tensors(found, self.content, str(file or self.place))
        return found

    def trained_along(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Adapters of other methods that lie beside this one: the record of each, and the way to it."""
        for entry in (self.config.trained_over or {}).get("adapters", ()):
            if entry.get("saved_in"):
                inner = "/".join(part for part in (self.hub.get("subfolder"), entry["saved_in"]) if part)
                yield entry, {**self.hub, "subfolder": inner}


_running: ContextVar[Saved | None] = ContextVar("_running", default=None)


@contextmanager
def _loading(saved: Saved | None) -> Iterator[None]:
    token = _running.set(saved)
    try:
        yield
    finally:
        _running.reset(token)


# -- PEFT's way --


def from_pretrained(original: ReplacedFunction, cls: type, *args: Any, **kwargs: Any) -> Any:
    """Around `PeftModel.from_pretrained`."""
    given = inspect.signature(original).bind(cls, *args, **kwargs).arguments
    saved = Saved.at(given["model_id"], given.get("kwargs", {}))
    if saved is None:
        return original(cls, *args, **kwargs)
    with _loading(saved), undone_on_failure(given["model"]):
        return original(cls, *args, **kwargs)


def load_adapter(original: ReplacedFunction, self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """Around `PeftModel.load_adapter`."""
    given = inspect.signature(original).bind(self, *args, **kwargs)
    place, name = given.arguments["model_id"], given.arguments["adapter_name"]
    saved, fresh = None, name not in self.peft_config
    if isinstance(self.base_model, BioModel):
        saved = _running.get()  # of `from_pretrained`, which has injected the adapter just now
        fresh = fresh or saved is not None
        saved = saved or Saved.at(place, given.arguments.get("kwargs", {}))
    with _loading(saved):
        if saved is None:
            return original(*given.args, **given.kwargs)
        with undone_on_failure(self):
            if not fresh:
                _check_same_function(self.peft_config[name], saved, name)
            try:
                result = original(*given.args, **given.kwargs)
            except KeyError as error:
                raise ValueError(f"the checkpoint does not fit adapter {name!r}: it lacks {error}") from error
            _settle_what_lies_below(self, saved, name, fresh)
        return result


def read_weights(original: ReplacedFunction, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Around the `load_peft_weights` that PEFT's ``load_adapter`` calls."""
    saved, given = _running.get(), inspect.signature(original).bind(*args, **kwargs).arguments
    if saved is None:
        return original(*args, **kwargs)
    found = saved.tensors(original, device=given.get("device"))
    if given.get("key_mapping"):  # it renames keys, and the fingerprint is that of the file
        return original(*args, **kwargs)
    return found


# -- transformers' way, which is also that of AutoModel, pipeline and sentence-transformers --


def load_adapter_of_transformers(original: ReplacedFunction, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Around `PeftAdapterMixin.load_adapter`: for a bio adapter, PEFT's own functions and all their checks."""
    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    saved, config = None, options["peft_config"]
    place = options["peft_model_id"] or getattr(options["load_config"], "pretrained_model_name_or_path", None)
    if (config is None or isinstance(config, BioConfig)) and place is not None and options["hotswap"] is not True:
        hub = {**getattr(options["load_config"], "download_kwargs", {}), **options.get("kwargs", {})}
        saved = Saved.at(place, hub | (options["adapter_kwargs"] or {}))
        config = saved.config if config is None and saved is not None else config
    if not isinstance(config, BioConfig):
        return original(*given.args, **given.kwargs)
    name, trainable = options["adapter_name"] or "default", options["is_trainable"]
    config.inference_mode = not trainable
    with undone_on_failure(self):
        tensors = options["adapter_state_dict"]
        if saved is not None and tensors is None:
            tensors = saved.tensors(load_peft_weights, device="cpu")
            if options["load_config"] is not None:  # the base was chosen by the configuration, so nobody else stacks
                _inject_what_trained_along(self, saved, name, trainable)
        elif tensors is None:
            raise ValueError("adapter_state_dict=None: a peft_config needs the tensors beside it")
        inject_adapter_in_model(config, self, name)
        self._hf_peft_config_loaded = True
        try:
            set_peft_model_state_dict(self, bare(tensors), name)
        except KeyError as error:
            raise ValueError(f"the checkpoint does not fit adapter {name!r}: it lacks {error}") from error
        if saved is not None:
            _settle_what_lies_below(self, saved, name, fresh=True)
    if not trainable:
        self.eval()
    return _clean_report()


def _clean_report() -> LoadStateDictInfo:
    """What transformers' own loading would report; newer versions have more fields."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(**{spec.name: empty.get(spec.name, set()) for spec in fields(LoadStateDictInfo)})


# -- onto an adapter that is there already --


def _check_same_function(live: BioConfig, saved: Saved, name: str) -> None:
    """Raise `ValueError` if tensors of a file would make another function in the adapter that is to take them."""
    for setting in ("primitives", "rank", "composition", "causal", "seed", "feedforward_modules"):
        now, then = getattr(live, setting), getattr(saved.config, setting)
        if now != then:
            raise ValueError(
                f"{saved.place} does not fit adapter {name!r}: it was saved with {setting}={then!r}, the adapter has "
                f"{setting}={now!r}. Load it under another name"
            )


# -- adapters of other methods that trained along --


def _inject_what_trained_along(model: nn.Module, saved: Saved, name: str, trainable: bool) -> None:
    """Put the adapters that the bio adapter trained over into a plain model of transformers, and make them active."""
    if getattr(model, "peft_config", None):
        return
    names: list[str] = []
    for entry, way in saved.trained_along():
        below = entry["name"]
        if below in (name, *names):
            below = f"{below}_{entry['peft_type'].lower()}"
        names.append(below)
        model.load_adapter(saved.place, below, is_trainable=trainable, adapter_kwargs=way)  # type: ignore[operator]
    if names:
        model.set_adapter(names)  # type: ignore[operator]


def _settle_what_lies_below(model: nn.Module, saved: Saved, name: str, fresh: bool) -> None:
    """Let the adapters below have the values with which the bio adapter was saved, and say where they cannot.

    A ``fresh`` adapter beside another one leaves them alone: the other was trained over the values they have now.
    """
    if saved.uncovered:
        warnings.warn(
            f"{saved.place} also holds {', '.join(saved.uncovered)} of the base, which its fingerprint does not cover "
            "and which are loaded: earlier versions wrote such files. Save it again to have them covered",
            stacklevel=5,
        )
    trained, found = saved.config.trained_over, provenance.record(model)
    alone = len({held for layer in bio_layers(model) for held in layer.circuits}) == 1
    taken = _take_values_that_trained_along(model, saved) if alone or not fresh else []
    hint = ""
    if taken and fresh:
        hint = f" The values that {', '.join(map(repr, taken))} had then lie beside it and are taken."
    elif taken:
        found = provenance.record(model)
    elif any(saved.trained_along()):
        places = ", ".join(str(Path(saved.place, way["subfolder"])) for _, way in saved.trained_along())
        hint = f" What trained along lies in {places}: load that first, and this over it."
    provenance.warn_if_changed(trained, found, name, hint)


def _take_values_that_trained_along(model: nn.Module, saved: Saved) -> list[str]:
    plain, under = stacked_over(model)
    below, taken = provenance.adapters_below(model), []
    for entry, way in saved.trained_along():
        config = PeftConfig.from_pretrained(saved.place, **way)
        alike = [name for name, held in below.items() if _settings(held) == _settings(config)]
        name = entry["name"] if entry["name"] in alike else alike[0] if len(alike) == 1 else None
        if name is None:
            continue
        given = bare(load_peft_weights(saved.place, device="cpu", **way))
        present = bare(provenance.tensors_below(under or plain, name))
        if all(key in given and given[key].shape == tensor.shape for key, tensor in present.items()):
            rooted = given if under is None else {ROOT + key: tensor for key, tensor in given.items()}
            set_peft_model_state_dict(under or plain, rooted, name)
            taken.append(name)
    return taken


def _settings(config: PeftConfig) -> str:
    """What two configurations of one adapter have in common, wherever it was loaded from."""
    return settings_fingerprint(
        {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    )
