"""What the tuner runs a form of the GEMM on: random tokens, a random weight, cold copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qoqc.codegen.family import Launch
from qoqc.codegen.kernels.gemm import GemmCall, call_of
from qoqc.codegen.kernels.weight_trial import WeightTrial
from qoqc.ir.reference import int8_glu, int8_linear
from qoqc.ir.spec import GROUP, TILE_N, LinearSpec
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import expand_int8, rows

Start = Callable[[Launch, GemmCall, torch.Tensor], None]
"""The launcher of a form: kernel, checked tensors, room for the result."""

CHUNK = 4096
"""Channels the definition works on at a time: on a GPU it holds their weights in fp64."""

COMPARED_ROWS = 256
"""Rows compared with the definition, which is slow: both ends and some between."""


class GemmTrial(WeightTrial[GemmCall]):
    """`size` random tokens times a random weight, by the form that `start` launches."""

    def __init__(self, start: Start, spec: LinearSpec, size: int, device: torch.device) -> None:
        self._start = start
        self._calls = [random_call(spec, size, device)]
        self._y = self._calls[0].empty_out()

    def __call__(self, kernel: Launch, copy: int = 0) -> tuple[torch.Tensor, ...]:
        """The product; the next call overwrites it."""
        if self._y.numel():
            self._start(kernel, self._calls[copy], self._y)
        return (self._y,)

    def clear(self) -> None:
        """Fill the product with NaN."""
        self._y.fill_(float("nan"))

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The op's definition, for the compared rows."""
        return (definition(self._calls[0], self._compared()),)

    def sample(self, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The compared rows of a result."""
        return (result[0][self._compared()],)

    def _compared(self) -> torch.Tensor:
        call = self._calls[0]
        count = min(COMPARED_ROWS, call.tokens)
        # in int64: linspace in fp32 would round the last row of a long batch
        steps = torch.arange(count, device=call.xq.device)
        return steps * max(call.tokens - 1, 0) // max(count - 1, 1)


def definition(call: GemmCall, keep: torch.Tensor) -> torch.Tensor:
    """What the op's definition gives for the tokens `keep` of a call, made of 2-d tensors."""
    residual = None if call.residual is None else call.residual[keep]
    parts = []
    for first in range(0, max(call.spec.out_features, 1), CHUNK):
        some = slice(first, min(first + CHUNK, call.spec.out_features))
        w8 = expand_int8(rows(call.packed(), some.start, some.stop))
        x, scale, dtype = call.xq[keep], call.token_scale[keep], call.spec.dtype
        bias = None if call.bias is None else call.bias[some]
        if call.spec.glu:
            parts.append(int8_glu(x, scale, w8, call.channel_scale[some], bias, dtype))
        else:
            added = None if residual is None else residual[:, some]
            parts.append(int8_linear(x, scale, w8, call.channel_scale[some], bias, added, dtype))
    return torch.cat(parts, 1)


def trial_with(start: Start) -> Callable[[LinearSpec, int, torch.device], GemmTrial]:
    """The `trial` of the family whose launcher is `start`."""

    def trial(spec: LinearSpec, size: int, device: torch.device) -> GemmTrial:
        return GemmTrial(start, spec, size, device)

    return trial


def random_call(spec: LinearSpec, size: int, device: torch.device) -> GemmCall:
    """A call with `size` random tokens and a random weight: the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    n, k = spec.out_features, spec.in_features
    n_tiles, k_tiles = ceil_div(n, TILE_N), ceil_div(k, GROUP)

    def integers(low: int, high: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    xq = integers(-127, 128, (size, k), torch.int8)
    # zero = 8: every scale up to 16 keeps zero * scale <= 128 and (15 - zero) * scale <= 127
    scale = integers(1, 17, (k_tiles, n), torch.int32)
    grouped = spec.group_size == GROUP
    arguments: dict[str, Any] = {
        "xq": xq,
        "token_scale": floats(size) * 0.01,
        "token_sum": xq.sum(1, dtype=torch.int32),
        "qweight": integers(0, 256, (n_tiles, k_tiles, TILE_N, GROUP // 2), torch.uint8),
        "channel_scale": floats(n) * 0.01,
        "group_word": scale | ((128 - 8 * scale) << 8) if grouped else None,
        "channel_zero": None if grouped else integers(0, 16, (n,), torch.int32),
        "bias": floats(n).to(spec.dtype) if spec.has_bias else None,
        "residual": floats(size, n).to(spec.dtype) if spec.has_residual else None,
    }
    return call_of(**arguments, dtype=spec.dtype, glu=spec.glu)
