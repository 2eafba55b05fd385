"""The adapter under test, in a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ...checkpoint import PREFIX
from ...config import BioConfig
from ...registry import PrimitiveInfo, primitive_info
from ..compare import copied, random, seeded
from ..hosts import HOSTS, TinyHost
from ..template import Template

Entry = str | dict[str, Any]
Test = TypeVar("Test", bound=Callable)

_templates: dict[Hashable, Template] = {}  # of the last few models: to build one takes ten times as long


@dataclass(frozen=True)
class Adapted:
    """One configuration on one host."""

    entries: Sequence[Entry]
    fields: Mapping[str, Any]
    host: TinyHost

    @property
    def infos(self) -> list[PrimitiveInfo]:
        return [primitive_info(entry if isinstance(entry, str) else entry["name"]) for entry in self.entries]

    @property
    def learns(self) -> bool:
        return any(info.learns for info in self.infos)

    @property
    def unmergeable(self) -> list[str]:
        return [info.name for info in self.infos if not info.mergeable]

    def config(self, **changes: Any) -> BioConfig:
        return BioConfig(**{"primitives": list(self.entries), **self.fields, **changes})

    def fresh(self, base: nn.Module | None = None, **changes: Any) -> PeftModel:
        """The adapter as it is born, over ``base`` or the host, in eval mode."""
        with seeded(12):
            return get_peft_model(base if base is not None else self.host.model(), self.config(**changes)).eval()

    def woken(self, base: nn.Module | None = None, **changes: Any) -> PeftModel:
        """Away from the identity, with some local learning behind it, in eval mode; over the host always the same."""
        if base is not None:
            return self.wake(base, **changes)
        factories = tuple(info.factory for info in self.infos)  # names may be registered anew
        key = (self.host.name, repr((self.entries, self.fields, changes)), factories)
        if key not in _templates:
            if len(_templates) == len(HOSTS):
                del _templates[next(iter(_templates))]
            _templates[key] = Template(self.wake(**changes))
        return _templates[key].copy()

    def wake(self, base: nn.Module | None = None, **changes: Any) -> PeftModel:
        """The same, but for certain from its own beginning and not a copy."""
        model = self.fresh(base, init_weights=False, **changes)
        if self.learns:
            for seed in range(3):
                self.step(model.train(), seed=70 + seed)
        return model.eval()

    def output(self, model: nn.Module, seed: int = 0, **changes: Any) -> Tensor:
        """What the model makes of the host's inputs, with a graph in training only: kernels differ in the last bits."""
        with torch.set_grad_enabled(model.training and torch.is_grad_enabled()):
            return self.host.output(model, {**self.host.inputs(seed=seed), **changes})

    def step(self, model: nn.Module, seed: int = 0, **changes: Any) -> None:
        """A forward and an optimiser's step of length zero: parameters stay, local rules run."""
        with seeded(seed):
            self.output(model, seed=seed, **changes)
        torch.optim.SGD([p for name, p in model.named_parameters() if is_bio(name)], lr=0.0).step()

    def loss(self, model: nn.Module, seed: int = 0, **changes: Any) -> Tensor:
        """Some scalar that every feature of the output has a part in."""
        found = self.output(model, seed=seed, **changes).float()
        return (found * random(*found.shape, seed=seed + 80)).mean()


class Inside:
    """Base of every group of tests inside models.

    Attributes:
        fields: further fields of the `BioConfig`, such as ``{"rank": 8}``.
        hosts: the architectures to test on, keys of `HOSTS`. Each test takes those between which its property can
            differ.
    """

    fields: Mapping[str, Any] = {}
    hosts: Sequence[str] = tuple(HOSTS)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        overridden = next(cls for cls in type(self).__mro__ if "host" in vars(cls)) is not Inside
        marked = any("host" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
        if "host" in metafunc.fixturenames and not (overridden or marked):
            unknown = set(self.hosts) - HOSTS.keys()
            assert not unknown, f"hosts: {', '.join(unknown)} not among {', '.join(HOSTS)}"
            differing = getattr(metafunc.function, "hosts", HOSTS)
            metafunc.parametrize("host", [name for name in differing if name in self.hosts], indirect=True)

    @pytest.fixture
    def primitive(self) -> Entry | list[Entry]:
        """Override: the name of a registered primitive, a dict of its name and settings, or a list of these."""
        raise NotImplementedError("override the fixture 'primitive': return a registered name, or a dict with a 'name'")

    @pytest.fixture
    def host(self, request: pytest.FixtureRequest) -> TinyHost:
        return HOSTS[request.param]

    @pytest.fixture
    def anywhere(self, primitive: Entry | list[Entry], host: TinyHost) -> Adapted:
        """The adapter, whether or not it may act on this host."""
        return Adapted(primitive if isinstance(primitive, list) else [primitive], self.fields, host)

    @pytest.fixture
    def adapted(self, anywhere: Adapted) -> Adapted:
        if anywhere.host.causal and any(info.kind == "global" for info in anywhere.infos):
            pytest.skip("a global primitive is refused on causal models")
        return anywhere


def on(*names: str) -> Callable[[Test], Test]:
    """Run a test on these hosts only: those between which the property can differ."""

    def decorate(test: Test) -> Test:
        test.hosts = names  # type: ignore[attr-defined]
        return test

    return decorate


def is_bio(name: str) -> bool:
    """Whether a parameter or buffer belongs to a bio adapter."""
    return PREFIX in name


def bio_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of an adapter's saved tensors, parameters and buffers."""
    return copied((name, tensor) for name, tensor in model.state_dict().items() if is_bio(name))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of everything else, under the names of the plain model."""
    found = ((name, tensor) for name, tensor in model.state_dict().items() if not is_bio(name))
    return copied((name.removeprefix("base_model.model.").replace(".base_layer", ""), t) for name, t in found)


def bio_buffers(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of what local rules have written so far."""
    saved = model.state_dict()
    return copied((name, buffer) for name, buffer in model.named_buffers() if is_bio(name) and name in saved)


@torch.no_grad()
def with_other_parameters(model: nn.Module) -> nn.Module:
    """The same model with other adapter parameters."""
    for name, parameter in model.named_parameters():
        if is_bio(name):
            parameter.add_(0.5)
    return model
