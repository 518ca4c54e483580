"""The host side of kv_rotate_append.py: spec, tiles, arguments and launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qoqc.codegen.facts import by_facts
from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import has_ptx, kv_spec_of, unit_stride
from qoqc.codegen.kernels.kv_rotate_append import kv_rotate_append
from qoqc.codegen.kernels.kv_selfcheck import ROTATE_APPEND_SELFCHECK
from qoqc.codegen.kernels.pieces import check_device
from qoqc.codegen.kernels.pieces_rotary import FORMS
from qoqc.codegen.kernels.token_rows import empty_like
from qoqc.ir.spec import OUTPUT_DTYPES, PAGE, KVSpec
from qoqc.quant.kv import HALF_PAGE, empty_pages
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclasses.dataclass(frozen=True)
class RotateSpec:
    """Preparation of `heads` query heads and append to a `kv` cache; ir/ops.py kv4_rotate_append.

    rotated  channels that turn; 0 for the form "none"
    normed   RMSNorm over each head of q and k first, with `offset` and `round_first`
    """

    heads: int
    kv: KVSpec
    dtype: torch.dtype
    form: str = "half"
    rotated: int = 0
    normed: bool = False
    offset: float = 0.0
    round_first: bool = True


@dataclasses.dataclass(frozen=True)
class Append:
    """The arguments of one kv4_rotate_append call, named as in ir/ops.py."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    kv_words: torch.Tensor
    block_table: torch.Tensor
    start: torch.Tensor
    form: str
    eps: float
    offset: float
    round_first: bool
    bits: Literal[4, 8]


def launch(kernel: Launch, call: Append) -> tuple[torch.Tensor, torch.Tensor]:
    """kv4_rotate_append through `kernel`: q and k as attention reads them, contiguous.

    A token at a position of P * 64 or more is prepared and not written: the host does not know the
    positions. Raises ValueError for more than one token in a kernel of single ones.
    """
    batch, heads, seq, _ = call.q.shape
    kv_heads = call.k.shape[1]
    q_out, k_out = empty_like(call.q, call.q.dtype), empty_like(call.k, call.k.dtype)
    if q_out.numel() == 0:
        return q_out, k_out
    if kernel.tile["SINGLE"]:
        if seq != 1:
            raise ValueError(f"this kernel appends 1 token, got {seq}: choose by size")
        blocks = 1
    else:
        # a chunk of `seq` tokens that may start anywhere in a page touches so many pages
        blocks = ceil_div(seq + PAGE - 1, PAGE) * (HALF_PAGE // kernel.tile["BLOCK_J"])
    q, k, v = (unit_stride(x) for x in (call.q, call.k, call.v))
    angles: list[Any] = []
    for x in (call.cos, call.sin):
        x = q if x is None else unit_stride(x)
        angles += [x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)]
    appends = blocks * kv_heads
    turns = ceil_div(seq, kernel.tile["BLOCK_T"]) * ceil_div(heads, kernel.tile["BLOCK_H"])
    kernel(
        (appends + turns, batch),
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
        q if call.q_weight is None else call.q_weight,
        q if call.k_weight is None else call.k_weight,
        *angles, call.k_pages, call.v_pages, call.kv_words,
        call.block_table, call.block_table.stride(0), call.start, call.start.stride(0),
        q_out, k_out, call.eps, seq, call.block_table.shape[1], share_of(appends, turns),
    )  # fmt: skip
    return q_out, k_out


def share_of(appends: int, turns: int) -> int:
    """The part of the programs that append, beside `turns` others, times 2**31 and rounded up.

    In front of program p stand `p * share >> 31` that append: all of them in front of the last + 1.
    """
    return ceil_div(appends << 31, appends + turns)


def spec_of(call: Append) -> RotateSpec:
    """The spec of a call; ValueError, with the numbers, for what the kernel does not take."""
    return _checked_spec(*vars(call).values())


