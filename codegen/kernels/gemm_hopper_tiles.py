"""The tiles of the sm_90 GEMM: the legal ones, those worth timing, the heuristic's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.gemm_hopper import schedule, start
from qoqc.codegen.kernels.gemm_selfcheck import selfcheck
from qoqc.codegen.kernels.gemm_trial import trial_with
from qoqc.codegen.kernels.hopper.kernel import gemm_hopper_kernel
from qoqc.codegen.roofline import Work, gemm_work
from qoqc.ir.spec import GROUP, LinearSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

DEEPEST = 12
"""Stages beyond this bring nothing: memory latency is covered."""

_REGISTERS = {2: 240, 3: 160, 4: 112}
"""Registers of a consumer's thread, by consumer warpgroups of a block."""

# (BLOCK_N, ROWS, WAYS) by tokens per tile: those that won somewhere on an H200
_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    8: ((64, 1, 2), (128, 1, 2), (64, 1, 4), (128, 1, 4)),
    16: ((64, 1, 2), (128, 1, 2), (64, 1, 4), (128, 1, 4)),
    32: ((64, 1, 2), (128, 1, 2), (64, 2, 1), (128, 2, 1)),
    64: ((64, 1, 2), (128, 1, 2), (64, 2, 1), (128, 2, 1)),
    128: ((64, 1, 2), (64, 2, 1), (128, 2, 1), (64, 4, 1), (64, 3, 1)),
    256: ((64, 2, 1),),
}

# the model of `modelled_us`, from times on an H200
_FILL_US = 3.0  # launch, first stage, last store
_L2_BYTES_PER_US = 60_000  # per SM with all SMs reading; a lone one draws up to
_LONE_BYTES_PER_US = 80_000
_MEMORY_BYTES_PER_US = 50_000  # what an SM draws from memory, alone or not
_MACS_PER_US = {256: 6_000_000}  # per SM, by tokens per tile; tiles of fewer tokens:
_FEW_MACS_PER_US = 5_400_000
_READ_BYTES_PER_US = 4_200_000  # from memory, all SMs
_MEET_US = 2.5  # the blocks of a cut tile waiting for one another
_SUM_BYTES_PER_US = 60_000


def refuses(spec: LinearSpec, device: DeviceKey) -> str | None:
    """Why TMA and wgmma cannot serve this GEMM there."""
    if device.arch != 90:
        return f"it is for sm_90, this is sm_{device.arch}"
    if spec.dtype == torch.float32:
        return "it writes 16-bit results, not float32"
    k, n = spec.in_features, spec.out_features // (2 if spec.glu else 1)
    if not k or not n or k % 16 or n % 8:
        return f"TMA wants K % 16 == 0 and N % 8 == 0: K={k} N={n}"
    return None


