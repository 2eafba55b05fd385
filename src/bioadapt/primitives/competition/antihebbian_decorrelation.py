"""Anti-Hebbian decorrelation: lateral synapses learn to inhibit what fires together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, LocalRule, Primitive, setting
from bioadapt.primitives.exporting import is_exporting
from bioadapt.primitives.frames import masked_mean, read_in, read_out, token_count, token_scale
from bioadapt.registry import register_primitive

FAINTEST = 1e-6
MOST_NEGATIVE = 0.9  # size of the smallest eigenvalue of the lateral synapses; at 1 the circuit would blow up
SQUARINGS = 30  # of what an inverse by products still gets wrong


@register_primitive(
    "antihebbian_decorrelation",
    stage="competition",
    kind="pointwise",
    zero_at="readout",
    merge="left",
    learns=True,
)
class AntihebbianDecorrelation(LocalRule, Primitive):
    """Latents inhibit each other as much as they have been active together, until they no longer are.

    Biology: if inhibitory synapses between the cells of one layer grow with coincident firing, the cells come to
    respond to different things.

    Equation: y = (I + Q)^-1 D x, the steady state of y = D x - Q y; delta = U y; Q starts at 0 and follows
    Q <- Q + eta offdiag(E[y_i y_j] / (sd_i sd_j)), with sd_i = sqrt(E[y_i^2]) and y in units of s. Where its smallest
    eigenvalue falls below -0.9 the whole of Q is shrunk, which unlike a change of that eigenvalue alone keeps the
    diagonal at zero.

    Reference: Földiák 1990, Forming sparse representations by local anti-Hebbian learning, Biol Cybern.

    Shapes: x (B, T, d) -> (B, T, d); y is (B, T, rank), Q is (rank, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number m of latents")
    rate: float = setting(0.1, low=0.0, high=1.0, meaning="learning rate eta of the lateral synapses")

    def build(self, host: Host) -> None:
        self.rank = m = min(self.rank, self.d_out)
        self.reader = read_in(m, self.d_out)
        self.writer = read_out(self.d_out, m)
        self.register_buffer("lateral", torch.zeros(m, m))
        self.declare_statistics(coincidence=(m, m))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        y = nn.functional.linear(x, context.once(self.response))
        if self.training and context.observing:
            with torch.no_grad():
                activity = y / token_scale(x)
                together = masked_mean(activity[..., :, None] * activity[..., None, :], context.mask)
                self.observe(context, tokens=token_count(x, context.mask), coincidence=together)
        return y @ self.writer.T

    def response(self) -> Tensor:
        """(I + Q)^-1 D, (rank, d)."""
        return self.steady_state() @ self.reader

    def steady_state(self) -> Tensor:
        """(I + Q)^-1, (rank, rank)."""
        identity = torch.eye(self.rank, device=self.lateral.device, dtype=self.lateral.dtype)
        matrix = self.lateral + identity
        if not is_exporting():
            # `inv_ex` asks no accelerator whether it succeeded; the bound on the eigenvalues says that it does.
            return torch.linalg.inv_ex(matrix).inverse
        # By Newton and Schulz, since formats of exported models know products alone.
        inverse = matrix.mT / matrix.square().sum()
        for _ in range(SQUARINGS):
            inverse = inverse @ (2 * identity - matrix @ inverse)
        return inverse

    def learn(self, fresh: Tensor) -> None:
        together = self.observed_coincidence
        deviation = together.diagonal().clamp(min=FAINTEST).sqrt()
        correlation = (together / deviation / deviation[:, None]).fill_diagonal_(0.0)
        lateral = self.lateral + self.rate * correlation
        lateral = 0.5 * (lateral + lateral.T)
        smallest = torch.linalg.eigvalsh(lateral)[0]
        lateral *= MOST_NEGATIVE / smallest.neg().clamp(min=MOST_NEGATIVE)
        self.lateral.lerp_(lateral, fresh)

    def left_matrix(self) -> Tensor:
        return self.writer @ self.steady_state() @ self.reader