@by_facts
def _checked_spec(*arguments: Any) -> RotateSpec:
    call = Append(*arguments)
    check_device(
        "kv4_rotate_append", q=call.q, k=call.k, v=call.v, q_weight=call.q_weight,
        k_weight=call.k_weight, cos=call.cos, sin=call.sin, k_pages=call.k_pages,
        block_table=call.block_table, start=call.start,
    )  # fmt: skip
    kv = kv_spec_of(call.k_pages, call.v_pages, call.kv_words, call.block_table, call.bits)
    dtypes = [x.dtype for x in (call.q, call.k, call.v)]
    if dtypes[0] not in OUTPUT_DTYPES or len(set(dtypes)) > 1:
        raise ValueError(
            "kv4_rotate_append: q, k and v must have one 16-bit or fp32 floating-point dtype, got "
            + ", ".join(map(str, dtypes))
        )
    batch, heads, seq, k_dim = call.q.shape
    shapes = tuple(tuple(x.shape) for x in (call.k, call.v))
    wanted = ((batch, kv.kv_heads, seq, kv.k_dim), (batch, kv.kv_heads, seq, kv.v_dim))
    if k_dim != kv.k_dim or heads % kv.kv_heads or shapes != wanted:
        raise ValueError(
            f"kv4_rotate_append: q {tuple(call.q.shape)}, k {shapes[0]} and v {shapes[1]} do not "
            f"fit a cache of {kv.kv_heads} heads x {kv.k_dim} and {kv.v_dim}"
        )
    if call.start.shape != (batch,) or call.block_table.shape[0] != batch:
        raise ValueError(
            f"kv4_rotate_append: {batch} sequences, but start is {tuple(call.start.shape)} and "
            f"block_table {tuple(call.block_table.shape)}"
        )
    if (call.q_weight is None) != (call.k_weight is None):
        raise ValueError("kv4_rotate_append: pass q_weight and k_weight, or neither")
    for name, x in (("q_weight", call.q_weight), ("k_weight", call.k_weight)):
        if x is not None and (tuple(x.shape) != (k_dim,) or x.stride(0) != 1):
            raise ValueError(
                f"kv4_rotate_append: {name} is {tuple(x.shape)} with strides {x.stride()}, "
                f"expected ({k_dim},) without gaps"
            )
    rotated = _rotated(call)
    is_normed = call.q_weight is not None
    return RotateSpec(
        heads, kv, call.q.dtype, call.form if rotated else "none", rotated, is_normed,
        call.offset if is_normed else 0.0, call.round_first if is_normed else True,
    )  # fmt: skip


def _rotated(call: Append) -> int:
    """How many channels of a head turn."""
    if call.form not in FORMS:
        raise ValueError(
            f"kv4_rotate_append: form {call.form!r}, expected one of {', '.join(FORMS)}"
        )
    if call.form == "none":
        return 0
    batch, _, seq, k_dim = call.q.shape
    for name, x in (("cos", call.cos), ("sin", call.sin)):
        if x is None or x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != seq:
            raise ValueError(
                f"kv4_rotate_append: {name} {None if x is None else tuple(x.shape)} for q "
                f"{tuple(call.q.shape)}, expected [B or 1, S, R]"
            )
    assert call.cos is not None and call.sin is not None
    rotated = call.cos.shape[2]
    if call.sin.shape[2] != rotated or rotated > k_dim or rotated % 2:
        raise ValueError(
            f"kv4_rotate_append: {rotated} cosines and {call.sin.shape[2]} sines for {k_dim} "
            "channels, expected an even number of both"
        )
    return rotated


