"""Cortical column: four layers of cells in a loop, the same circuit in every column."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import positive, token_scale
from bioadapt.registry import register_primitive

FLOOR = 1e-4  # of the divisor in layer 2/3


class Wiring(NamedTuple):
    """What all columns of w cells share: four (w, w), feedback (w,) positive, two (1,) of which kappa is positive."""

    layer4: Tensor
    layer23: Tensor
    layer5: Tensor
    output: Tensor
    feedback: Tensor
    kappa: Tensor
    bypass: Tensor


class Sweeps(NamedTuple):
    """Activity of all columns, (w, N) each; what the second sweep shares with the first is scaled by 1 / (1 + g)."""

    drive: Tensor  # of layer 4, before inhibition
    excitation: Tensor  # of layer 2/3, before inhibition
    first_divisor: Tensor
    first23: Tensor
    first5: Tensor
    gain: Tensor  # g, (N,)
    second_divisor: Tensor
    second23: Tensor
    second5: Tensor


def sweeps(u: Tensor, wiring: Wiring) -> Sweeps:
    """Two passes around the loop: u (N, w), the input of each column.

    Rectification is homogeneous, so that the second sweep needs no second product with the weights of layers 4 and
    2/3. Cells are in rows, which makes sums over a column and what is shared by its cells cheap.
    """
    drive = (wiring.layer4 @ u.mT).relu_()
    excitation = (wiring.layer23 @ drive).relu_()
    pool = excitation.sum(0).mul_(2 / u.shape[1]).mul_(wiring.kappa).add_(FLOOR)
    squared = excitation.square()
    first_divisor = excitation + pool
    first23 = squared / first_divisor
    first5 = (wiring.layer5 @ first23).addcmul_(drive, wiring.bypass).relu_()
    gain = wiring.feedback @ first5
    second_divisor = excitation + pool.add_(gain, alpha=FLOOR)
    second23 = squared.div_(second_divisor)
    second5 = (wiring.layer5 @ second23).addcmul_(drive, wiring.bypass).relu_()
    return Sweeps(drive, excitation, first_divisor, first23, first5, gain, second_divisor, second23, second5)


class _Columns(Fused):
    """scale_i s (W_o l5)_i of the columns of x / s: x (..., columns w), s (..., 1), scale (columns w,).

    Keeps x alone; backward computes both sweeps again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, scale: Tensor, *wiring: Tensor) -> Tensor:
        ctx.save_for_backward(x, s, scale, *wiring)
        shared = Wiring(*wiring)
        swept = sweeps(_rows(x / s, shared), shared)
        response = swept.second5.div_(swept.gain.add_(1)).mT @ shared.output.mT
        return response.view(x.shape).mul_(s).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, s, scale, *wiring = ctx.saved_tensors
        shared = Wiring(*wiring)
        u = _rows(x / s, shared)
        swept = sweeps(u, shared)
        divided = swept.gain.add(1).reciprocal_()  # 1 / (1 + g)
        layer5 = swept.second5 * divided
        product = (layer5.mT @ shared.output.mT).view(x.shape).mul_(grad)
        on_scale, on_s = s.flatten() @ product.flatten(0, -2), (product @ scale)[..., None]
        on_response = _rows((grad * scale).mul_(s), shared)
        on_u, *on_wiring = _backward(on_response, u, layer5, divided, swept, shared)
        on_x = on_u.view(x.shape).div_(s)
        on_s -= u.view(x.shape).mul_(on_x).sum(-1, keepdim=True)
        return on_x, on_s, on_scale, *on_wiring


