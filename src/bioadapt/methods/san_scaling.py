"""SAN: a neuron's gain reaches the synapses that receive it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.methods._wiring import anterior_of, check_expressions, knows, reads_pixels
from bioadapt.primitives.base import Blend, Context, Host, OnWeight, Primitive, setting
from bioadapt.primitives.context import in_full
from bioadapt.registry import register_primitive


@register_primitive("san_scaling", stage="plasticity", kind="weight", zero_at="update", zero_scale=8.0, merge="weight")
class SanScaling(OnWeight):
    """One gain per neuron scales its output, and the synapses of the next adapted layer that read it.

    Biology: how much transmitter a neuron releases decides, in the long run, whether the synapses that receive it are
    potentiated or depressed.

    Equation: y = gamma_l (W_l (gamma_pre v) + b_l) + beta_l with gamma = 1 + theta and theta = beta = 0 at birth;
    gamma_pre is the gain of the anterior layer, 1 where there is none. delta is y less what the layer computes.

    Reference: Dai et al. 2025, SAN: Hypothesizing long-term synaptic development and neural engram mechanism in
    scalable model's parameter-efficient fine-tuning, ICML; without propagation: Lian et al. 2022, Scaling & shifting
    your features: a new baseline for efficient model tuning, NeurIPS.

    Shapes: y (B, T, d), v (B, T, n) -> (B, T, d); theta is (d,), and that of the anterior layer (n,).

    The anterior layer is one whose output channels are the input channels of this one, through norms, additions and
    nonlinearities: in a transformer the previous block's last projection for the query, key and value, the attention's
    output projection for the MLP's first, and the MLP's first for its last. Where the authors' program has every block
    of a vision transformer read the gain of the patch embedding, that is ``wiring="official_vit"``; there the patch
    embedding's gain acts on its output in ``mode="sp"`` too, unless ``patch_gain=False``. A layer whose anterior is not
    adapted reads its input as it is.

    The gain multiplies the layer's input, which is the same as scaling its weight but copies none, and works where the
    weight is quantised. It is trained as theta, which weight decay draws towards the identity.
    """

    any_dtype = True
    per_channel = True
    combinations = ("linear", "log")

    beta: bool = setting(False, meaning="whether a trainable shift of the output is added, which does not propagate")
    mode: str = setting(
        "both", choices=("both", "nt", "sp"), meaning="where the gain acts: on the output (nt), on what reads it (sp)"
    )
    propagate_detached: bool = setting(False, meaning="whether a gain learns nothing from the layers that read it")
    wiring: Any = setting(
        "residual",
        choices=("residual", "official_vit"),
        table=True,
        meaning="which layer's gain a layer reads: a table by model type, or {posterior: anterior} as expressions",
    )

    patch_gain: bool = setting(
        True, before=False, meaning="whether in the official wiring the first gain acts on its output in mode sp too"
    )

    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        checked = super().check_settings(settings)
        if isinstance(checked["wiring"], dict):
            check_expressions(checked["wiring"])
        if checked["beta"] and checked["mode"] == "sp":
            raise ValueError("setting 'beta' shifts the output, which mode='sp' leaves alone: use mode='both'")
        return checked

    def build(self, host: Host) -> None:
        self.theta = nn.Parameter(torch.zeros(self.d_out, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(self.d_out, dtype=torch.float32)) if self.beta else None
        self.path: str | None = None  # of the layer, where it is part of a model
        self.anterior: tuple[Primitive, ...] = ()  # in a tuple: not a submodule
        self.acts_on_output = self.mode != "sp"

    def connect(self, path: str, siblings: Mapping[str, Primitive], model_config: Mapping[str, Any]) -> None:
        self.path, self.anterior = path, ()
        self.acts_on_output = self.mode != "sp" or (self.patch_gain and reads_pixels(path, self.wiring))
        if self.mode == "nt":
            return
        model_type, widths = model_config.get("model_type"), {name: each.d_out for name, each in siblings.items()}
        edges = {
            name: anterior_of(name, each.d_in, widths, self.wiring, model_type)
            for name, each in siblings.items()
            if name == path or path == next(iter(siblings))  # the first speaks for all, once
        }
        if path == next(iter(siblings)) and not any(edges.values()):
            warnings.warn(_unconnected(self.mode, self.wiring, model_type))
        found = edges[path]
        self.anterior = () if found is None else (siblings[found],)

    @property
    def scales_input(self) -> bool:
        return bool(self.anterior)

    def input_scale(self) -> Tensor:
        (anterior,) = self.anterior
        gain = anterior.change_of_gain()
        return 1 + (gain.detach() if self.propagate_detached else gain)

    def change_of_gain(self) -> Tensor:
        """The gain less one, (d_out,), in fp32 at least."""
        return self.zero_scale * in_full(self.theta)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        theta = self.change_of_gain()
        if not self.acts_on_output:
            return (0 * theta).expand_as(x)  # in the graph: parallel training asks every gain for a gradient
        return theta * x if self.shift is None else theta * x + self.zero_scale * in_full(self.shift)

    @classmethod
    def combine(
        cls, parts: Sequence[Primitive], weights: Sequence[float], way: str, blend: Blend
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Gains of several tasks as one: their weighted sum as changes of 1, or the product of their powers.

        Neither is the sum of what the adapters do, since a gain acts twice.

        Raises:
            ValueError: adapters of different settings, or a gain that is not positive where logarithms are taken.
        """
        first = parts[0]
        for part in parts[1:]:
            if part.settings() != first.settings():
                raise ValueError(f"adapters of different settings: {first.settings()} and {part.settings()}")
        changes = [part.change_of_gain().detach() for part in parts]
        if way == "log":
            if any((change <= -1).any() for change in changes):
                raise ValueError("a gain is not positive, so it has no logarithm; 'linear' takes any")
            blended = torch.expm1(blend([torch.log1p(change) for change in changes]))
        else:
            blended = blend(changes)
        state = {"theta": blended / first.zero_scale}
        if first.shift is not None:
            state["shift"] = blend([part.shift.detach() for part in parts])
        return first.settings(), state

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.shift is not None and bias is None:
            raise ValueError(
                f"{self.name} with beta=True shifts the output{f' of {self.path}' if self.path else ''}, which has no "
                "bias to merge that into: train with beta=False, or keep the adapter as it is"
            )
        theta = self.change_of_gain().detach() * self.acts_on_output
        if bias is None:
            return theta[:, None] * weight, None
        shift = 0 if self.shift is None else self.zero_scale * in_full(self.shift.detach())
        return theta[:, None] * weight, theta * bias + shift


def _unconnected(mode: str, wiring: Any, model_type: str | None) -> str:
    if knows(wiring, model_type):
        reason = "no adapted layer reads what another adapted one writes; adapt more, such as 'all-linear'"
    else:
        reason = f"wiring={wiring!r} has no table for model type {model_type!r}; give one, as {{posterior: anterior}}"
    left = "plain output scaling" if mode == "both" else "nothing"
    return f"san_scaling: no gain propagates here, which leaves {left}: {reason}"
