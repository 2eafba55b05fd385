"""The tuner: injects bio layers, over a plain model or over what another PEFT method left there."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from tqdm import tqdm

from .._words import suggest
from ..config import BioConfig
from . import stack
from .bridge import CONTAINER, PREFIX
from .checkpoint import ROOT, check_fingerprint, check_keys, fingerprint, own_tensors, without_adapter_name
from .layer import BioLayer, build_layer
from .scope import Scope, enclosing_stack, is_causal, reads_encoder
from .targets import RESIDUAL_WRITERS, residual_writers


class BioModel(BaseTuner):
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
        plain = model if under is None else _base_of(under)
        shared = plain.__dict__.get("peft_config")
        if under is None and shared is not None and adapter_name in shared:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken on this model; choose another, for instance "
                f"adapter_name={_free_name(shared)!r}"
            )
        if under is not None:
            # The tuner below keeps its own table of configurations; ours starts empty.
            plain.__dict__.pop("peft_config", None)
        try:
            super().__init__(plain, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            if under is None:
                _forget(plain, adapter_name, shared)
            raise
        finally:
            if under is not None and shared is not None:
                plain.__dict__["peft_config"] = shared
        self._under = (under,)  # in a tuple: not a submodule, or every parameter would be there twice
        self._hiding = None if under is None else under.register_state_dict_post_hook(_hide_bio_tensors)

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
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        _check_names(model, self.peft_config, adapter_name)
        if self.peft_config[adapter_name].__dict__.pop("read_from_file", False):
            self.__dict__.setdefault("_awaiting", {})[adapter_name] = trainable
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception as error:
            remove_adapter(model, adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
            if isinstance(error, NoMatchingPeftModuleError):
                raise _with_suggestion(error, self.peft_config[adapter_name], model) from None
            raise
        self._take_over_heads(adapter_name)

    def _prepare_adapter_config(self, peft_config: BioConfig, model_config: dict) -> BioConfig:
        if peft_config.target_modules is None:
            targets = residual_writers(model_config)
            if targets is None:
                raise ValueError(
                    f"target_modules=None: no default targets are known for model type "
                    f"{model_config.get('model_type')!r}; give target_modules, a list of module names or 'all-linear'"
                )
            # Not written into the user's object: one configuration may serve several model types.
            peft_config = self._replace_config(peft_config)
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
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
        host = enclosing_stack(self.model, current_key)
        causal = is_causal(host) if peft_config.causal is None else peft_config.causal
        layer = build_layer(
            target,
            current_key,
            Scope.of(host),
            causal,
            reads_encoder(current_key),
            **get_quantization_kwargs(self.model),
        )
        layer.training = target.training  # not layer.train(...): what is wrapped keeps the mode it is in
        layer.circuits.train(target.training)
        layer.enable_adapters(True)
        layer._active_adapter = self.active_adapters
        self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config)

    def _take_over_heads(self, adapter_name: str) -> None:
        """Let a fresh copy of a module to save start from the trained copy of the method below, not from scratch."""
        for wrapper in self._heads([adapter_name]):
            below = _head_below(self.model, wrapper)
            copies = getattr(wrapper, "modules_to_save", {})
            if adapter_name in copies and below in copies:
                copies[adapter_name].load_state_dict(copies[below].state_dict())
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapter, inference_mode=self.peft_config[adapter_name].inference_mode)

    # -- activation: ours only, what lies below stays as its owner left it --

    def layers(self) -> list[BioLayer]:
        """All bio layers of the model."""
        return list(_bio_layers(self.model))

    def _heads(self, names: Any) -> Iterator[AuxiliaryTrainingWrapper]:
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and any(name in module._adapters for name in names):
                yield module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for wrapper in self._heads(self.own_names):
            ours = [name for name in names if name in wrapper._adapters]
            if len(ours) > 1:
                raise ValueError(f"of {ours} one can be active: each has its own trained copy of a module to save")
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(names, inference_mode=inference_mode)
        for wrapper in self._heads(self.own_names):
            self._use_head(wrapper, names, inference_mode)
        self.active_adapter = adapter_name

    def _use_head(self, wrapper: AuxiliaryTrainingWrapper, names: list[str], inference_mode: bool = False) -> None:
        """Use the copy of one of the named adapters, or if none has one, what is used without a bio adapter."""
        ours = [name for name in names if name in wrapper._adapters]
        if ours:
            wrapper.set_adapter(ours[0], inference_mode=inference_mode)
        else:
            _use_head_below(self.model, wrapper)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.layers():
            layer.enable_adapters(enabled)
        for wrapper in self._heads(self.own_names):
            if wrapper._adapters <= set(self.own_names):
                wrapper.enable_adapters(enabled)
            else:  # disabled, the wrapper would pass over the copy of the method below
                self._use_head(wrapper, self.active_adapters if enabled else [])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for module in [*self.layers(), *self._heads(self.own_names)]:
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
        self.__dict__.pop("_awaiting", None)
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
        with ExitStack() as told:
            for scope in scopes:
                scope.adapter_names = list(names)
                told.callback(setattr, scope, "adapter_names", None)
            for wrapper in self._heads(self.own_names):
                instead = _head_below(self.model, wrapper) or "__base__"
                copies = [name if name in wrapper._adapters else instead for name in names]
                tell = partial(_tell_head, adapter_names=copies)
                told.enter_context(wrapper.register_forward_pre_hook(tell, with_kwargs=True))
            yield

    # -- removal and merging --

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge_allowed(adapter_names)
        self._check_finite(adapter_names)
        merged: list[BioLayer] = []
        try:
            for layer in self.layers():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                merged.append(layer)
        except Exception:
            for layer in merged:
                if layer.merged:
                    layer.unmerge()
            raise

    def unmerge_adapter(self) -> None:
        for layer in self.layers():
            layer.unmerge()

    def _check_merge_allowed(self, adapter_names: list[str] | None = None) -> None:
        super()._check_merge_allowed()
        owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        for layer in self.layers():
            layer.check_mergeable(adapter_names)
            if owners[id(layer.get_base_layer().weight)] > 1:
                raise ValueError(
                    f"the weight of {layer.path} is tied to another module's, which merging would change as well: "
                    "clone it first (tie_word_embeddings=False)"
                )

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Raise `ValueError` if a tensor that is to be merged, of a method below too, is not finite."""
        for path, layer in self.model.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            names = adapter_names if isinstance(layer, BioLayer) and adapter_names else layer.active_adapters
            for attribute in layer.adapter_layer_names:
                held = getattr(layer, attribute)
                for name in (name for name in names if name in held):
                    tensors = held[name].parameters() if isinstance(held[name], nn.Module) else [held[name]]
                    if not all(torch.isfinite(tensor).all() for tensor in tensors):
                        raise ValueError(
                            f"adapter {name!r} cannot be merged: its values at {path} ({attribute}) are not finite"
                        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        elif any(layer.merged for layer in self.layers()):
            self.unmerge_adapter()
        names = self.own_names
        for name in tqdm(names, disable=not progressbar, desc="Unloading"):
            remove_adapter(self.model, name, keep_heads=merge)
        if self.under is None:
            for name in names:
                del self.peft_config[name]
            _forget(self.model, None, self.peft_config or None)
            return self.model
        if self._hiding is not None:
            self._hiding.remove()
        if not merge:
            return self.under
        with warnings.catch_warnings():
            # The layers that carried a bio adapter have merged what was below them already.
            warnings.filterwarnings("ignore", message="All adapters are already merged|Already following adapters")
            return self.under.merge_and_unload(safe_merge=safe_merge)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, another takes its place, the same in all layers."""
        if adapter_name not in self.own_names:
            raise ValueError(f"Adapter {adapter_name} does not exist; {suggest(adapter_name, self.own_names)}")
        if any(adapter_name in layer.merged_adapters for layer in self.layers()):
            raise ValueError(f"Adapter {adapter_name} cannot be deleted while it is merged: unmerge it first")
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        del self.peft_config[adapter_name]
        for layer in self.layers():
            if adapter_name in layer.circuits:
                del layer.circuits[adapter_name]
        _release_heads(self.model, adapter_name)
        if was_active:
            if not active and self.own_names:
                active = sorted(self.own_names)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}."
                )
            self.set_adapter(active)

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
        found, heads = {}, {}
        for name, layer in _named_bio_layers(model):
            if adapter_name in layer.circuits:
                prefix = f"{name}.{CONTAINER}.{adapter_name}." if name else f"{CONTAINER}.{adapter_name}."
                # PEFT has dropped every key that contains another adapter's name, be it that of a module.
                for rest, tensor in layer.circuits[adapter_name].state_dict().items():
                    found[prefix + rest] = state_dict.get(prefix + rest, tensor)
        for name, wrapper in model.named_modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters:
                inside = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
                heads.update({f"{name}.{k}": v for k, v in wrapper.adapter_state_dict(adapter_name, inside).items()})
        bare = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in found.items()}
        config.fingerprint = fingerprint(own_tensors({**bare, **heads}, config.modules_to_save))
        config.trained_over = _record(model)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        ours = without_adapter_name(key, adapter_name)
        return ours if ours is not None else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BioConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        model_keys, expected = {}, {}
        for name, layer in _named_bio_layers(model):
            if adapter_name not in layer.circuits:
                continue
            for rest, tensor in layer.circuits[adapter_name].state_dict().items():
                bare = f"{name.removeprefix(ROOT)}.{CONTAINER}.{rest}"
                model_keys[bare] = f"{name}.{CONTAINER}.{adapter_name}.{rest}"
                expected[bare] = tensor
        given = own_tensors(state_dict)
        foreign = {key: value for key, value in state_dict.items() if key.removeprefix(ROOT) not in given}
        here = model.state_dict()
        lost = {key: v for key, v in foreign.items() if key not in here and key.removeprefix(ROOT) not in here}
        bare = {key.replace(f".modules_to_save.{adapter_name}.", "."): value for key, value in state_dict.items()}
        try:
            check_keys({**given, **lost}, expected, adapter_name)
            check_fingerprint(own_tensors(bare, config.modules_to_save), config.fingerprint, "the checkpoint")
        except ValueError:
            _undo_loading(model, adapter_name)
            raise
        _arrived(model, adapter_name)
        stack.warn_if_changed(config.trained_over, _record(model), adapter_name)
        return {**{model_keys[key]: value for key, value in given.items()}, **foreign}


# -- helpers over module trees --


def remove_adapter(model: nn.Module, adapter_name: str, keep_heads: bool = False) -> None:
    """Take an adapter out of a model; layers without any adapter left, and scopes without layers, go as well."""
    for name, layer in list(_named_bio_layers(model)):
        if adapter_name in layer.circuits:
            del layer.circuits[adapter_name]
        if len(layer.circuits):
            continue
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base_layer)
        layer.scope.layers.remove(layer)
    for module in list(model.modules()):
        scope = module.__dict__.get("bio_scope")
        if scope is not None and not scope.layers:
            scope.remove(module)
    _release_heads(model, adapter_name, keep_heads)


def _release_heads(model: nn.Module, adapter_name: str, keep: bool = False) -> None:
    """Give up an adapter's copies of modules to save; ``keep``: what it trained stays in use."""
    for name, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, AuxiliaryTrainingWrapper) or adapter_name not in wrapper._adapters:
            continue
        in_use = adapter_name in wrapper.active_adapters
        others = sorted(wrapper._adapters - {adapter_name})
        copies = getattr(wrapper, "modules_to_save", {})
        trained = copies[adapter_name] if keep and in_use and adapter_name in copies else None
        if not others:
            parent_name, _, child = name.rpartition(".")
            left = trained if trained is not None else wrapper.original_module
            setattr(model.get_submodule(parent_name), child, left)
            continue
        if trained is not None:
            heir = _head_below(model, wrapper) or others[0]
            copies[heir].load_state_dict(trained.state_dict())
            wrapper.set_adapter(heir, inference_mode=not _is_trained(model, heir))
        elif in_use:
            _use_head_below(model, wrapper)
        wrapper.delete_adapter(adapter_name, wrapper.active_adapters)


