"""What the launchers of the attention kernels share: specs, arguments, constexprs, trial data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.pieces import INTERPRETED_DEVICE
from qoqc.ir.spec import OUTPUT_DTYPES, PAGE, AttentionSpec, KVSpec
from qoqc.quant.kv import make_words
from qoqc.runtime.device import DeviceKey


@dataclasses.dataclass(frozen=True)
class Call:
    """The tensors of one kv4_attention call, named as in ir/ops.py."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    kv_words: torch.Tensor
    block_table: torch.Tensor
    length: torch.Tensor
    mask: torch.Tensor | None
    k_chunk: torch.Tensor | None
    v_chunk: torch.Tensor | None
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    window: int = 0

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k_pages.shape[1]

    @property
    def rows(self) -> int:
        """(query, head) pairs per sequence and KV head."""
        return self.q.shape[2] * self.group

    def empty_out(self) -> torch.Tensor:
        """An uninitialised output [B, Hq, S, Dv]."""
        return self.q.new_empty((*self.q.shape[:3], self.v_pages.shape[2]))

    def arguments(self) -> tuple[Any, ...]:
        """The arguments from q_ptr to v_chunk_stride_s that both templates begin with.

        Absent tensors are stood in for by q, which their flag keeps the kernel from reading.
        """
        q, bits, strides, mask_len = unit_stride(self.q), self.q, (0, 0, 0), 0
        if self.mask is not None:
            bits = unit_stride(self.mask).view(torch.uint8)
            b, h, s = (
                0 if size == 1 else stride
                for size, stride in zip(bits.shape[:3], bits.stride(), strict=False)
            )
            strides, mask_len = (b, h, s), bits.shape[3]
        k_chunk = v_chunk = q
        if self.k_chunk is not None and self.v_chunk is not None:
            k_chunk, v_chunk = unit_stride(self.k_chunk), unit_stride(self.v_chunk)
        return (
            q,
            *q.stride()[:3],
            self.k_pages,
            self.v_pages,
            self.kv_words,
            self.block_table,
            self.block_table.stride(0),
            self.length,
            self.length.stride(0),
            bits,
            *strides,
            mask_len,
            k_chunk,
            *k_chunk.stride()[:3],
            v_chunk,
            *v_chunk.stride()[:3],
        )