def bind(spec: LinearSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `gemm_hopper_kernel`. N and K are arguments: shapes share a kernel."""
    return {
        "GROUPED": spec.group_size == GROUP,
        "HAS_BIAS": spec.has_bias,
        "HAS_RESIDUAL": spec.has_residual,
        "GLU": spec.glu,
        **dict(tile.constexprs),
    }


def tile_of(
    block_m: int,
    shape: tuple[int, int, int],
    stages: int,
    group_m: int = 8,
    split: int = 1,
    unroll: int | None = None,
) -> Tile:
    """A tile of `block_m` tokens and a `_SHAPES` entry; `unroll` None is the first of its kind."""
    block_n, rows, ways = shape
    constexprs = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "ROWS": rows,
        "WAYS": ways,
        "UNROLL": unroll or _unrolls(block_m, shape)[0],
        "STAGES": stages,
        "GROUP_M": group_m,
        "SPLIT": split,
        "REGISTERS": _REGISTERS[rows * ways],
    }
    return Tile(tuple(constexprs.items()), num_warps=4, num_stages=1)


def _unrolls(block_m: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """How many k tiles a warpgroup may take between two waits for all its products."""
    _, rows, ways = shape
    if block_m == 256 or rows * ways == 4:
        return (1,)  # no registers for a second k tile on its way
    if rows * ways == 2 and block_m <= 64:
        return (2, 4)
    return (2, 1) if ways == 2 else (2,)


def candidates(spec: LinearSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Every shape for tiles that hold the tokens or half or a quarter of them, deep and shallow."""
    widest = min(256, max(8, triton.next_power_of_2(size)))
    narrowest = widest if widest <= 64 else 64 if size <= 1024 else 128
    tiles: dict[Tile, None] = {}
    for block_m, shapes in _SHAPES.items():
        if not narrowest <= block_m <= widest:
            continue
        for shape in shapes:
            deep = _stages(spec, block_m, shape, device)
            # a shallow ring leaves room for the first stages of the next kernel's blocks
            depths = (deep, deep // 2) if block_m <= 64 and deep >= 6 else (deep,)
            for stages in depths:
                groups = (4, 8, 16) if size >= 2048 else (8,)
                # larger parts of tiles do not fit in registers twice, to be added up
                splits = (1, 2, 4) if block_m * shape[0] <= 8192 else (1,)
                unrolls = _unrolls(block_m, shape)[: None if stages == deep else 1]
                for group_m, split, unroll in itertools.product(groups, splits, unrolls):
                    tile = tile_of(block_m, shape, stages, group_m, split, unroll)
                    if deep >= 2 and (split == 1 or _cuts(spec, size, tile, device)):
                        tiles[tile] = None
    return tuple(tiles)


def heuristic(spec: LinearSpec, size: int, device: DeviceKey) -> Tile:
    """The candidate with the least modelled time, of those that the model fits well.

    Where memory is the limit and all take the same, the one with the most channels.
    """
    return min(
        (tile for tile in candidates(spec, size, device) if _is_modelled_well(tile, size)),
        key=lambda t: (modelled_us(spec, size, t, device), -t["ROWS"] * t["BLOCK_N"]),
    )


def _is_modelled_well(tile: Tile, size: int) -> bool:
    """No, where a chain of dependent steps is what takes the time, on an H200."""
    if tile["ROWS"] > 1 and tile["SPLIT"] > 1 or tile["BLOCK_M"] < 128 and size > 256:
        return False
    if tile["BLOCK_M"] < 64:
        return True
    return (
        tile["BLOCK_N"] == 64 if tile["WAYS"] > 1 else tile["BLOCK_M"] > 64 or tile["BLOCK_N"] > 64
    )


def modelled_us(spec: LinearSpec, size: int, tile: Tile, device: DeviceKey) -> float:
    """A launch's time: filling the pipe, then L2, memory or the tensor cores, then cut tiles."""
    k_tiles = ceil_div(spec.in_features, GROUP)
    plan = schedule(size, spec.out_features, k_tiles, tile, device.sm_count)
    block_m, rows_n, ways = tile["BLOCK_M"], tile["ROWS"] * tile["BLOCK_N"], tile["WAYS"]
    tiles = ceil_div(size, block_m) * ceil_div(spec.out_features, rows_n)
    drawn = min(_LONE_BYTES_PER_US, _L2_BYTES_PER_US * device.sm_count / plan.blocks)
    macs = _MACS_PER_US.get(block_m, _FEW_MACS_PER_US)
    w_bytes = rows_n * (GROUP // 2 + _word_bytes(spec))
    k_bytes = block_m * GROUP + w_bytes
    per_k_tile = max(
        k_bytes / drawn,
        # tiles of other tokens find the weights in L2
        w_bytes / _MEMORY_BYTES_PER_US if size <= block_m else 0.0,
        block_m * rows_n * GROUP / macs,
    )
    # a whole number of tiles for the busiest block, and its part of a cut one
    turns = ceil_div(tiles - plan.cut, plan.blocks) + (1 / plan.parts if plan.cut else 0)
    busy = turns * ceil_div(k_tiles, ways * tile["UNROLL"]) * ways * tile["UNROLL"] * per_k_tile
    weight = spec.out_features * k_tiles * (GROUP // 2 + _word_bytes(spec))
    sums = (plan.parts - 1) * 4 * block_m * rows_n
    meet = _MEET_US + sums / _SUM_BYTES_PER_US if plan.cut else 0.0
    return _FILL_US + max(busy, weight / _READ_BYTES_PER_US) + meet


def shared_bytes(spec: LinearSpec, tile: Tile) -> int:
    """The ring of stages, y on its way out, the sums of the ways, barriers."""
    block_m, block_n, rows, ways = (tile[n] for n in ("BLOCK_M", "BLOCK_N", "ROWS", "WAYS"))
    return tile["STAGES"] * _stage_bytes(spec, block_m, (block_n, rows, ways)) + _fixed_bytes(
        block_m, (block_n, rows, ways)
    )


def work(spec: LinearSpec, tile: Tile, device: DeviceKey) -> Work:
    """What the blocks of a tile do together."""
    return gemm_work(spec, tile["BLOCK_M"], tile["ROWS"] * tile["BLOCK_N"], tile["SPLIT"])


def _stages(spec: LinearSpec, block_m: int, shape: tuple[int, int, int], device: DeviceKey) -> int:
    free = device.shared_bytes - _fixed_bytes(block_m, shape)
    return min(DEEPEST, free // _stage_bytes(spec, block_m, shape))


def _stage_bytes(spec: LinearSpec, block_m: int, shape: tuple[int, int, int]) -> int:
    block_n, rows, ways = shape
    return ways * (block_m * GROUP + rows * block_n * (GROUP // 2 + _word_bytes(spec)))


def _fixed_bytes(block_m: int, shape: tuple[int, int, int]) -> int:
    block_n, rows, ways = shape
    return rows * block_m * block_n * (2 + 4 * (ways - 1)) + 1024


def _word_bytes(spec: LinearSpec) -> int:
    return 4 if spec.group_size == GROUP else 0


def _cuts(spec: LinearSpec, size: int, tile: Tile, device: DeviceKey) -> bool:
    """Does the tile's split come into play?"""
    k_tiles = ceil_div(spec.in_features, GROUP)
    plan = schedule(size, spec.out_features, k_tiles, tile, device.sm_count)
    return plan.parts > tile["SPLIT"] // 2


SELFCHECK_LAUNCH = """
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

def boxes(tensor, shape, kind):
    layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
    return TensorDescriptor.from_tensor(tensor, shape, layout)

xq, token_scale, token_sum, w, channel_scale, word, bias, residual = arguments
block_m, block_n, rows = TILE["BLOCK_M"], TILE["BLOCK_N"], TILE["ROWS"]
kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n * rows)
parts = min(TILE["SPLIT"], triton.cdiv(k_tiles, TILE["WAYS"] * TILE["UNROLL"]))
sms = torch.cuda.get_device_properties(device).multi_processor_count
cut = tiles if parts > 1 and tiles * parts <= sms else 0
parts = parts if cut else 1
sums = torch.empty(max(1, cut * parts) * rows * block_n * block_m, dtype=torch.int32, device=device)
counters = torch.zeros(max(1, cut) * rows, dtype=torch.int32, device=device)
w_boxes = boxes(w.view(-1, 128), [block_n // 2, 128], gl.uint8)
out = boxes(y, [block_m, block_n // 2 if SPEC["glu"] else block_n], kind)
grid = (min(tiles + cut * (parts - 1), sms),)
gemm_hopper_kernel[grid](
    boxes(xq, [block_m, 128], gl.int8), w_boxes,
    boxes(word, [1, block_n], gl.int32) if grouped else w_boxes, out,
    boxes(residual, [block_m, block_n], kind), token_scale, token_sum, channel_scale, word, bias,
    sums, counters, m, n, k_tiles, 0, cut, parts, **options,
)
"""

GEMM_HOPPER = Family(
    "gemm_hopper",
    gemm_hopper_kernel,
    bind,
    heuristic,
    candidates,
    selfcheck(SELFCHECK_LAUNCH),
    trial_with(start),
    shared_bytes,
    start=start,
    refuses=refuses,
    work=work,
    pdl=True,
)