def _head_below(model: nn.Module, wrapper: AuxiliaryTrainingWrapper) -> str | None:
    """The adapter of another method whose copy of the wrapped module is in use where no bio adapter has one."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, BioLayer):
            for name in layer.active_adapters:
                if name in wrapper._adapters:
                    return name
    return None


def _use_head_below(model: nn.Module, wrapper: AuxiliaryTrainingWrapper) -> None:
    below = _head_below(model, wrapper)
    wrapper.set_adapter([] if below is None else below, inference_mode=not _is_trained(model, below))


def _is_trained(model: nn.Module, adapter_name: str | None) -> bool:
    """Whether the tensors of an adapter, apart from its modules to save, are trainable."""
    return any(
        parameter.requires_grad and f".{adapter_name}." in f"{key}." and ".modules_to_save." not in key
        for key, parameter in model.named_parameters()
    )


def _tell_head(module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple:
    """Tell a module to save which sample uses which copy. Beam search repeats samples."""
    repeats = len(args[0]) // len(adapter_names)
    return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(repeats)]}


def _bio_layers(model: nn.Module) -> Iterator[BioLayer]:
    return (module for module in model.modules() if isinstance(module, BioLayer))


def _named_bio_layers(model: nn.Module) -> Iterator[tuple[str, BioLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BioLayer))


def _base_of(under: PeftModel | PeftMixedModel) -> nn.Module:
    """The plain model under a PeftModel.

    Raises:
        ValueError: the method below works outside the layers, or it is a bio adapter itself.
    """
    if isinstance(under, PeftMixedModel):
        raise ValueError("a bio adapter cannot be stacked over a mixed model, whose layers wrap each other in turn")
    method = str(under.peft_type.value if hasattr(under.peft_type, "value") else under.peft_type)
    if method == "BIO":
        raise ValueError(
            "this model already carries a bio adapter: use model.add_adapter(name, config) and set_adapter for a "
            "second one, or list all primitives in one configuration"
        )
    if not isinstance(under.base_model, BaseTuner) or type(under.base_model).forward is not BaseTuner.forward:
        raise ValueError(
            f"a bio adapter cannot be stacked over {method}: that method works in the model's forward, not in its "
            "layers. Methods such as LORA, LOHA, LOKR, IA3 or OFT can be stacked over"
        )
    return under.base_model.model


def _record(model: nn.Module) -> dict[str, Any]:
    tuner = getattr(model, "base_model", None)
    under = tuner.under if isinstance(tuner, BioModel) else None
    plain = tuner.model if isinstance(tuner, BioModel) else model
    return stack.record(plain, under, {layer.path: layer.get_base_layer() for layer in _bio_layers(plain)})


def _arrived(model: nn.Module, adapter_name: str) -> list[tuple[nn.Parameter, bool]] | None:
    """What was trainable before an adapter was injected that has been awaiting its tensors, None for any other."""
    tuner = getattr(model, "base_model", None)
    return tuner.__dict__.get("_awaiting", {}).pop(adapter_name, None) if isinstance(tuner, BioModel) else None


def _undo_loading(model: nn.Module, adapter_name: str) -> None:
    """After a refused checkpoint: the model as it was before the call. An adapter that was there before stays."""
    trainable = _arrived(model, adapter_name)
    if trainable is None:
        return
    tuner = model.base_model
    remove_adapter(tuner.model, adapter_name)
    del tuner.peft_config[adapter_name]
    for parameter, requires_grad in trainable:
        parameter.requires_grad = requires_grad
    if tuner.under is None:
        _forget(tuner.model, None, tuner.peft_config or None)
    elif not tuner.peft_config and tuner._hiding is not None:
        tuner._hiding.remove()


def _forget(model: nn.Module, adapter_name: str | None, configs: dict[str, PeftConfig] | None) -> None:
    """Leave ``configs`` without ``adapter_name`` as the model's table of adapters, or no table."""
    if configs is not None:
        configs.pop(adapter_name, None)
        model.__dict__["peft_config"] = configs
        return
    model.__dict__.pop("peft_config", None)
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False


