"""Orthogonal matrices that spread outliers over all channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal(size: int, seed: int | None = 0) -> Tensor:
    """Q [size, size], fp64: Hadamard for powers of two, else Hadamard x orthogonal (Kronecker).

    size = 2^a * m with odd m: Q = H(2^a) kron O(m), O(m) random orthogonal. `seed` flips the signs
    of the inputs at random, so that no common pattern, such as a mean over channels, ends up in
    one channel; None leaves the plain Hadamard matrix (seed 0 then makes O(m)).
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    q = hadamard(size // odd)
    if odd > 1:
        noise = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        factor, upper = torch.linalg.qr(noise)
        factor = factor * upper.diagonal().sign()  # QR is unique up to these signs
        q = torch.kron(q, factor.contiguous())
    if seed is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        q = q * signs
    return q


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): symmetric, orthogonal; for powers of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"Hadamard matrix of size {size}: not a power of two")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def fixing_ones(q: Tensor) -> Tensor:
    """An orthogonal matrix near `q` [n, n] that maps the vector of ones to itself.

    One reflection after `q`. Such a rotation commutes with subtracting the mean over channels:
    mean(Q x) = mean(x), and the mean's vector of ones stays as it is.
    """
    n = q.shape[0]
    ones = torch.full((n,), 1 / math.sqrt(n), dtype=q.dtype)
    away = q @ ones - ones
    if float(away.norm()) < 1e-12:  # already fixed, up to fp64 rounding
        return q
    w = away / away.norm()
    return q - 2 * torch.outer(w, w @ q)