def spec_of(call: Call, bits: Literal[4, 8], causal: bool) -> AttentionSpec:
    """The spec of a call; ValueError for what the kernels do not take."""
    q, mask, chunk = call.q, call.mask, call.k_chunk
    batch, heads, seq, k_dim = q.shape
    kv = kv_spec_of(call.k_pages, call.v_pages, call.kv_words, call.block_table, bits)
    if q.dtype not in OUTPUT_DTYPES:
        raise ValueError(f"kv4_attention: q must be 16-bit or fp32 floating point, got {q.dtype}")
    if (
        k_dim != kv.k_dim
        or heads % kv.kv_heads
        or call.block_table.shape[0] != batch
        or call.length.shape != (batch,)
    ):
        raise ValueError(
            f"kv4_attention: q {tuple(q.shape)} does not fit pages of {kv.kv_heads} heads x "
            f"{kv.k_dim}, block_table {tuple(call.block_table.shape)} and length "
            f"{tuple(call.length.shape)}"
        )
    if mask is not None and (
        mask.dtype is not torch.bool
        or mask.dim() != 4
        or any(m not in (1, n) for m, n in zip(mask.shape, q.shape[:3], strict=False))
    ):
        raise ValueError(
            f"kv4_attention: mask must be bool [B or 1, Hq or 1, S, L] for q {tuple(q.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if (chunk is None) != (call.v_chunk is None):
        raise ValueError("kv4_attention: pass k_chunk and v_chunk, or neither")
    for x, dim in ((chunk, kv.k_dim), (call.v_chunk, kv.v_dim)):
        if x is not None and tuple(x.shape) != (batch, kv.kv_heads, seq, dim):
            raise ValueError(
                f"kv4_attention: a chunk is {tuple(x.shape)}, expected "
                f"{(batch, kv.kv_heads, seq, dim)}"
            )
    sinks = call.sinks
    if sinks is not None and (tuple(sinks.shape) != (heads,) or sinks.stride(0) != 1):
        raise ValueError(
            f"kv4_attention: sinks is {tuple(sinks.shape)} with strides {sinks.stride()}, expected "
            f"({heads},) without gaps"
        )
    # a single query sees all tokens before it, causal or not: one kernel for both
    causal = causal and seq > 1
    return AttentionSpec(
        heads, kv, q.dtype, mask is not None, chunk is not None, causal, bool(call.softcap),
        sinks is not None, has_window("kv4_attention", call.window),
    )  # fmt: skip


def has_window(op: str, window: int) -> bool:
    """Whether queries see their last `window` tokens only; ValueError for no such number."""
    if not 0 <= window < 2**31:
        raise ValueError(f"{op}: window={window}: expected a number of keys, or 0 for all")
    return window > 0


def kv_spec_of(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_words: torch.Tensor,
    block_table: torch.Tensor,
    bits: Literal[4, 8],
) -> KVSpec:
    """The format of a cache; ValueError unless it is laid out as the kernels address it."""
    pages, heads, tokens, k_bytes = k_pages.shape
    k_dim, v_dim = k_bytes * 8 // bits, v_pages.shape[2]
    shapes = ((pages, heads, v_dim, PAGE * bits // 8), (pages, heads, 2, PAGE))
    if tokens != PAGE or k_dim % 2 or (tuple(v_pages.shape), tuple(kv_words.shape)) != shapes:
        raise ValueError(
            f"not a KV cache of {bits} bits: k_pages {tuple(k_pages.shape)}, v_pages "
            f"{tuple(v_pages.shape)}, kv_words {tuple(kv_words.shape)}; see quant/kv.py"
        )
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages), ("kv_words", kv_words)):
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}: pass a contiguous tensor")
    gaps = block_table.shape[1] > 1 and block_table.stride(1) != 1
    if block_table.dtype is not torch.int32 or gaps:
        raise ValueError(
            f"block_table is {block_table.dtype} with strides {block_table.stride()}: "
            "pass int32 rows without gaps"
        )
    return KVSpec(heads, k_dim, v_dim, bits)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its last axis is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def lanes(size: int) -> int:
    """The padded width of a tile axis of `size` channels: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(size)))


def has_ptx(device: DeviceKey) -> int:
    """The PTX constexpr of tiles for `device`."""
    return int(device.name != INTERPRETED_DEVICE)


def round_bf16(spec: AttentionSpec, tile: Tile) -> bool:
    """Whether a kernel must round to bfloat16 itself: the interpreter cuts bits off instead."""
    return spec.dtype is torch.bfloat16 and not tile["PTX"]


def constexprs(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of both attention templates: the spec's and the tile's."""
    # the interpreter, which is where tiles have no PTX, multiplies bfloat16 by its bit pattern
    exact = spec.dtype is torch.float32 or round_bf16(spec, tile)
    narrow = tl.float16 if spec.dtype is torch.float16 else tl.bfloat16
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv.kv_heads,
        "K_DIM": spec.kv.k_dim,
        "V_DIM": spec.kv.v_dim,
        "BITS": spec.kv.bits,
        "HAS_MASK": spec.has_mask,
        "HAS_CHUNK": spec.has_chunk,
        "CAUSAL": spec.causal,
        "HAS_WINDOW": spec.has_window,
        "OPERAND": tl.float32 if exact else narrow,
        # weights are scaled to at most HEADROOM, so fp16's 11 bits serve bf16 models too
        "WEIGHT": tl.float32 if exact else tl.float16,
        "BLOCK_C": lanes(spec.kv.k_dim // 2),
        "BLOCK_V": lanes(spec.kv.v_dim),
        **dict(tile.constexprs),
    }


def trial_call(
    spec: AttentionSpec, batch: int, seq: int, cached: int, device: torch.device
) -> Call:
    """A call with random data: `cached` tokens before `seq` new ones in every sequence."""
    generator = torch.Generator(device).manual_seed(0)
    kv, length = spec.kv, cached + seq
    per_sequence = -(-length // PAGE)
    pages = batch * per_sequence

    def codes(*shape: int) -> torch.Tensor:
        options: dict[str, Any] = {"dtype": torch.uint8, "device": device}
        return torch.randint(0, 256, shape, generator=generator, **options)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(spec.dtype)

    scale = torch.rand(pages, kv.kv_heads, 2, PAGE, generator=generator, device=device) + 0.5
    top = 2**kv.bits - 1
    words = make_words((scale / top).half(), (-scale / 2).half())
    table = torch.randperm(pages, generator=generator, device=device)
    chunk = spec.has_chunk
    return Call(
        randn(batch, spec.heads, seq, kv.k_dim),
        codes(pages, kv.kv_heads, PAGE, kv.k_dim * kv.bits // 8),
        codes(pages, kv.kv_heads, kv.v_dim, PAGE * kv.bits // 8),
        words,
        table.view(batch, per_sequence).int(),
        torch.full((batch,), length, device=device),
        codes(batch, 1, seq, length) > 3 if spec.has_mask else None,
        randn(batch, kv.kv_heads, seq, kv.k_dim) if chunk else None,
        randn(batch, kv.kv_heads, seq, kv.v_dim) if chunk else None,
        kv.k_dim**-0.5,
        30.0 if spec.has_softcap else 0.0,
        randn(spec.heads) if spec.has_sinks else None,
        max(1, length // 3) if spec.has_window else 0,
    )
