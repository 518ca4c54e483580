"""The call of qoqc::norm_quant: spec, checks, and the random calls that tiles are tried on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch

from qoqc.codegen.facts import by_facts
from qoqc.codegen.family import Launch, TwinTrial
from qoqc.codegen.kernels.pieces import check_device
from qoqc.codegen.kernels.token_rows import empty_like, empty_quantized
from qoqc.ir.glue import NORM_KINDS, NormKind, norm_quant
from qoqc.ir.spec import OUTPUT_DTYPES

Outputs = tuple[torch.Tensor, ...]
"""xq, token_scale, token_sum, the residual sum, the norm; the last two empty where not wanted."""

COMPARED_ROWS = 256
"""Rows that the tuner compares with the definition: both ends and some between."""


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """Norm and quantization of tokens of `features` values of `dtype`; fields as ir/glue.norm."""

    features: int
    dtype: torch.dtype
    kind: NormKind = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    round_first: bool = False
    has_residual: bool = False
    has_weight: bool = True
    has_bias: bool = False
    keep: bool = False


@dataclasses.dataclass(frozen=True)
class NormCall:
    """The tensors of one call, checked. `call_of` makes it.

    x, residual   [..., K] of the spec's dtype, any strides
    weight, bias  [K] of the same dtype, contiguous
    """

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    spec: NormSpec

    @property
    def tokens(self) -> int:
        """The rows M."""
        return self.x.shape[:-1].numel()

    def empty_outputs(self) -> Outputs:
        """Room for the results, contiguous."""
        x, spec = self.x, self.spec
        return (
            *empty_quantized(x),
            empty_like(x, x.dtype) if spec.has_residual else x.new_empty(0),
            empty_like(x, x.dtype) if spec.keep else x.new_empty(0),
        )


def call_of(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
) -> NormCall:
    """The checked call; ValueError for what the kernel does not take."""
    spec = _checked_spec(
        x, residual, weight, bias, cast("NormKind", kind), eps, offset, round_first, keep
    )  # fmt: skip
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return NormCall(x, residual, weight, bias, spec)


@by_facts
def _checked_spec(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: NormKind,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
) -> NormSpec:
    if x.dtype not in OUTPUT_DTYPES or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"norm_quant: x must be bfloat16, float16 or float32 with at least one channel, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if kind not in NORM_KINDS:
        raise ValueError(f"norm_quant: kind {kind!r} is not one of {', '.join(NORM_KINDS)}")
    if kind == "layer" and (round_first or offset):
        raise ValueError("norm_quant: a layer norm has no round_first and no offset")
    if bias is not None and kind != "layer":
        raise ValueError(f"norm_quant: a bias goes with kind 'layer', not {kind!r}")
    check_device("norm_quant", x=x, residual=residual, weight=weight, bias=bias)
    shapes = {"residual": (residual, x.shape)}
    shapes |= {"weight": (weight, x.shape[-1:]), "bias": (bias, x.shape[-1:])}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"norm_quant: {name} must be {x.dtype} {tuple(shape)} as x is, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    return NormSpec(
        x.shape[-1],
        x.dtype,
        kind,
        eps,
        offset,
        round_first,
        residual is not None,
        weight is not None,
        bias is not None,
        keep,
    )


class NormTrial(TwinTrial):
    """A norm of `size` random tokens."""

    def __init__(
        self,
        start: Callable[[Launch, NormCall, Outputs], None],
        spec: NormSpec,
        size: int,
        device: torch.device,
    ) -> None:
        self._start = start
        self._calls = [random_call(spec, size, device)]
        self._outputs = self._calls[0].empty_outputs()

    def __call__(self, kernel: Launch, copy: int = 0) -> Outputs:
        """The outputs; the next call overwrites them."""
        self._start(kernel, self._calls[copy], self._outputs)
        return self._outputs

    def clear(self) -> None:
        """Fill the outputs with what no token gives."""
        for output in self._outputs:
            output.fill_(-128)

    @property
    def cold_bytes(self) -> int:
        """Bytes of the tokens: what a long prompt finds in memory, not in L2."""
        call = self._calls[0]
        tensors = (call.x,) if call.residual is None else (call.x, call.residual)
        return sum(t.numel() * t.element_size() for t in tensors)

    def rotate(self, copies: int) -> None:
        """Have `copies` equal batches of tokens in different memory."""
        first = self._calls[0]
        while len(self._calls) < copies:
            residual = None if first.residual is None else first.residual.clone()
            self._calls.append(dataclasses.replace(first, x=first.x.clone(), residual=residual))

    def expected(self) -> Outputs:
        """The definition, for the compared rows."""
        call, keep = self._calls[0], self._compared()
        residual = None if call.residual is None else call.residual[keep]
        spec = call.spec
        results = norm_quant(
            call.x[keep],
            residual,
            call.weight,
            call.bias,
            spec.kind,
            spec.eps,
            spec.offset,
            spec.round_first,
            spec.keep,
        )
        return tuple(result for result in results if result.numel())

    def sample(self, result: Outputs) -> Outputs:
        """The compared rows of the outputs that are not empty."""
        return tuple(output[self._compared()] for output in result if output.numel())

    def _compared(self) -> torch.Tensor:
        call = self._calls[0]
        count = min(COMPARED_ROWS, call.tokens)
        steps = torch.arange(count, device=call.x.device)
        return steps * max(call.tokens - 1, 0) // max(count - 1, 1)


def random_call(spec: NormSpec, size: int, device: torch.device) -> NormCall:
    """A call with `size` random tokens: the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(spec.dtype)

    return call_of(
        random(size, spec.features),
        random(size, spec.features) if spec.has_residual else None,
        random(spec.features) if spec.has_weight else None,
        random(spec.features) if spec.has_bias else None,
        spec.kind,
        spec.eps,
        spec.offset,
        spec.round_first,
        spec.keep,
    )
