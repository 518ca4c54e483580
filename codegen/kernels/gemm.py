"""The call of qoqc::w4a8_linear, whatever form of kernel serves it: checks, spec, launch.

y[M, N] = (xq[M, K] @ w[N, K].T) * channel_scale * token_scale + bias + residual: xq int8, w as
packed tiles (quant/pack.py) with group words or channel zeros (quant/weight.py), int32 sums over
all of K, then an fp32 epilogue in the order of reference.int8_linear. Every form gives its bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qoqc.codegen.facts import by_facts
from qoqc.codegen.family import Kernel
from qoqc.codegen.kernels.pieces import check_device
from qoqc.ir.spec import GROUP, OUTPUT_DTYPES, TILE_N, LinearSpec
from qoqc.quant.glu import TURN
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class GemmCall:
    """The tensors of one call, checked and contiguous. `call_of` makes it.

    xq             int8 [..., K], `tokens` rows
    token_scale    fp32 [...]
    token_sum      int32 [...], the sums of xq's rows
    qweight        uint8 [ceil(N/128), ceil(K/128), 128, 64]
    channel_scale  fp32 [N]
    word           int32: group words [ceil(K/128), N] where `spec` is g128, else zeros [N]
    bias           [N] or None
    residual       [..., N] or None
    spec           `glu` where the rows of the weight are gate and up in turn
    """

    xq: torch.Tensor
    token_scale: torch.Tensor
    token_sum: torch.Tensor
    qweight: torch.Tensor
    channel_scale: torch.Tensor
    word: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    spec: LinearSpec

    @property
    def tokens(self) -> int:
        """The rows M of the product."""
        return self.token_scale.numel()

    def packed(self) -> PackedWeight:
        """The weight."""
        grouped = self.spec.group_size == GROUP
        return PackedWeight(
            self.qweight,
            self.channel_scale,
            self.word if grouped else None,
            None if grouped else self.word,
            self.spec.out_features,
            self.spec.in_features,
        )

    def empty_out(self) -> torch.Tensor:
        """Room for the result, contiguous [..., N] ([..., N / 2] with glu) of the spec's dtype."""
        width = self.spec.out_features // (2 if self.spec.glu else 1)
        shape = (*self.xq.shape[:-1], width)
        return torch.empty(shape, dtype=self.spec.dtype, device=self.xq.device)


def call_of(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    token_sum: torch.Tensor,
    qweight: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    glu: bool = False,
) -> GemmCall:
    """The call behind the arguments of qoqc::w4a8_linear; what is not contiguous is copied.

    With `glu` those of qoqc::w4a8_glu, which has no residual.

    Raises ValueError where shapes, dtypes or devices do not fit each other.
    """
    spec = _checked_spec(
        xq, token_scale, token_sum, qweight, channel_scale, group_word, channel_zero, bias,
        residual, dtype, glu,
    )  # fmt: skip
    word = channel_zero if group_word is None else group_word
    assert word is not None
    return GemmCall(
        xq=xq.contiguous(),
        token_scale=token_scale.contiguous(),
        token_sum=token_sum.contiguous(),
        qweight=qweight.contiguous(),
        channel_scale=channel_scale.contiguous(),
        word=word.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        residual=None if residual is None else residual.contiguous(),
        spec=spec,
    )


@by_facts
def _checked_spec(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    token_sum: torch.Tensor,
    qweight: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    glu: bool,
) -> LinearSpec:
    check(
        xq, token_scale, token_sum, qweight, channel_scale, group_word, channel_zero, bias,
        residual, dtype,
    )  # fmt: skip
    if glu:
        check_glu(channel_scale, residual)
    return spec_of(xq, channel_scale, group_word, bias, residual, dtype, glu)


def launch(kernel: Kernel, call: GemmCall) -> torch.Tensor:
    """y by the form that `kernel` is of. An empty y launches nothing."""
    y = call.empty_out()
    if y.numel():
        start = kernel.family.start
        assert start is not None, f"{kernel.family.name} is no form of a GEMM"
        start(kernel, call, y)
    return y


def spec_of(
    xq: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    glu: bool = False,
) -> LinearSpec:
    """The spec of a call."""
    return LinearSpec(
        in_features=xq.shape[-1],
        out_features=channel_scale.shape[0],
        group_size=-1 if group_word is None else 128,
        dtype=dtype,
        has_bias=bias is not None,
        has_residual=residual is not None,
        glu=glu,
    )


def check(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    token_sum: torch.Tensor,
    qweight: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError, with the numbers, where the arguments of w4a8_linear disagree."""
    tokens, k = xq.shape[:-1], xq.shape[-1]
    check_device(
        "w4a8_linear", xq=xq, token_scale=token_scale, token_sum=token_sum, qweight=qweight,
        channel_scale=channel_scale, group_word=group_word, channel_zero=channel_zero, bias=bias,
        residual=residual,
    )  # fmt: skip
    check_weight(
        xq, qweight, channel_scale, group_word, channel_zero, bias, residual, dtype
    )  # fmt: skip
    _expect("xq", xq, (torch.int8,), (*tokens, k))
    _expect("token_scale", token_scale, (torch.float32,), tokens)
    _expect("token_sum", token_sum, (torch.int32,), tokens)


def check_weight(
    x: torch.Tensor,
    qweight: torch.Tensor,
    channel_scale: torch.Tensor,
    group_word: torch.Tensor | None,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The same for everything but the activations `x` [..., K], in whatever form they come."""
    check_device(
        "w4a8_linear", x=x, qweight=qweight, channel_scale=channel_scale, group_word=group_word,
        channel_zero=channel_zero, bias=bias, residual=residual,
    )  # fmt: skip
    if (group_word is None) == (channel_zero is None):
        raise ValueError("w4a8_linear takes group_word (g128) or channel_zero (per channel): one")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"w4a8_linear gives bfloat16, float16 or float32, not {dtype}")
    tokens, k, n = x.shape[:-1], x.shape[-1], channel_scale.shape[0]
    k_tiles = ceil_div(k, GROUP)
    _expect("qweight", qweight, (torch.uint8,), (ceil_div(n, TILE_N), k_tiles, TILE_N, GROUP // 2))
    _expect("channel_scale", channel_scale, (torch.float32,), (n,))
    _expect("group_word", group_word, (torch.int32,), (k_tiles, n))
    _expect("channel_zero", channel_zero, (torch.int32,), (n,))
    _expect("bias", bias, OUTPUT_DTYPES, (n,))
    # of the output's dtype: it may share the output's buffer on the chip
    _expect("residual", residual, (dtype,), (*tokens, n))


def check_glu(channel_scale: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raise ValueError for what no linear with `glu` takes."""
    if channel_scale.shape[0] % (2 * TURN) or residual is not None:
        raise ValueError(
            f"w4a8_glu takes gate and up in turns of {TURN} rows and no residual, "
            f"got {channel_scale.shape[0]} rows"
        )


def _expect(
    name: str, tensor: torch.Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int]
) -> None:
    if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != shape):
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"w4a8_linear: {name} must be {wanted} {tuple(shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
