"""Leaky integrate-and-fire: a membrane that leaks, fires at its threshold and is reset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bioadapt.primitives.base import Context, Fused, Host, setting
from bioadapt.primitives.dendritic._spiking import SpikingNeuron, fire, trace_back
from bioadapt.primitives.frames import positive
from bioadapt.primitives.surrogate import spike_slope
from bioadapt.registry import register_primitive


class _LifFiring(Fused):
    """Keeps x and the rates."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, steps: int, beta: float, *inputs: Tensor) -> Tensor:
        change, rates = fire(lambda drive: _rate(drive, decay, steps, beta), *inputs)
        ctx.save_for_backward(decay, rates, *inputs)
        ctx.steps, ctx.beta = steps, beta
        return change

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (decay, rates, *inputs), steps, beta = ctx.saved_tensors, ctx.steps, ctx.beta
        gradients = trace_back(lambda drive, weight: _slopes(drive, weight, decay, steps, beta), grad, rates, *inputs)
        return gradients[-1], None, None, *gradients[:-1]


def _rate(drive: Tensor, decay: Tensor, steps: int, beta: float) -> Tensor:
    """Share of the micro-steps with a spike, in place as far as possible: fresh memory costs more than arithmetic."""
    membrane, count, spikes = drive.clone(), torch.zeros_like(drive), torch.empty_like(drive)
    for step in range(steps):
        if step:
            torch.addcmul(drive, membrane, decay, out=membrane)
        threshold = _threshold(count, beta)
        torch.ge(membrane, threshold, out=spikes)
        membrane.addcmul_(spikes, threshold, value=-1)
        count.add_(spikes)
    return count.div_(steps)


def _slopes(drive: Tensor, weight: Tensor, decay: Tensor, steps: int, beta: float) -> tuple[Tensor, Tensor]:
    """The surrogate slope of `_rate` at each drive, and by the decay, summed with the given weight."""
    after, count, tape = torch.zeros_like(drive), torch.zeros_like(drive), []
    for _ in range(steps):
        before, threshold = after, _threshold(count, beta)
        membrane = before * decay + drive
        spikes = torch.ge(membrane, threshold).to(drive.dtype)
        tape.append((before, membrane - threshold, spikes, threshold))
        after = membrane - spikes * threshold
        count = count + spikes
    on_membrane, on_drive, on_decay = torch.zeros_like(drive), torch.zeros_like(drive), torch.zeros_like(decay)
    on_count = torch.full_like(drive, 1 / steps)
    for before, excess, spikes, threshold in reversed(tape):
        on_excess = spike_slope(excess) * (on_count - on_membrane * threshold)
        on_count = on_count - beta * (on_excess + on_membrane * spikes)
        on_membrane = on_membrane + on_excess
        on_drive += on_membrane
        on_decay += torch.dot(on_membrane * before, weight)
        on_membrane = on_membrane * decay
    return on_drive, on_decay


def _threshold(count: Tensor, beta: float) -> Tensor:
    return count * beta + 1 if beta else count.new_ones(1)


@register_primitive("leaky_integrate_fire", stage="dendritic", kind="pointwise", zero_at="gate")
class LeakyIntegrateFire(SpikingNeuron):
    """Each unit counts the spikes that a leaky membrane makes of its drive: none below rheobase, then in steps.

    Biology: a membrane integrates its current and loses charge through its leak; at the threshold the neuron spikes,
    and the charge of one spike is gone.

    Equation: I = gamma u + b; K micro-steps m <- I/g + (m - I/g) exp(-g) with |I| in the place of I, spike z = 1 where
    m >= theta, m <- m - theta z; delta = s sgn(I) sum(z) / K. With beta > 0 the threshold is theta (1 + beta n) after n
    spikes. The slope of a spike in m / theta is taken for 1 / (1 + 5 |m / theta - 1|)^2.

    Reference: Lapicque 1907, Recherches quantitatives sur l'excitation électrique des nerfs traitée comme une
    polarisation, J Physiol Pathol Gen; Neftci, Mostafa and Zenke 2019, Surrogate gradient learning in spiking neural
    networks: bringing the power of gradient-based optimization to spiking neural networks, IEEE Signal Process Mag.

    Shapes: x (B, T, d) -> (B, T, d), elementwise. Micro-steps run within a token.
    """

    steps: int = setting(4, low=1, high=16, meaning="number K of micro-steps, so that there are K + 1 levels")
    beta: float = setting(0.0, low=0.0, high=10.0, meaning="growth of the threshold per spike, in thresholds")

    def build(self, host: Host) -> None:
        super().build(host)
        self.threshold = positive(1.0, 1)
        self.leak = positive(0.1, 1)

    def fired(self, x: Tensor, frame: Tensor, scale: Tensor, context: Context) -> Tensor:
        decay, *synapses = context.once(self.constants)
        return _LifFiring.apply(decay, self.steps, self.beta, x, frame, *synapses, scale)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp(-g) (1,), and gamma and b, (d,) each.

        In units of the threshold and of what one micro-step charges, so that nothing else of either is to be computed.
        """
        leak = softplus(self.leak).clamp(min=1e-6)
        charge = -torch.expm1(-leak) / leak / softplus(self.threshold).clamp(min=1e-6)
        return torch.exp(-leak), self.gain * charge, self.bias * charge
