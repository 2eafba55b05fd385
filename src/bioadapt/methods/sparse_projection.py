"""A frozen random matrix whose rows read a few inputs each, and the fingerprint that it is known by."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sparse_projection(shape: tuple[int, int], entries: int, size: float, kind: str, source: torch.Generator) -> Tensor:
    """A frozen random matrix with exactly ``entries`` numbers per row, N(0, size^2) or +-size, in fp32 on the CPU.

    ``kind="rademacher"`` is made of random integers alone, which are the same on all machines.
    """
    rows, features = shape
    places = [torch.randperm(features, generator=source, device="cpu")[:entries] for _ in range(rows)]
    if kind == "rademacher":
        values = 2.0 * torch.randint(2, (rows, entries), generator=source, device="cpu").float() - 1.0
    else:
        values = torch.randn(rows, entries, generator=source, device="cpu", dtype=torch.float32)
    return torch.zeros(shape, device="cpu", dtype=torch.float32).scatter_(1, torch.stack(places), size * values)


def fingerprint(matrix: Tensor, *, values: bool = True) -> Tensor:
    """SHA-256 over the places and, with ``values``, the bytes of a matrix's non-zero numbers, as uint8 (32,).

    The places are made of random integers and tell one seed, layer and size from another. Gaussian values of one seed
    differ in the last bits between processors, so that a matrix that is drawn again is known by its places alone.
    """
    matrix = matrix.detach().cpu().float()
    places = matrix.nonzero(as_tuple=True)
    digest = hashlib.sha256(torch.stack(places).int().numpy().tobytes())
    if values:
        digest.update(matrix[places].numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")