def bind(spec: RotateSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of the template."""
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv.kv_heads,
        "K_DIM": spec.kv.k_dim,
        "V_DIM": spec.kv.v_dim,
        "BITS": spec.kv.bits,
        "FORM": FORMS[spec.form],
        "ROTATED": spec.rotated,
        "NORMED": spec.normed,
        "OFFSET": spec.offset,
        "ROUND_FIRST": spec.round_first,
        "KIND": KINDS[spec.dtype],
        # the interpreter cuts bits off instead of rounding
        "ROUND_BF16": spec.dtype is torch.bfloat16 and not tile["PTX"],
        **dict(tile.constexprs),
        "BLOCK_K": triton.next_power_of_2(spec.kv.k_dim // 2),
        "BLOCK_V": triton.next_power_of_2(spec.kv.v_dim),
    }


def _tile(
    spec: RotateSpec, device: DeviceKey, single: int, block_j: int, rows: int, num_warps: int
) -> Tile:
    """`rows` queries of a program: heads of one token, of a few tokens if these have few heads."""
    padded = {width: ceil_div(spec.heads, width) * width for width in (32, 16) if width <= rows}
    # at most a quarter of the rows are none
    block_h = next((w for w, heads in padded.items() if 3 * heads <= 4 * spec.heads), 0)
    block_t = 1
    if not block_h:
        block_h = min(rows, 8, triton.next_power_of_2(spec.heads))
        block_t = 1 if single else rows // block_h
    values = {
        "PTX": has_ptx(device), "SINGLE": single, "BLOCK_J": block_j,
        "BLOCK_T": block_t, "BLOCK_H": block_h,
    }  # fmt: skip
    return Tile(tuple(values.items()), num_warps=num_warps, num_stages=1)


def heuristic(spec: RotateSpec, size: int, device: DeviceKey) -> Tile:
    """One slot for one token; else 2 x 8 tokens, and queries of 32 rows.

    A register of keys and angles each for every channel: more warps for wide or fp32 heads.
    """
    if size == 1:
        return _tile(spec, device, 1, 1, 4, 1)
    wide = triton.next_power_of_2(max(spec.kv.k_dim, spec.kv.v_dim)) > 128
    slow = wide or spec.dtype is torch.float32
    return _tile(spec, device, 0, 8, 32, 8 if slow else 4)


def candidates(spec: RotateSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tiles worth timing for `size` new tokens per sequence."""
    if size == 1:
        return [_tile(spec, device, 1, 1, 4, warps) for warps in (1, 2, 4)]
    sizes = ((4, 16, 2), (4, 32, 2), (8, 16, 4), (8, 32, 4), (16, 32, 8), (16, 32, 4), (32, 32, 8))
    return list(dict.fromkeys(_tile(spec, device, 0, *size) for size in sizes))


def random_call(
    spec: RotateSpec, batch: int, size: int, device: torch.device, cached: int = 0
) -> Append:
    """`size` random tokens for each of `batch` sequences of about `cached` tokens."""
    generator = torch.Generator(device).manual_seed(0)
    kv, per_sequence = spec.kv, ceil_div(cached + size, PAGE) + 1

    def projected(heads: int, dim: int) -> torch.Tensor:
        x = torch.randn(batch, size, heads, dim, generator=generator, device=device)
        return x.to(spec.dtype).transpose(1, 2)

    def weight() -> torch.Tensor | None:
        x = torch.rand(kv.k_dim, generator=generator, device=device) + 0.5
        return x.to(spec.dtype) if spec.normed else None

    turns = 6 * torch.rand(batch, size, spec.rotated, generator=generator, device=device)
    pages = empty_pages(batch * per_sequence, kv.kv_heads, kv.k_dim, kv.v_dim, kv.bits, device)
    table = torch.randperm(batch * per_sequence, generator=generator, device=device)
    return Append(
        projected(spec.heads, kv.k_dim), projected(kv.kv_heads, kv.k_dim),
        projected(kv.kv_heads, kv.v_dim), weight(), weight(),
        turns.cos().to(spec.dtype) if spec.rotated else None,
        turns.sin().to(spec.dtype) if spec.rotated else None,
        *pages, table.view(batch, per_sequence).int(),
        cached + torch.arange(batch, device=device) * PAGE // batch,
        spec.form, 1e-6, spec.offset, spec.round_first, kv.bits,
    )  # fmt: skip


def trial(spec: RotateSpec, size: int, device: torch.device) -> Trial:
    """Append `size` random tokens to each of 16 sequences.

    Keys are compared before they are quantized: behind a norm, whose sums depend on the tile, one
    step in 16 bit can be one of the codes.
    """
    call = random_call(spec, 16, size, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return (*launch(kernel, call), call.v_pages)

    return run


KV_ROTATE_APPEND = Family(
    "kv_rotate_append",
    kv_rotate_append,
    bind,
    heuristic,
    candidates,
    ROTATE_APPEND_SELFCHECK,
    trial,
    tolerance=1e-2,  # of a norm; without one not a bit differs
    fp_fusion=False,
)
