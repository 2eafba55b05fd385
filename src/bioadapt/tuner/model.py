"""The tuner: injects bio layers, over a plain model or over what another PEFT method left there."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from .._words import suggest
from ..checkpoint import PREFIX, without_adapter_name
from ..config import BioConfig
from ..registry import primitive_info
from .combination import Combination, combined
from .heads import choosing_heads, heads, take_over_heads, use_head
from .layer import BioLayer, build_layer
from .placement import Places
from .reference import check_reference, complete_copy
from .refusals import base_of, check_attributes, check_layers, check_names, free_name, names_to_target, with_suggestion
from .scope import Scope
from .sites import bypassed
from .state_dict import circuit_tensors, hide_adapters, placed
from .targets import RESIDUAL_WRITERS, default_sites, fused_experts, shared_modules, tell_of_homes, unmatched
from .tree import bio_layers, forget_configs, undone_on_failure
from .unloading import MergeableModel


class BioModel(MergeableModel):
    """Creates and manages bio adapters.

    Over a `PeftModel` the bio layers are put around the layers of the method below, on the same base model; the
    PeftModel itself is kept aside, unchanged, and `unload` returns it.

    Args:
        model: a plain model, a model with injected adapters, or a PeftModel.
        peft_config: a `BioConfig`, or a dict of one by adapter name.
        adapter_name: name of the first adapter.

    Raises:
        ValueError: the adapter cannot act here (each refusal names what and where); the model is as before.
    """

    prefix = PREFIX
    tuner_layer_cls = BioLayer
    target_module_mapping = RESIDUAL_WRITERS

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        under = model if isinstance(model, (PeftModel, PeftMixedModel)) else None
        plain = model if under is None else base_of(under)
        shared = plain.__dict__.get("peft_config")
        if under is None and shared is not None and adapter_name in shared:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken on this model; choose another, for instance "
                f"adapter_name={free_name(shared)!r}"
            )
        try:
            with undone_on_failure(plain):
                if under is not None:
                    # The tuner below keeps its own table of configurations; ours starts empty.
                    plain.__dict__.pop("peft_config", None)
                super().__init__(plain, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
                if under is not None and shared is not None:
                    plain.__dict__["peft_config"] = shared
        except Exception:
            if under is None:
                forget_configs(plain, shared)  # transformers has noted by now that there are adapters
            raise
        self._under = (under,)  # in a tuple: not a submodule, or every parameter would be there twice
        self._hiding = None if under is None else under.register_state_dict_post_hook(hide_adapters)

    @property
    def under(self) -> PeftModel | None:
        """The PeftModel that this adapter is stacked over."""
        return self.__dict__.get("_under", (None,))[0]

    @property
    def own_names(self) -> list[str]:
        """Names of the bio adapters; the table of a model with injected adapters holds those of other methods too."""
        return [name for name, config in self.peft_config.items() if config.peft_type == "BIO"]

    # -- injection --

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_names(model, self.peft_config, adapter_name)
        check_reference(model, self.peft_config, adapter_name)
        given = self.peft_config[adapter_name]
        check_attributes(given)
        self._check_layers(model, given)
        # What a file was known by says nothing of the adapter any more once that is trained.
        config = dataclasses.replace(given, fingerprint=None, settings_fingerprint=None)
        passed_over = self.__dict__["_passed_over"] = {}
        self.__dict__["_places"] = Places(model)
        shared = shared_modules(model)
        try:
            with undone_on_failure(self):
                self.peft_config[adapter_name] = config
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._check_reach(model, adapter_name, given, passed_over, shared)
                self._connect(model, adapter_name)
                take_over_heads(self.model, adapter_name)
                # By this PEFT's saving knows that an adapted embedding or head is as it was, and leaves it out.
                vars(self.peft_config[adapter_name])["trainable_token_indices"] = {}
                self.__dict__.setdefault("_unused", set()).add(adapter_name)
                if adapter_name in self.active_adapters:
                    self.set_adapter(self.active_adapter, inference_mode=self.peft_config[adapter_name].inference_mode)
        except NoMatchingPeftModuleError as error:
            raise with_suggestion(error, config, model) from None
        finally:
            del self.__dict__["_passed_over"], self.__dict__["_places"]

    def _check_layers(self, model: nn.Module, config: BioConfig) -> None:
        targets = config.target_modules or default_sites(config, self.get_model_config(model))[0]
        if targets is not None and config.layers_to_transform is not None:
            check_layers(config, targets, model, self._check_target_module_exists)

    def _check_reach(
        self,
        model: nn.Module,
        adapter_name: str,
        given: BioConfig,
        passed_over: dict[str, str],
        shared: dict[nn.Module, list[str]],
    ) -> None:
        """Warn where the adapter does not do what was asked for.

        Raises:
            TypeError: it reaches nothing.
        """
        layers = [layer for layer in bio_layers(model) if adapter_name in layer.circuits]
        for path, reason in passed_over.items():
            if not layers:
                raise TypeError(f"{path} cannot be adapted: {reason}")
            warnings.warn(f"{path} is not adapted: {reason}")
        for layer in layers:
            others = [path for path in shared.get(layer.base_layer, ()) if path != layer.path]
            if others:
                warnings.warn(
                    f"{layer.path} is the same module as {', '.join(others)}, from where it is called without the "
                    "adapter"
                )
        asked = given.target_modules
        # The default targets name modules as several versions of transformers call them, and a file holds what it held.
        default, _ = default_sites(given, self.get_model_config(model))
        known_list = given.fingerprint is not None or (isinstance(default, list) and asked == set(default))
        for name in [] if known_list else unmatched(asked, model):
            near = suggest(name, names_to_target(model))
            warnings.warn(f"target_modules contains {name!r}, but no module is called so; {near}")
        experts = fused_experts(model) if isinstance(asked, str) and asked.lower() == "all-linear" else []
        if experts:
            warnings.warn(
                f"'all-linear' does not reach the experts at {_first_of(experts)}, whose weights stand in one tensor "
                "and not in layers that could be adapted"
            )
        unsure = [layer.path for layer in layers if layer.unsure and layer.circuits[adapter_name].reads_time]
        if given.causal is None and unsure:
            warnings.warn(
                f"it cannot be told whether tokens may see later ones at {_first_of(unsure)}: time is read backwards "
                "only, which is safe, but leaves the first token nothing to read. Say causal=True or causal=False in "
                "the configuration"
            )

    def _connect(self, model: nn.Module, adapter_name: str) -> None:
        """Let the primitives of an adapter meet themselves at the other sites."""
        layers = [layer for layer in bio_layers(model) if adapter_name in layer.circuits]
        for entry in self.peft_config[adapter_name].primitives:
            if primitive_info(entry["name"]).kind != "weight":
                continue
            siblings = {layer.path: layer.circuits[adapter_name][entry["name"]] for layer in layers}
            for path, primitive in siblings.items():
                primitive.connect(path, siblings, self.get_model_config(model))
            for layer in layers:
                if siblings[layer.path].scales_input and not layer.site.reads_features:
                    raise ValueError(
                        f"{entry['name']} would scale the input of {layer.path} ({layer.site.layer}), which is not "
                        "made of features"
                    )

    def _prepare_adapter_config(self, peft_config: BioConfig, model_config: dict) -> BioConfig:
        if peft_config.target_modules is None:
            targets, feedforward = default_sites(peft_config, model_config)
            if targets is None:
                raise ValueError(
                    f"target_modules=None: no default targets are known for model type "
                    f"{model_config.get('model_type')!r}; give target_modules, a list of module names or 'all-linear'"
                )
            tell_of_homes(peft_config, str(model_config.get("model_type")), targets)
            # Not written into the user's object: one configuration may serve several model types.
            peft_config = self._replace_config(peft_config)
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
            peft_config.feedforward_modules = None if feedforward is None else set(feedforward)
        return peft_config

    def _replace_config(self, config: BioConfig) -> BioConfig:
        name = next(name for name, other in self.peft_config.items() if other is config)
        self.peft_config[name] = dataclasses.replace(config)
        return self.peft_config[name]

    @staticmethod
    def _check_target_module_exists(peft_config: BioConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if found and isinstance(peft_config.target_modules, str) and peft_config.layers_to_transform is not None:
            # Default targets may be an expression, on which PEFT ignores the choice of layers.
            by_name = dataclasses.replace(peft_config, target_modules=[key.rpartition(".")[2]])
            return check_target_module_exists(by_name, key)
        return found

    def _create_and_replace(
        self,
        peft_config: BioConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, BioLayer):
            if target.below is None or adapter_name not in target.circuits:  # a stacked layer is listed twice
                target.update_layer(adapter_name, peft_config)
            return
        plain = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        reason = bypassed(parent, target_name, plain)
        if reason is not None:
            self.__dict__["_passed_over"][current_key] = reason
            return
        place = self.__dict__["_places"].of(current_key)
        causal = place.is_causal if peft_config.causal is None else peft_config.causal
        layer = build_layer(
            target,
            current_key,
            Scope.of(place.stack.module),
            causal is not False,
            place.reads_encoder,
            place.axes(peft_config.batch_first),
            **get_quantization_kwargs(self.model),
        )
        layer.unsure = causal is None
        layer.training = target.training  # not layer.train(...): what is wrapped keeps the mode it is in
        layer.circuits.train(target.training)
        layer.enable_adapters(True)
        layer._active_adapter = self.active_adapters
        self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config)
        layer.scope.take_in(layer, place.around)

    # -- activation: ours only, what lies below stays as its owner left it --

    def layers(self) -> list[BioLayer]:
        """All bio layers of the model."""
        return list(bio_layers(self.model))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in self.__dict__.get("_unused", set()).intersection(names):
            complete_copy(self.layers(), name)
            self._unused.discard(name)
        for wrapper in heads(self.model, self.own_names):
            ours = [name for name in names if name in wrapper._adapters]
            if len(ours) > 1:
                raise ValueError(f"of {ours} one can be active: each has its own trained copy of a module to save")
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(names, inference_mode=inference_mode)
        for wrapper in heads(self.model, self.own_names):
            use_head(self.model, wrapper, names, inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.layers():
            layer.enable_adapters(enabled)
        for wrapper in heads(self.model, self.own_names):
            if wrapper._adapters <= set(self.own_names):
                wrapper.enable_adapters(enabled)
            else:  # disabled, the wrapper would pass over the copy of the method below
                use_head(self.model, wrapper, self.active_adapters if enabled else [])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for module in [*self.layers(), *heads(self.model, self.own_names)]:
            module.set_requires_grad(adapter_names, requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are born in fp32 and stay there, unless the user asks for the dtype of the layers they sit on."""
        for layer in self.layers():
            if adapter_name not in layer.circuits:
                continue
            dtype = torch.float32
            if not autocast_adapter_dtype:
                _, found = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                dtype = found if found is not None and found.is_floating_point else dtype
            layer.circuits[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names can only be passed in eval mode")
        known = {name for layer in self.layers() for name in layer.circuits}
        for name in names:
            if name != "__base__" and name not in known:
                raise ValueError(f"adapter_names contains {name!r}; {suggest(name, [*known, '__base__'])}")
        scopes = {id(layer.scope): layer.scope for layer in self.layers()}.values()
        with ExitStack() as choices:
            for scope in scopes:
                choices.enter_context(scope.asking_for(list(names)))
            choices.enter_context(choosing_heads(self.model, self.own_names, list(names)))
            yield

    # -- combination --

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that stands for several, each trained for a task, with weights.

        Args:
            adapters: names of adapters with the same primitives at the same sites.
            weights: one for each; they may be negative.
            adapter_name: name of the result, which is not active until `set_adapter` says so.
            combination_type: ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, or a way of the
                primitive's own, such as ``route``, ``dense`` and ``average_B`` for FlyLoRA. What a primitive can do is
                ``primitive_info(name).factory.combinations``.
            density: share of the values that is kept, for ``ties``, ``dare_*`` and ``magnitude_prune``; from 0 to 1.
            majority_sign_method: ``total`` or ``frequency``, for ``ties`` and ``dare_ties``.

        Raises:
            ValueError: an unknown adapter, adapters that do not fit each other, or a way that means nothing for one of
                their primitives; the model is as before.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken; choose another")
        for name in adapters:
            if name not in self.own_names:
                raise ValueError(f"adapters contains {name!r}; {suggest(name, self.own_names)}")
        way = Combination(combination_type, tuple(weights), density, majority_sign_method)
        config, states = combined(self.layers(), {name: self.peft_config[name] for name in adapters}, way)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self.layers():
            if adapter_name in layer.circuits:
                layer.circuits[adapter_name].load_state_dict(states[layer.path])

    # -- saving and loading --

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: BioConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return circuit_tensors(model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        ours = without_adapter_name(key, adapter_name)
        return ours if ours is not None else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BioConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return placed(model, adapter_name, state_dict)


def _first_of(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
