"""GPTQ on a fixed integer grid: codes chosen column by column, each error passed on to the rest.

The paper's weight step (QServe section 4.3.4; GPTQ, arXiv 2210.17323): of all ways to round, one
that keeps the layer's outputs on the calibration tokens. Groups stay contiguous in the stored
order; act-order only changes the order in which columns are visited.
"""

from __future__ import annotations

import dataclasses

import torch

from qoqc.calibrate.columns import Columns
from qoqc.calibrate.grid import Grid
from qoqc.errors import Unsupported

ATTEMPTS = 250
"""Tries to factorize, each with one more step of damping (the reference implementation's count)."""

BLOCK = 128
"""Columns whose errors are passed on to the rest of the weight in one product."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """`root` fp32 [K, K], upper triangular, with `root.T @ root` the inverse of the damped H.

    order     int64 [K], the column that row and column i of `root` stand for
    damping   what was added to the diagonal, as a fraction of its mean
    attempts  factorizations tried
    """

    root: torch.Tensor
    order: torch.Tensor
    damping: float
    attempts: int


def factorize(hessian: torch.Tensor, damping: float, act_order: bool, name: str) -> Factor:
    """Factorize `hessian` fp32 [K, K]; with `act_order` in descending order of its diagonal.

    `damping` times the mean of the diagonal is added to it, and as much again after each failure.
    A channel that was zero on every token keeps no correlation: its weights round to nearest.
    Raises Unsupported, naming the layer, if H is not finite or ATTEMPTS tries all fail.
    """
    h = hessian.double()
    diagonal = h.diagonal().clone()
    if not torch.isfinite(h).all():
        raise Unsupported(f"{name}: the calibration Hessian holds NaN or infinity")
    size = h.shape[0]
    order = torch.arange(size, device=h.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    h = h[order][:, order]
    diagonal = diagonal[order]
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = mean
    for attempt in range(1, ATTEMPTS + 1):
        h.diagonal().copy_(diagonal + attempt * damping * mean)
        root = _inverse_root(h)
        if root is not None:
            return Factor(root.float(), order, attempt * damping, attempt)
    raise Unsupported(
        f"{name}: the calibration Hessian cannot be factorized with a damping of up to "
        f"{ATTEMPTS * damping:g} of its mean diagonal; use more calibration text or more damping"
    )


def _inverse_root(h: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U.T @ U = inverse(h); None if h is not positive definite.

    With J the reversal, J h J = L L.T, so h = (J L J)(J L J).T with J L J upper triangular: U is
    its inverse. That is one factorization where inverting h first takes two.
    """
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info) != 0:
        return None
    upper = lower.flip(0, 1)
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    root = torch.linalg.solve_triangular(upper, eye, upper=True)
    return root if bool(torch.isfinite(root).all()) else None


@torch.no_grad()
def gptq(weight: torch.Tensor, grid: Grid, factor: Factor) -> torch.Tensor:
    """Codes uint8 [N, K] for `weight` fp32 [N, K] on `grid`. Deterministic; N may be a stack of
    linears that share their input, because output channels do not interact."""
    n, k = weight.shape
    root, order, columns = factor.root, factor.order, Columns(grid)
    rest = weight.t()[order].contiguous()  # [K, N] in visiting order: columns are contiguous
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        own = order[start:stop]
        chosen = columns.choose(rest[start:stop], root[start:stop, start:stop], own)
        codes[own] = chosen.codes.to(torch.uint8)
        rest[stop:].addmm_(root[start:stop, stop:].t(), chosen.errors, alpha=-1)
    return codes.t().contiguous()