def _check_names(model: nn.Module, ours: dict[str, PeftConfig], adapter_name: str) -> None:
    """Modules to save are kept by adapter name, whatever the method: ours must not meet the ones below."""
    config = ours[adapter_name]
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: torch cannot hold modules under this name; accepted is a word without "
            "dots that is no attribute of nn.ModuleDict"
        )
    for module in model.modules():
        if isinstance(module, BioLayer) and adapter_name in module.circuits:
            raise ValueError(f"adapter_name={adapter_name!r} is taken: {module.path} has an adapter of that name")
        if not isinstance(module, AuxiliaryTrainingWrapper) or adapter_name not in module._adapters:
            continue
        raise ValueError(
            f"adapter_name={adapter_name!r}: the method below keeps a trained module under the same name "
            f"(modules_to_save={sorted(config.modules_to_save or [])} here); give the bio adapter another one, for "
            f"instance adapter_name={_free_name(module._adapters)!r}"
        )


def _free_name(taken: Any) -> str:
    return next(name for name in ("bio", *(f"bio{i}" for i in range(2, 1000))) if name not in taken)


def _with_suggestion(error: Exception, config: BioConfig, model: nn.Module) -> NoMatchingPeftModuleError:
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    outside = {name: module for name, module in modules.items() if name and not name.startswith(adapted)}
    leaves = [name for name, module in outside.items() if f"{name}." in adapted or not list(module.children())]
    names = {name.rpartition(".")[2] for name in leaves if not name.rpartition(".")[2].isdigit()}
    targets = config.target_modules
    asked = sorted(targets)[0] if isinstance(targets, (set, list)) and targets else str(targets)
    return NoMatchingPeftModuleError(f"{error} target_modules={targets!r}: {suggest(asked, names)}")


def _hide_bio_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The state dict of the PeftModel below, asked for by itself, holds what it held without a bio adapter on top."""
    if prefix:
        return
    layers = dict(_named_bio_layers(module))
    ours = tuple(f"{name}.{CONTAINER}." for name in layers)
    wrapped = tuple(f"{name}.base_layer." for name, layer in layers.items() if layer.below is None)
    for key in list(state_dict):
        if key.startswith(ours):
            del state_dict[key]
        elif key.startswith(wrapped):
            path, _, rest = key.rpartition(".base_layer.")
            state_dict[f"{path}.{rest}"] = state_dict.pop(key)
