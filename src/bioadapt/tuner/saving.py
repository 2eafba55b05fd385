"""Saving an adapter as one transaction: configuration, tensors and what trained along together, or nothing.

As in `loading`, these functions stand around those of PEFT and transformers, which they get as their first argument.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import nn

from ..checkpoint import ALONG, record_fingerprints, whole_or_not_at_all
from . import provenance
from .card import CARD, add_tags, is_somebodys, write_card
from .layer import BioLayer
from .model import BioModel
from .tree import bio_layers, stacked_over

ReplacedFunction = Callable[..., Any]


def save_pretrained(original: ReplacedFunction, self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """Around `PeftModel.save_pretrained`."""
    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    options, folder = given.arguments, Path(given.arguments["save_directory"])
    if not isinstance(self.base_model, BioModel) or folder.is_file():
        return original(*given.args, **given.kwargs)
    names, state_dict = options["selected_adapters"] or list(self.peft_config), options["kwargs"].get("state_dict")
    record = provenance.record(self, state_dict)  # on every rank: it gathers what is sharded
    main, under = options["is_main_process"], self.base_model.under
    trained = provenance.trained_along(self)
    if trained:
        _say_what_trains_along(trained, saved=under is not None)
    with whole_or_not_at_all(folder) if main else TemporaryDirectory() as stage:
        options["save_directory"] = stage
        ours = main and not is_somebodys(Path(stage, CARD))
        if ours:
            Path(stage, CARD).unlink(missing_ok=True)  # what PEFT makes anew has no tags of another adapter
        original(*given.args, **given.kwargs)
        along: dict[str, str] = {}
        for name in names:
            own = Path(stage, name) if name != "default" else Path(stage)
            along = {}
            for below in trained if under is not None else ():
                place = along[below] = f"{ALONG}/{below}"
                under.save_pretrained(
                    str(own / (place if below == "default" else ALONG)),  # PEFT adds any other name itself
                    safe_serialization=options["safe_serialization"],
                    selected_adapters=[below],
                    is_main_process=main,
                    state_dict=None if state_dict is None else provenance.without_ours(state_dict),
                )
            if main:
                record_fingerprints(own, _with_places(record, along))
        if ours and names:
            configs = {name: self.peft_config[name] for name in names}
            write_card(Path(stage, CARD), configs, stacked_over(self)[0], _with_places(record, along))
    return None


def save_pretrained_of_transformers(original: ReplacedFunction, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Around `PreTrainedModel.save_pretrained`, for models that carry the adapters themselves."""
    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    options, folder = given.arguments, Path(given.arguments["save_directory"])
    name = _only_active_bio_adapter(self)
    if not getattr(self, "_hf_peft_config_loaded", False) and any(bio_layers(self)):
        warnings.warn(
            "this model carries the bio adapters of a PeftModel, and is saved with their layers in it, which nothing "
            "can load: save the PeftModel instead, or call its unload() before",
            stacklevel=3,
        )
    if name is None or folder.is_file():
        return original(*given.args, **given.kwargs)
    upload, options["push_to_hub"] = options["push_to_hub"], False
    record = provenance.record(self, options["state_dict"])
    here: Callable[[bool], bool] = getattr(self, "should_save_on_this_rank", bool)
    main = here(options["is_main_process"])
    along = {below: f"{ALONG}/{below}" for below in provenance.trained_along(self)}
    if along:
        _say_what_trains_along(list(along), saved=True)
    with whole_or_not_at_all(folder) if main else TemporaryDirectory() as stage:
        for adapter, place in {**along, name: ""}.items():
            options["save_directory"] = str(Path(stage, place))
            with _active_alone(self, adapter):
                original(*given.args, **given.kwargs)
        if main:
            record_fingerprints(Path(stage), _with_places(record, along))
            if not is_somebodys(Path(stage, CARD)):
                Path(stage, CARD).unlink(missing_ok=True)
                # The file is read as ``default``, whatever the adapter is called in this model.
                configs: Any = self.peft_config
                write_card(Path(stage, CARD), {"default": configs[name]}, self, _with_places(record, along))
    if upload:
        hub = {key: value for key, value in options["kwargs"].items() if key != "repo_id"}
        self.push_to_hub(options["kwargs"].get("repo_id", folder.name), token=options["token"], **hub)
    return None


def has_valid_embedding_base_layer(original: ReplacedFunction, layer: Any) -> Any:
    """Around PEFT's question, asked when it saves, whether there is a plain layer in an adapted embedding or head."""
    return original(layer.base_layer if isinstance(layer, BioLayer) and layer.below is not None else layer)


def push_to_hub(original: ReplacedFunction, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PushToHubMixin.push_to_hub`, which would upload a blank card, and no folder within a folder."""
    if not isinstance(getattr(self, "base_model", None), BioModel) and _only_active_bio_adapter(self) is None:
        return original(self, *args, **kwargs)
    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    options, hub = given.arguments, HfApi(token=given.arguments["token"])
    repository = hub.create_repo(options["repo_id"], private=options["private"], exist_ok=True).repo_id
    revision = options["revision"]
    if revision is not None and not revision.startswith("refs/pr"):
        hub.create_branch(repository, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        with suppress(EntryNotFoundError):  # a card that somebody has written stays
            hub.hf_hub_download(repository, CARD, revision=revision, local_dir=folder)
        self.save_pretrained(folder, max_shard_size=options["max_shard_size"])
        add_tags(Path(folder, CARD), options["tags"] or ())
        return hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=options["commit_message"] or "Upload adapter",
            commit_description=options["commit_description"],
            revision=revision,
            create_pr=options["create_pr"],
        )


def _say_what_trains_along(names: list[str], saved: bool) -> None:
    which = f"the adapter {', '.join(map(repr, names))} of another method (such as a LoRA) trains along"
    where = f"it is saved in the folder {ALONG} beside the bio adapter"
    nowhere = "it is not saved, since it was put into the model without a PeftModel: save it by itself"
    warnings.warn(f"{which}: {where if saved else nowhere}", stacklevel=4)


def _with_places(record: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The record of what lies underneath, with where in the folder that is which trained along."""
    adapters = [
        {**entry, "saved_in": places[entry["name"]]} if entry["name"] in places else entry
        for entry in record["adapters"]
    ]
    return {**record, "adapters": adapters}


def _only_active_bio_adapter(model: nn.Module) -> str | None:
    """The one bio adapter that is active in a model that carries its adapters itself."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return None
    active = {name for layer in bio_layers(model) for name in layer.active_adapters if name in layer.circuits}
    return active.pop() if len(active) == 1 else None


@contextmanager
def _active_alone(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """transformers saves the adapter that the model names as active, and refuses to if it names more than one."""
    model.__dict__["active_adapters"] = lambda: [adapter_name]
    try:
        yield
    finally:
        del model.__dict__["active_adapters"]
