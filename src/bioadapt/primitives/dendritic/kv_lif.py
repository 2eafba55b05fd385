"""KvLIF: a leaky integrate-and-fire neuron whose potassium channels remember its voltage and its spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bioadapt.primitives.base import Context, Fused, Host, setting
from bioadapt.primitives.dendritic._spiking import SpikingNeuron, fire, trace_back
from bioadapt.primitives.frames import positive
from bioadapt.primitives.surrogate import spike_slope
from bioadapt.registry import register_primitive

REVERSAL = -0.5  # E_K
HALF_OPEN, STEEPNESS = 0.7, 6.0  # of the channels, in the membrane's voltage


class _KvLifFiring(Fused):
    """Keeps x and the rates."""

    @staticmethod
    def forward(ctx: Any, constants: Tensor, factors: tuple[Tensor, ...], steps: int, *inputs: Tensor) -> Tensor:
        change, rates = fire(lambda drive: _rate(drive, factors, steps), *inputs)
        ctx.save_for_backward(constants, rates, *inputs)
        ctx.steps = steps
        return change

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (constants, rates, *inputs), steps = ctx.saved_tensors, ctx.steps
        gradients = trace_back(lambda drive, weight: _slopes(drive, weight, constants, steps), grad, rates, *inputs)
        return gradients[-1], None, None, *gradients[:-1]


def _factors(constants: Tensor) -> tuple[Tensor, ...]:
    """What `_rate` multiplies and adds, of the six constants: (1,) each."""
    theta, leak, potassium, by_spike, deepening, memory = constants.detach().split(1)
    first, half_open = -torch.expm1(-leak) / leak, torch.full_like(theta, -STEEPNESS * HALF_OPEN)
    opening, by_spike, deepening = potassium * (1 - memory), potassium * by_spike, deepening / potassium
    return theta, leak, memory, first, half_open, opening, by_spike, deepening


def _rate(drive: Tensor, factors: tuple[Tensor, ...], steps: int) -> Tensor:
    """Share of the micro-steps with a spike, in place as far as possible: fresh memory costs more than arithmetic.

    The channels are carried as the conductance h n that they add.
    """
    theta, leak, memory, first, half_open, opening, by_spike, deepening = factors
    # At first no channel is open, and nothing of the first micro-step but the drive is wide.
    voltage, added, target = drive * first, torch.empty_like(drive), torch.empty_like(drive)
    spikes, work = torch.ge(voltage, theta, out=torch.empty_like(drive)), torch.empty_like(drive)
    count = spikes.clone()
    for step in range(1, steps):
        torch.add(half_open, voltage, alpha=STEEPNESS, out=work).sigmoid_()
        if step == 1:
            torch.mul(work, opening, out=added)
        else:
            added.mul_(memory).addcmul_(work, opening)
        added.addcmul_(spikes, by_spike)
        voltage.addcmul_(torch.mul(added, deepening, out=work).add_(theta), spikes, value=-1)
        torch.add(added, leak, out=work)
        torch.add(drive, added, alpha=REVERSAL, out=target).div_(work)
        torch.lerp(target, voltage, work.neg_().exp_(), out=voltage)
        count.add_(torch.ge(voltage, theta, out=spikes))
    return count.div_(steps)


@dataclass
class _Step:
    """One micro-step as it was: what backward reads."""

    voltage: Tensor  # before
    opened: Tensor  # share of open channels before
    conductance: Tensor
    target: Tensor  # of the voltage
    kept: Tensor
    excess: Tensor
    spikes: Tensor
    opening: Tensor
    reopened: Tensor  # share of open channels after


def micro_step(drive: Tensor, voltage: Tensor, opened: Tensor, constants: Tensor) -> tuple[Tensor, _Step]:
    """The voltage after one micro-step, and the rest of it."""
    theta, leak, potassium, by_spike, deepening, memory = constants.split(1)
    flow = opened * potassium
    conductance = flow + leak
    target = (drive + REVERSAL * flow) / conductance
    kept = torch.exp(-conductance)
    reached = target + (voltage - target) * kept
    excess = reached - theta
    spikes = excess.ge(0.0).to(drive.dtype)
    opening = torch.sigmoid(STEEPNESS * (reached - HALF_OPEN))
    reopened = memory * opened + (1 - memory) * opening + by_spike * spikes
    step = _Step(voltage, opened, conductance, target, kept, excess, spikes, opening, reopened)
    return reached - (theta + deepening * reopened) * spikes, step


def _slopes(drive: Tensor, weight: Tensor, constants: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The surrogate slope of `_rate` at each drive, and by the constants, summed with the given weight."""
    theta, _, potassium, by_spike, deepening, memory = constants.split(1)
    voltage, opened, tape = torch.zeros_like(drive), torch.zeros_like(drive), []
    for _ in range(steps):
        voltage, step = micro_step(drive, voltage, opened, constants)
        opened = step.reopened
        tape.append(step)
    on_voltage, on_opened, on_drive = (torch.zeros_like(drive) for _ in range(3))
    on_constants = torch.zeros_like(constants)
    for step in reversed(tape):
        on_reset = -on_voltage * step.spikes
        on_reopened = on_opened + deepening * on_reset
        on_spikes = 1 / steps - on_voltage * (theta + deepening * step.reopened) + by_spike * on_reopened
        on_excess = spike_slope(step.excess) * on_spikes
        on_opening = STEEPNESS * (1 - memory) * on_reopened * step.opening * (1 - step.opening)
        on_reached = on_voltage + on_excess + on_opening
        on_target = on_reached * (1 - step.kept) / step.conductance
        on_conductance = on_reached * (step.target - step.voltage) * step.kept - on_target * step.target
        on_flow = on_conductance + REVERSAL * on_target
        on_drive += on_target
        on_memory = on_reopened * (step.opened - step.opening)
        parts = [on_reset - on_excess, on_conductance, on_flow * step.opened, on_reopened * step.spikes]
        on_constants += torch.stack([*parts, on_reset * step.reopened, on_memory]) @ weight
        on_voltage = on_reached * step.kept
        on_opened = memory * on_reopened + potassium * on_flow
    return on_drive, on_constants


