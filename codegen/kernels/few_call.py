"""The call of a linear that takes few tokens and quantizes them itself: spec, checks, outputs.

What qoqc::quant_linear and qoqc::norm_linear compute, in one launch: every block of channels
normalizes and quantizes the tokens again, while its weights are on their way.
"""

from __future__ import annotations

import dataclasses

import torch

from qoqc.codegen.family import Kernel
from qoqc.codegen.kernels import gemm, quantize
from qoqc.codegen.kernels.gemm import GemmCall
from qoqc.codegen.kernels.norm_call import NormCall, NormSpec
from qoqc.ir.spec import LinearSpec

OP = "few_linear"
"""Its name in the table of ops and in tuning tables."""

MAX_TOKENS = 1
"""Tokens up to which one launch that repeats their quantization in every block replaces two.

On an H200 the four linears of a Llama-3-8B layer, quantization included, take 36 us with one token
instead of 51 us, and with two, whose products are one after the other, 51 us either way."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""y, the residual sum, the norm; the last two empty where not wanted."""


@dataclasses.dataclass(frozen=True)
class FewSpec:
    """A linear that quantizes its tokens, of the dtype it gives; after a norm of them, or none."""

    linear: LinearSpec
    norm: NormSpec | None = None


@dataclasses.dataclass(frozen=True)
class FewCall:
    """The tensors of one call, checked. `call_of` makes it.

    x, norm_residual        [..., K] of the dtype of the result, any strides
    norm_weight, norm_bias  [K] of that dtype, contiguous
    qweight, channel_scale, word, bias, residual  as in GemmCall
    """

    x: torch.Tensor
    norm_residual: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    qweight: torch.Tensor
    channel_scale: torch.Tensor
    word: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    spec: FewSpec

    @property
    def norm(self) -> NormSpec | None:
        """The norm before the quantization, or None."""
        return self.spec.norm

    @property
    def tokens(self) -> int:
        """The rows M."""
        return self.x.shape[:-1].numel()

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as [M, K] with neighbouring channels; copied if its strides do not allow that."""
        flat = x.reshape(self.tokens, self.spec.linear.in_features)
        return flat if flat.stride(1) == 1 else flat.contiguous()

    def empty_outputs(self) -> Outputs:
        """Room for the results, contiguous."""
        x, linear, norm = self.x, self.spec.linear, self.spec.norm
        width = linear.out_features // (2 if linear.glu else 1)
        summed = norm is not None and norm.has_residual
        kept = norm is not None and norm.keep
        return (
            torch.empty((*x.shape[:-1], width), dtype=linear.dtype, device=x.device),
            torch.empty(x.shape if summed else 0, dtype=x.dtype, device=x.device),
            torch.empty(x.shape if kept else 0, dtype=x.dtype, device=x.device),
        )

    def quantized(
        self, xq: torch.Tensor, token_scale: torch.Tensor, token_sum: torch.Tensor
    ) -> GemmCall:
        """The GEMM that is left of the call when its tokens have been quantized."""
        return GemmCall(
            xq,
            token_scale,
            token_sum,
            self.qweight,
            self.channel_scale,
            self.word,
            self.bias,
            self.residual,
            self.spec.linear,
        )


def takes(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a launch of these tokens [..., K], for a result of `dtype`, may be one of these."""
    return x.dtype == dtype and 0 < x.shape[:-1].numel() <= MAX_TOKENS


def call_of(
    x: torch.Tensor,
    norm: NormCall | None,
    qweight: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    glu: bool,
) -> FewCall:
    """The call behind the arguments of qoqc::quant_linear, or with `norm` of qoqc::norm_linear.

    norm  norm_call.call_of of the arguments that qoqc::norm_quant has, the same `x` among them

    Raises ValueError where shapes, dtypes or devices do not fit each other, and where `x` is not
    of the dtype of the result.
    """
    if norm is None:
        quantize.spec_of(x)
    gemm.check_weight(x, qweight, channel_scale, group_word, channel_zero, bias, residual, dtype)
    if glu:
        gemm.check_glu(channel_scale, residual)
    if x.dtype != dtype:
        raise ValueError(f"{OP}: x must be of the dtype of the result, {dtype}, got {x.dtype}")
    word = channel_zero if group_word is None else group_word
    assert word is not None
    linear = gemm.spec_of(x, channel_scale, group_word, bias, residual, dtype, glu)
    return FewCall(
        x=x,
        norm_residual=None if norm is None else norm.residual,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        qweight=qweight.contiguous(),
        channel_scale=channel_scale.contiguous(),
        word=word.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        residual=None if residual is None else residual.contiguous(),
        spec=FewSpec(linear, None if norm is None else norm.spec),
    )


def launch(kernel: Kernel, call: FewCall) -> Outputs:
    """y, the residual sum and the norm by `kernel`, a form of the op."""
    outputs = call.empty_outputs()
    start = kernel.family.start
    assert start is not None, f"{kernel.family.name} is no form of {OP}"
    start(kernel, call, outputs)
    return outputs
