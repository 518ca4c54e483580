"""The host side of a decode step: spec, tiles, arguments, launches of its two or three kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import has_ptx, kv_spec_of, lanes, unit_stride
from qoqc.codegen.kernels.pieces_rotary import FORMS
from qoqc.codegen.kernels.step_append import step_append
from qoqc.codegen.kernels.step_attend import step_attend
from qoqc.codegen.kernels.step_combine import step_combine
from qoqc.codegen.kernels.step_schedule import SHORTEST, counters_for, grid_for
from qoqc.codegen.kernels.step_selfcheck import (
    APPEND_SELFCHECK,
    ATTEND_SELFCHECK,
    COMBINE_SELFCHECK,
)
from qoqc.ir.spec import OUTPUT_DTYPES, PAGE, KVSpec
from qoqc.quant.kv import empty_pages
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey, device_key
from qoqc.runtime.workspace import zeroed_counters

REGISTERS = 168
"""Of a thread, where a block is one warp: then an SM holds 12. ptxas keeps some values of the
start in local memory for it, none of the loop over pages (SASS of sm_90)."""

SLOTS_PER_SM = 12

STAGES = 3
"""One page ahead is enough with 12 blocks on an SM, and two would leave room for 10: 94 us instead
of 117 (64 sequences of 4,096 tokens, H200)."""

MEETING = 96
"""(sequence, KV head) pairs from which the last block of each adds up its parts itself."""


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """A decode step of `heads` query heads over a `kv` cache; ir/ops.py kv4_decode.

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
    has_mask: bool = False
    has_sinks: bool = False
    has_softcap: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """The arguments of one kv4_decode call, named as in ir/ops.py."""

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
    length: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    form: str
    eps: float
    offset: float
    round_first: bool
    scale: float
    softcap: float
    bits: Literal[4, 8]

    @property
    def batch(self) -> int:
        """Sequences, each with one new token."""
        return self.q.shape[0]


def spec_of(step: Step) -> StepSpec:
    """The spec of a step; ValueError, with the numbers, for what the kernel does not take."""
    q, mask = step.q, step.mask
    kv = kv_spec_of(step.k_pages, step.v_pages, step.kv_words, step.block_table, step.bits)
    if q.dtype not in OUTPUT_DTYPES:
        raise ValueError(f"kv4_decode: q must be 16-bit or fp32 floating point, got {q.dtype}")
    batch, heads, seq, k_dim = q.shape
    shapes = tuple(tuple(x.shape) for x in (step.k, step.v))
    wanted = ((batch, kv.kv_heads, 1, kv.k_dim), (batch, kv.kv_heads, 1, kv.v_dim))
    if seq != 1 or k_dim != kv.k_dim or heads % kv.kv_heads or shapes != wanted:
        raise ValueError(
            f"kv4_decode: q {tuple(q.shape)}, k {shapes[0]} and v {shapes[1]} do not fit a cache "
            f"of {kv.kv_heads} heads x {kv.k_dim} and {kv.v_dim} with one new token per sequence"
        )
    if step.length.shape != (batch,) or step.block_table.shape[0] != batch:
        raise ValueError(
            f"kv4_decode: {batch} sequences, but length is {tuple(step.length.shape)} and "
            f"block_table {tuple(step.block_table.shape)}"
        )
    rotated = _rotated(step, k_dim)
    if mask is not None and (
        mask.dtype is not torch.bool
        or mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or tuple(mask.shape[1:3]) != (1, 1)
    ):
        raise ValueError(
            f"kv4_decode: mask must be bool [B or 1, 1, 1, L] for q {tuple(q.shape)}, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    for name, x, size in (
        ("q_weight", step.q_weight, k_dim), ("k_weight", step.k_weight, k_dim),
        ("sinks", step.sinks, heads),
    ):  # fmt: skip
        if x is not None and (tuple(x.shape) != (size,) or x.stride(0) != 1):
            raise ValueError(f"kv4_decode: {name} is {tuple(x.shape)}, expected ({size},)")
    if (step.q_weight is None) != (step.k_weight is None):
        raise ValueError("kv4_decode: pass q_weight and k_weight, or neither")
    normed = step.q_weight is not None
    return StepSpec(
        heads,
        kv,
        q.dtype,
        step.form if rotated else "none",
        rotated,
        normed,
        step.offset if normed else 0.0,
        step.round_first if normed else True,
        mask is not None,
        step.sinks is not None,
        bool(step.softcap),
    )