@register_primitive("kv_lif", stage="dendritic", kind="pointwise", zero_at="gate", zero_scale=8.0)
class KvLif(SpikingNeuron):
    """A spiking unit that the more it fires, and the higher its voltage, the harder it is to drive further.

    Biology: voltage-gated potassium channels open with depolarization and with spikes and close slowly; while open they
    shunt the membrane and deepen the reset, so that the rate rises gradually over a wide range of drives.

    Equation: I = gamma u + b, K micro-steps with |I| in the place of I: G = g + h n, m_inf = (I + h n E_K) / G,
    m <- m_inf + (m - m_inf) exp(-G); spike z = 1 where m >= theta;
    n <- lambda n + (1 - lambda) sigmoid(6 (m - 0.7)) + eta z; m <- m - (theta + mu n) z; delta = s sgn(I) sum(z) / K,
    with E_K = -0.5. The slope of a spike is taken for 1 / (1 + 5 |m - theta|)^2.

    Reference: Yang et al. 2026, Neuronal self-adaptation enhances capacity and robustness of representation in spiking
    neural networks (KvLIF), arXiv:2603.20687. The micro-steps and the constants are not the paper's.

    Shapes: x (B, T, d) -> (B, T, d), elementwise. Trained are theta, g, h, eta, mu and lambda, each one number.

    Cost: every unit goes through six micro-steps with an exponential and a sigmoid each, one after the other, and no
    closed form of the rate is known; its gradient is taken from a table.
    """

    steps: int = setting(6, low=1, high=16, meaning="number K of micro-steps, so that there are K + 1 levels")

    def build(self, host: Host) -> None:
        super().build(host)
        self.threshold = positive(1.0, 1)
        self.leak = positive(0.1, 1)
        self.potassium = positive(0.5, 1)
        self.spike_opening = positive(0.3, 1)
        self.deepening = positive(0.3, 1)
        self.memory = nn.Parameter(torch.logit(torch.tensor([0.6])))

    def constants(self) -> Tensor:
        """theta, g, h, eta, mu and lambda, (6,)."""
        raw = self.threshold, self.leak, self.potassium, self.spike_opening, self.deepening
        return torch.cat([softplus(torch.cat(raw)).clamp(min=1e-6), torch.sigmoid(self.memory)])

    def fired(self, x: Tensor, frame: Tensor, scale: Tensor, context: Context) -> Tensor:
        constants = context.once(self.constants)
        factors = context.once(_factors, constants)
        return _KvLifFiring.apply(constants, factors, self.steps, x, frame, self.gain, self.bias, scale)