def _backward(
    on_response: Tensor, u: Tensor, layer5: Tensor, divided: Tensor, swept: Sweeps, wiring: Wiring
) -> tuple[Tensor, ...]:
    """Gradients of the input, (N, w), and of the wiring. Overwrites what was swept."""
    share = 2 / u.shape[1]
    on_output, on_layer5 = on_response.mT @ layer5.mT, wiring.output.mT @ on_response.mT
    on_gain = layer5.mul_(on_layer5).sum(0).mul_(divided).neg_()
    # Second sweep, backwards. The sign of rectified activity is its slope; a comparison costs a CPU several times more.
    on_second5 = swept.second5.sign_().mul_(on_layer5.mul_(divided))
    on_excitation = (wiring.layer5.mT @ on_second5).div_(swept.second_divisor)
    against = on_excitation * swept.second23  # minus the gradient of the divisor
    on_gain.sub_(against.sum(0), alpha=FLOOR)
    # First sweep, backwards.
    on_feedback = swept.first5 @ on_gain
    on_first5 = swept.first5.sign_().mul_(on_gain).mul_(wiring.feedback[:, None])
    on_through = (wiring.layer5.mT @ on_first5).div_(swept.first_divisor)
    against.addcmul_(on_through, swept.first23)
    pooled = against.sum(0).mul_(share)
    on_kappa = -(pooled @ swept.excitation.sum(0)).view(1)
    on_excitation.add_(on_through).mul_(swept.excitation).mul_(2).sub_(against).sub_(pooled.mul_(wiring.kappa))
    on_excitation.mul_(swept.excitation.sign_())
    on_weights5 = on_second5 @ swept.second23.mT + on_first5 @ swept.first23.mT
    on_both5 = on_second5.add_(on_first5)
    on_bypass = (on_both5.flatten() @ swept.drive.flatten()).view(1)
    on_weights23 = on_excitation @ swept.drive.mT
    on_drive = (wiring.layer23.mT @ on_excitation).addcmul_(on_both5, wiring.bypass).mul_(swept.drive.sign_())
    on_u = on_drive.mT @ wiring.layer4
    return on_u, on_drive @ u, on_weights23, on_weights5, on_output, on_feedback, on_kappa, on_bypass


def _rows(x: Tensor, wiring: Wiring) -> Tensor:
    """One row for each column of cells: (..., columns w) -> (N, w)."""
    return x.reshape(-1, wiring.layer4.shape[0])


@register_primitive("cortical_column", stage="dynamics", kind="pointwise", zero_at="gate")
class CorticalColumn(Scaled):
    """Channels are cut into columns, and one small recurrent circuit with shared weights runs in each of them.

    Biology: cortex repeats one circuit: layer 4 takes input in, cells of layer 2/3 compete, layer 5 sends the result
    out, and layer 6 turns the gain of layer 4 down.

    Equation: in two sweeps from g = 0, l4 = [W_4 u]_+ / (1 + g); e = [W_23 l4]_+;
    l23 = e^2 / (e + 2 kappa mean(e) + 1e-4); l5 = [W_5 l23 + k l4]_+; g = w_6 l5; delta = s W_o l5, with each
    W = I + 0.3 N / sqrt(w), w_6 = 0.5 / w positive, kappa = 1 positive and k = 0.5 at birth. All steps are homogeneous
    but for the 1e-4, so that the second sweep is the first one divided by 1 + g to within that: what the loop adds is
    the divisive gain of layer 6, and no other winners.

    Reference: Douglas and Martin 2004, Neuronal circuits of the neocortex, Annu Rev Neurosci; Bastos et al. 2012,
    Canonical microcircuits for predictive coding, Neuron.

    Shapes: x (B, T, d) -> (B, T, d), cut into columns of ``width`` channels, the last one filled up with zeros.
    """

    width: int = setting(8, low=1, high=64, meaning="number w of channels in a column")

    def build(self, host: Host) -> None:
        self.width = w = min(self.width, self.d_out)
        eye = torch.eye(w)
        self.layer4, self.layer23, self.layer5, self.output = (
            nn.Parameter(eye + 0.3 * torch.randn(w, w) / w**0.5) for _ in range(4)
        )
        self.feedback = positive(0.5 / w, w)
        self.kappa = positive(1.0, 1)
        self.bypass = nn.Parameter(torch.full((1,), 0.5))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        wiring, scale = self.wiring(), token_scale(x)
        u = nn.functional.pad(x / scale, (0, -self.d_out % self.width)).unflatten(-1, (-1, self.width))
        gain = torch.zeros_like(u[..., :1])
        for _ in range(2):
            layer4 = torch.relu(u @ wiring.layer4.T) / (1 + gain)
            excitation = torch.relu(layer4 @ wiring.layer23.T)
            pool = excitation.mean(-1, keepdim=True)
            layer23 = excitation.square() / (excitation + 2 * wiring.kappa * pool + FLOOR)
            layer5 = torch.relu(layer23 @ wiring.layer5.T + wiring.bypass * layer4)
            gain = (layer5 @ wiring.feedback)[..., None]
        return scale * (layer5 @ wiring.output.T).flatten(-2)[..., : self.d_out]

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        missing = -self.d_out % self.width
        filled, scales = (nn.functional.pad(z, (0, missing)) if missing else z for z in (x, scale))
        responses = _Columns.apply(filled, token_scale(x), scales, *context.once(self.wiring))
        return responses[..., : self.d_out] if missing else responses

    def wiring(self) -> Wiring:
        """The weights that all columns share."""
        feedback, kappa = nn.functional.softplus(self.feedback), nn.functional.softplus(self.kappa)
        return Wiring(self.layer4, self.layer23, self.layer5, self.output, feedback, kappa, self.bypass)