def _rotated(step: Step, k_dim: int) -> int:
    """How many channels of a head turn."""
    if step.form not in FORMS:
        raise ValueError(f"kv4_decode: form {step.form!r}, expected one of {', '.join(FORMS)}")
    if step.form == "none":
        return 0
    cos, sin = step.cos, step.sin
    if cos is None or sin is None or cos.shape != sin.shape or cos.dim() != 3:
        raise ValueError(f"kv4_decode: form {step.form!r} needs cos and sin [B or 1, 1, R]")
    if cos.shape[0] not in (1, step.batch) or cos.shape[1] != 1:
        raise ValueError(f"kv4_decode: cos {tuple(cos.shape)} for q {tuple(step.q.shape)}")
    rotated = cos.shape[2]
    if rotated > k_dim or rotated % 2:
        raise ValueError(f"kv4_decode: {rotated} of {k_dim} channels turn, expected an even part")
    return rotated


def launch(
    append: Launch, attend: Launch, combine: Launch | None, step: Step, slots: int
) -> torch.Tensor:
    """Append and attend: the output [B, Hq, 1, Dv]; step.length counts the new tokens.

    combine  adds up parts in a launch of its own; None: the last worker of each sequence and head
    slots    workers the device holds at a time
    The grids follow from shapes alone, so the call can be captured in a CUDA graph.
    """
    batch, heads = step.q.shape[:2]
    out = step.q.new_empty(batch, heads, 1, step.v_pages.shape[2])
    if out.numel() == 0:
        step.length.add_(1)
        return out
    q = start_append(append, step)
    kv_heads, pages = step.k_pages.shape[1], step.block_table.shape[1]
    part, stat = parts_for(step, grid_for(batch, kv_heads, pages, slots))
    counters = zeroed_counters(q.device, counters_for(batch, kv_heads))
    start_attend(attend, step, q, out, part, stat, counters, meet=combine is None)
    if combine is not None:
        start_combine(combine, part, stat, out, step.length, counters, pages)
    return out


def start_append(kernel: Launch, step: Step) -> torch.Tensor:
    """Launch `step_append`; the turned queries [B, Hq, Dk]."""
    q, k, v = (unit_stride(x) for x in (step.q, step.k, step.v))
    batch, heads, _, k_dim = q.shape
    angles: list[Any] = []
    for x in (step.cos, step.sin):
        x = q if x is None else unit_stride(x)
        angles += [x, 0 if x.shape[0] == 1 else x.stride(0)]
    turned = q.new_empty(batch, heads, k_dim)
    kernel(
        (batch * k.shape[1],), q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2],
        q if step.q_weight is None else step.q_weight,
        q if step.k_weight is None else step.k_weight,
        *angles, step.k_pages, step.v_pages, step.kv_words,
        step.block_table, step.block_table.stride(0), step.length, step.length.stride(0),
        turned, step.eps, step.block_table.shape[1],
    )  # fmt: skip
    return turned


