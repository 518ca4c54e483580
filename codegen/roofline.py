"""How long a kernel takes at best: bytes and operations by token count, and what a GPU sustains."""

from __future__ import annotations

import dataclasses

import sympy

from qoqc.ir.spec import GROUP, TILE_N, LinearSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

TOKENS = sympy.Symbol("M", integer=True, positive=True)
"""The token count in expressions of Work."""

L2_BYTES_PER_CLOCK = 32
"""What an SM reads from L2 per clock, NVIDIA's figure for sm_80 and sm_90."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU sustains: bytes/s from memory, bytes/s from L2, int8 operations/s (dense)."""

    read: float
    l2: float
    int8: float


# int8 and memory from the data sheets (SXM parts where there are several); L2 from 32 B per SM and
# boost clock; reading on the H200 is what a read kernel reached there, L2 cold, of 4.8 TB/s
_KNOWN = {
    "H200": Limits(4.69e12, 7.4e12, 1979e12),
    "H100": Limits(3.35e12, 7.4e12, 1979e12),
    "A100": Limits(2.04e12, 4.9e12, 624e12),
    "L40S": Limits(0.86e12, 11.4e12, 733e12),
    "RTX 4090": Limits(1.01e12, 10.3e12, 660e12),
}

# per SM: bytes/s from memory, int8 operations per clock; the slowest parts of each architecture
_PER_SM = {80: (14e9, 4096), 86: (6e9, 2048), 89: (6e9, 2048), 90: (15e9, 8192)}
_SLOW_CLOCK = 1.2e9


def limits_of(device: DeviceKey) -> Limits:
    """The limits of a GPU by name; of an unknown one those of a slow part of its architecture."""
    for name, limits in _KNOWN.items():
        if name in device.name:
            return limits
    arch = max((known for known in _PER_SM if known <= device.arch), default=min(_PER_SM))
    read, operations = _PER_SM[arch]
    sms = device.sm_count
    return Limits(
        sms * read, sms * L2_BYTES_PER_CLOCK * _SLOW_CLOCK, sms * operations * _SLOW_CLOCK
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """What a launch does, as expressions of TOKENS.

    memory      bytes from and to memory: every input once, every result once
    l2          bytes through L2: an input as often as blocks read it, partial sums
    operations  integer operations, padding of the tiles included
    blocks      blocks of equal work
    """

    memory: sympy.Expr
    l2: sympy.Expr
    operations: sympy.Expr
    blocks: sympy.Expr

    def seconds(self, tokens: int, device: DeviceKey) -> float:
        """The time a launch of `tokens` takes at the limits of the device.

        Computing slows down by what the last wave of blocks leaves idle, memory only where the
        blocks are too few to fill the SMs: half of the SMs draw the full rate.
        """
        limits = limits_of(device)
        memory, l2, operations, blocks = (
            float(sympy.sympify(e).subs(TOKENS, tokens))
            for e in (self.memory, self.l2, self.operations, self.blocks)
        )
        if not blocks:
            return 0.0
        waves = -(-blocks // device.sm_count)
        busy = blocks / (waves * device.sm_count)
        drawing = min(1.0, 2 * blocks / device.sm_count)
        return max(
            memory / (limits.read * drawing),
            l2 / (limits.l2 * min(1.0, blocks / device.sm_count)),
            operations / (limits.int8 * busy),
        )


def gemm_bytes(spec: LinearSpec) -> sympy.Expr:
    """Bytes that any W4A8 GEMM must move: packed weights, scales, activations, output."""
    return _weight_bytes(spec) + _token_bytes(spec) * TOKENS


def gemm_operations(spec: LinearSpec) -> sympy.Expr:
    """Operations that any W4A8 GEMM must do: multiplications and additions."""
    return 2 * spec.in_features * spec.out_features * TOKENS


def gemm_work(spec: LinearSpec, block_m: int, block_n: int, split: int = 1) -> Work:
    """The work of a tiled GEMM whose K is cut into `split` parts, each in a block of its own."""
    k_tiles = ceil_div(spec.in_features, GROUP)
    n_blocks = ceil_div(spec.out_features, block_n)
    m_blocks = sympy.ceiling(TOKENS / block_m)
    rereads = n_blocks * TOKENS * spec.in_features
    # a partial sum is written and read again
    partial = 0 if split == 1 else 2 * 4 * split * TOKENS * spec.out_features
    outputs = _token_bytes(spec) * TOKENS - TOKENS * spec.in_features
    return Work(
        memory=gemm_bytes(spec),
        l2=m_blocks * _weight_bytes(spec) + rereads + partial + outputs,
        operations=2 * m_blocks * block_m * n_blocks * block_n * k_tiles * GROUP,
        blocks=m_blocks * n_blocks * split,
    )


def _weight_bytes(spec: LinearSpec) -> int:
    k_tiles, n = ceil_div(spec.in_features, GROUP), spec.out_features
    words = k_tiles if spec.group_size == GROUP else 1
    return ceil_div(n, TILE_N) * TILE_N * k_tiles * GROUP // 2 + 4 * n * (words + 1)


def _token_bytes(spec: LinearSpec) -> int:
    """Bytes per token: its channels, scale and sum, the output, the residual."""
    results = spec.out_features * (2 if spec.has_residual else 1) // (2 if spec.glu else 1)
    return spec.in_features + 8 + results * spec.dtype.itemsize