def parts_for(step: Step, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of `workers` workers: part and stat, see step_combine.py."""
    kv_heads, v_dim = step.v_pages.shape[1:3]
    shape = (workers, 2, step.q.shape[1] // kv_heads)
    return (
        step.q.new_empty(*shape, v_dim, dtype=torch.float32),
        step.q.new_empty(*shape, 2, dtype=torch.float32),
    )


def start_attend(
    kernel: Launch,
    step: Step,
    q: torch.Tensor,
    out: torch.Tensor,
    part: torch.Tensor,
    stat: torch.Tensor,
    counters: torch.Tensor,
    *,
    meet: bool,
) -> None:
    """Launch `step_attend` for turned queries q [B, Hq, Dk]."""
    mask: tuple[Any, ...] = (q, 0, 0)
    if step.mask is not None:
        bools = unit_stride(step.mask)
        stride = 0 if bools.shape[0] == 1 else bools.stride(0)
        mask = (bools.view(torch.uint8), stride, bools.shape[3])
    kernel(
        (part.shape[0],), q, step.k_pages, step.v_pages, step.kv_words,
        step.block_table, step.block_table.stride(0), step.length, step.length.stride(0),
        *mask, q if step.sinks is None else step.sinks, out, part, stat, counters,
        step.scale, step.softcap, step.batch, step.block_table.shape[1], int(meet),
    )  # fmt: skip


def start_combine(
    kernel: Launch,
    part: torch.Tensor,
    stat: torch.Tensor,
    out: torch.Tensor,
    length: torch.Tensor,
    counters: torch.Tensor,
    pages: int,
) -> None:
    """Launch `step_combine` on what `step_attend` left."""
    batch, heads, _, v_dim = out.shape
    grid = (batch * heads, ceil_div(v_dim, kernel.tile["COLUMNS"]))
    workers = part.shape[0]
    kernel(
        grid, part, stat, out, length, length.stride(0), counters, batch, pages, workers
    )  # fmt: skip


def meets(spec: StepSpec, batch: int) -> bool:
    """Whether the last block of a sequence and head adds up its parts: where they are few."""
    return batch * spec.kv.kv_heads >= MEETING


def bind_append(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_append`."""
    return {
        **_common_constexprs(spec, tile),
        "K_DIM": spec.kv.k_dim,
        "BITS": spec.kv.bits,
        "FORM": FORMS[spec.form],
        "ROTATED": spec.rotated,
        "NORMED": spec.normed,
        "OFFSET": spec.offset,
        "ROUND_FIRST": spec.round_first,
        "BLOCK_C": lanes(spec.kv.k_dim // 2),
        "BLOCK_V": lanes(spec.kv.v_dim),
        "GROUP_R": triton.next_power_of_2(spec.heads // spec.kv.kv_heads),
    }


def bind_attend(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_attend`."""
    common = _common_constexprs(spec, tile)
    # the interpreter, which is where tiles have no PTX, multiplies bfloat16 by its bit pattern
    exact = spec.dtype is torch.float32 or common["ROUND_BF16"]
    block_v, group_r = lanes(spec.kv.v_dim), triton.next_power_of_2(spec.heads // spec.kv.kv_heads)
    return {
        **common,
        "K_DIM": spec.kv.k_dim,
        "BITS": spec.kv.bits,
        "HAS_MASK": spec.has_mask,
        "HAS_SINKS": spec.has_sinks,
        "HAS_SOFTCAP": spec.has_softcap,
        "OPERAND": tl.float32 if exact else common["KIND"],
        # weights are scaled to 2**14 at most, so fp16's 11 bits serve bf16 models too
        "WEIGHT": tl.float32 if exact else tl.float16,
        "PTX": tile["PTX"],
        # fp16's 1024 would leave too little of the tensor cores' sums to scores
        "K_RAW": bool(tile["PTX"]) and spec.kv.bits == 4 and spec.dtype is torch.bfloat16,
        # whole lines of a page, as many as a power of two allows
        "K_LINES": _power_below(PAGE * spec.kv.k_dim * spec.kv.bits // 8 // 128),
        "V_LINES": _power_below(PAGE * spec.kv.v_dim * spec.kv.bits // 8 // 128),
        "SHORT": tile["SHORT"],
        "BLOCK_C": lanes(spec.kv.k_dim // 2),
        "BLOCK_V": block_v,
        "BLOCK_R": max(8, group_r),
        "GROUP_R": group_r,
        "AT_ONCE": max(1, min(4, 2048 * tile.num_warps // (group_r * block_v))),
    }


def bind_combine(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_combine`."""
    own = {name: tile[name] for name in ("SHORT", "COLUMNS", "AT_ONCE")}
    return {**_common_constexprs(spec, tile), **own}


def _common_constexprs(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv.kv_heads,
        "V_DIM": spec.kv.v_dim,
        "KIND": kinds[spec.dtype],
        "ROUND_BF16": spec.dtype is torch.bfloat16 and not tile["PTX"],
        "DEPENDENT": tile["DEPENDENT"],
    }


def _power_below(count: int) -> int:
    return 1 << max(0, count.bit_length() - 1)


def _flags(device: DeviceKey) -> tuple[tuple[str, int], ...]:
    ptx = has_ptx(device)
    return (("PTX", ptx), ("DEPENDENT", int(ptx and device.arch >= 90)))


def _common(device: DeviceKey) -> tuple[tuple[str, int], ...]:
    """step_attend and step_combine must agree on SHORT, the least pages of a worker."""
    return (*_flags(device), ("SHORT", SHORTEST))


def _tile(device: DeviceKey, num_warps: int, num_stages: int) -> Tile:
    registers = REGISTERS if num_warps == 1 else 0
    return Tile((*_common(device), ("MAX_REGISTERS", registers)), num_warps, num_stages)


def heuristic_append(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """A warp for a key, a value and their queries."""
    return Tile(_flags(device), 1, 1)


def candidates_append(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps."""
    return [Tile(_flags(device), warps, 1) for warps in (1, 2, 4)]


def heuristic(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """One warp for eight rows of 128 channels; `size` = sequences."""
    return _tile(device, _warps(spec, device), STAGES)


def candidates(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps times stages."""
    tiles = {heuristic(spec, size, device): None}
    for num_warps in (1, 2, 4):
        for num_stages in (3, 5, 7):
            tiles[_tile(device, num_warps, num_stages)] = None
    return tuple(tiles)


def heuristic_combine(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """32 channels of a head per block: a small batch offers few."""
    return Tile((*_common(device), ("COLUMNS", 32), ("AT_ONCE", 32)), 4, 1)


def candidates_combine(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Other widths, and numbers of parts at a time."""
    tiles = {heuristic_combine(spec, size, device): None}
    for columns, at_once, warps in ((32, 16, 2), (64, 16, 4), (32, 64, 8)):
        shape = (("COLUMNS", columns), ("AT_ONCE", at_once))
        tiles[Tile((*_common(device), *shape), warps, 1)] = None
    return tuple(tiles)


def _warps(spec: StepSpec, device: DeviceKey) -> int:
    """The fewer warps share rows, the fewer barriers; until registers run out."""
    width = max(2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim))
    if spec.dtype is torch.float32:
        width *= 4
    registers = width * max(8, triton.next_power_of_2(spec.heads // spec.kv.kv_heads))
    return 1 if registers <= 1024 and device.arch >= 90 else 2 if registers <= 1024 else 4


def slots_of(device: torch.device, tile: Tile) -> int:
    """Blocks of a tile that the device holds at a time."""
    sm_count: int = device_key(device).sm_count
    return sm_count * max(1, SLOTS_PER_SM // tile.num_warps)


def shared_bytes(spec: StepSpec, tile: Tile) -> int:
    """Estimate of a block's shared memory: staged pages and words, and exchanges between warps."""
    width = max(2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim))
    page = PAGE * (2 * lanes(spec.kv.k_dim // 2) + lanes(spec.kv.v_dim)) * spec.kv.bits // 8
    staged = max(1, (tile.num_stages - 1) // 2) * (page + 2 * PAGE * 4)
    rows: int = max(8, triton.next_power_of_2(spec.heads // spec.kv.kv_heads))
    return staged + rows * (width * 8 + PAGE * 2) + 2048


def random_step(spec: StepSpec, batch: int, cached: int, device: torch.device) -> Step:
    """A step with random data after `cached` tokens in each sequence."""
    generator = torch.Generator(device).manual_seed(0)
    kv, per_sequence = spec.kv, cached // PAGE + 1

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(spec.dtype)

    pages = empty_pages(batch * per_sequence, kv.kv_heads, kv.k_dim, kv.v_dim, kv.bits, device)
    for stored in pages[:2]:
        stored.random_(0, 256, generator=generator)
    pages[2].fill_(0x2C00 | (0xB800 << 16) - (1 << 32))  # scale 1/16, low -1/2
    table = torch.randperm(batch * per_sequence, generator=generator, device=device)
    turns = torch.rand(batch, 1, spec.rotated, generator=generator, device=device)
    mask = torch.ones(batch, 1, 1, per_sequence * PAGE, dtype=torch.bool, device=device)
    return Step(
        randn(batch, 1, spec.heads, kv.k_dim).transpose(1, 2),
        randn(batch, 1, kv.kv_heads, kv.k_dim).transpose(1, 2),
        randn(batch, 1, kv.kv_heads, kv.v_dim).transpose(1, 2),
        randn(kv.k_dim) if spec.normed else None,
        randn(kv.k_dim) if spec.normed else None,
        turns.cos() if spec.rotated else None,
        turns.sin() if spec.rotated else None,
        *pages,
        table.view(batch, per_sequence).int(),
        torch.full((batch,), cached, device=device),
        mask if spec.has_mask else None,
        randn(spec.heads) if spec.has_sinks else None,
        spec.form, 1e-6, spec.offset, spec.round_first, kv.k_dim**-0.5,
        30.0 if spec.has_softcap else 0.0, kv.bits,
    )  # fmt: skip


def trial_append(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """Append to `size` sequences of 1,000 tokens."""
    step = random_step(spec, size, 1000, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        turned = start_append(kernel, step)
        return turned, step.k_pages.clone(), step.v_pages.clone(), step.kv_words.clone()

    return run


def trial(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """Attend in `size` sequences after 1,000 tokens."""
    step = random_step(spec, size, 1000, device)
    kv, pages = spec.kv, step.block_table.shape[1]
    q = step.q[:, :, 0].contiguous()
    out = q.new_empty(size, spec.heads, 1, kv.v_dim)
    counters = zeroed_counters(device, counters_for(size, kv.kv_heads))

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        step.length.fill_(1000)
        out.fill_(float("nan"))
        workers = grid_for(size, kv.kv_heads, pages, slots_of(device, kernel.tile))
        start_attend(kernel, step, q, out, *parts_for(step, workers), counters, meet=True)
        return out.clone(), step.length.clone()

    return run


def trial_combine(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """Add up random parts of `size` sequences of 4,000 tokens."""
    generator = torch.Generator(device).manual_seed(0)
    kv, pages, slots = spec.kv, 64, device_key(device).sm_count * SLOTS_PER_SM
    shape = (grid_for(size, kv.kv_heads, pages, slots), 2, spec.heads // kv.kv_heads)
    part = torch.randn(*shape, kv.v_dim, generator=generator, device=device)
    stat = torch.rand(*shape, 2, generator=generator, device=device) + 0.5
    out = torch.empty(size, spec.heads, 1, kv.v_dim, dtype=spec.dtype, device=device)
    length = torch.full((size,), 4000, device=device)
    counters = zeroed_counters(device, counters_for(size, kv.kv_heads))

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        length.fill_(4000)
        out.fill_(float("nan"))
        start_combine(kernel, part, stat, out, length, counters, pages)
        return out.clone(), length.clone()

    return run


STEP_APPEND = Family(
    "step_append",
    step_append,
    bind_append,
    heuristic_append,
    candidates_append,
    APPEND_SELFCHECK,
    trial_append,
    pdl=True,
)

STEP_ATTEND = Family(
    "step_attend",
    step_attend,
    bind_attend,
    heuristic,
    candidates,
    ATTEND_SELFCHECK,
    trial,
    shared_bytes,
    tolerance=1e-2,
    pdl=True,
)

STEP_COMBINE = Family(
    "step_combine",
    step_combine,
    bind_combine,
    heuristic_combine,
    candidates_combine,
    COMBINE_SELFCHECK,
    trial_combine,
    tolerance=1e-2,
    pdl=True,
)
