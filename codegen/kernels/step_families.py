"""The kernels of a decode step as families: constexprs and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.attention import has_ptx, lanes
from qoqc.codegen.kernels.pieces import depends_on
from qoqc.codegen.kernels.pieces_rotary import FORMS
from qoqc.codegen.kernels.step_append import step_append
from qoqc.codegen.kernels.step_attend import step_attend
from qoqc.codegen.kernels.step_call import takes_tiny
from qoqc.codegen.kernels.step_combine import step_combine
from qoqc.codegen.kernels.step_schedule import SHORTEST
from qoqc.codegen.kernels.step_selfcheck import (
    APPEND_SELFCHECK,
    ATTEND_SELFCHECK,
    COMBINE_SELFCHECK,
)
from qoqc.codegen.kernels.step_spec import StepSpec
from qoqc.codegen.kernels.step_trial import trial_append, trial_attend, trial_combine
from qoqc.ir.spec import PAGE
from qoqc.runtime.device import DeviceKey

STAGES = 3
"""One page ahead. Two do not pay: 8 warps of an SM keep memory busy (H200)."""

FUSED = 1
"""Whether step_attend turns q and puts the token in itself: on an H200 3 to 8 % faster than in two
launches, no faster where lengths differ. A tuning table may say 0 for another device."""

AHEAD = 1
"""Pages of its run that a block asks for before it waits for the kernel before, and while it hands
in a part. Two take 0.5 to 5 % longer on an H200."""

PARTS_AT_ONCE = 2048
"""Floats of parts that a warp of step_attend adds up at a time, of its registers' 8192."""


def bind_append(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_append`."""
    return {**_common_constexprs(spec, tile), **_token_constexprs(spec, tile)}


def bind_attend(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_attend`."""
    common, token = _common_constexprs(spec, tile), _token_constexprs(spec, tile)
    # the interpreter, which is where tiles have no PTX, multiplies bfloat16 by its bit pattern
    exact = spec.dtype is torch.float32 or common["ROUND_BF16"]
    block_v, group_r = token["BLOCK_V"], token["GROUP_R"]
    block_r = max(8, group_r)
    # with four warps Triton multiplies values by 16 columns and more by wgmma, where a thread has
    # runs of two codes: tiny ones need runs of four, since two of each four change places
    in_rows_of_four = tile.num_warps % 4 != 0 or block_r < 16
    return {
        **common,
        **token,
        "HAS_MASK": spec.has_mask,
        "HAS_SINKS": spec.has_sinks,
        "HAS_SOFTCAP": spec.has_softcap,
        "HAS_WINDOW": spec.has_window,
        "OPERAND": tl.float32 if exact else tl.float16 if token["TINY_CODES"] else common["KIND"],
        # weights are scaled to 2**14 at most, so fp16's 11 bits serve bf16 models too
        "WEIGHT": tl.float32 if exact else tl.float16,
        "TINY_VALUES": token["TINY_CODES"] and in_rows_of_four,
        "PTX": tile["PTX"],
        "FUSED": tile["FUSED"],
        "FETCH": AHEAD if tile["DEPENDENT"] else 0,  # both since sm_90
        "SHORT": tile["SHORT"],
        "BLOCK_R": block_r,
        "AT_ONCE": _at_once(group_r, block_v, tile),
    }


def _at_once(group: int, v_dim: int, tile: Tile) -> int:
    """How many parts of `group` x `v_dim` floats step_attend adds up at a time."""
    return max(1, min(4, PARTS_AT_ONCE * tile.num_warps // (group * v_dim)))


def bind_combine(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `step_combine`."""
    own = {name: tile[name] for name in ("SHORT", "COLUMNS", "AT_ONCE")}
    return {**_common_constexprs(spec, tile), "HAS_WINDOW": spec.has_window, **own}


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


def _token_constexprs(spec: StepSpec, tile: Tile) -> dict[str, Any]:
    """Those of what is done with the new token."""
    return {
        "K_DIM": spec.kv.k_dim,
        "BITS": spec.kv.bits,
        "FORM": FORMS[spec.form],
        "ROTATED": spec.rotated,
        "NORMED": spec.normed,
        "OFFSET": spec.offset,
        "ROUND_FIRST": spec.round_first,
        "TINY_CODES": takes_tiny(spec.kv.bits, spec.kv.k_dim, spec.dtype, tile),
        "BLOCK_C": lanes(spec.kv.k_dim // 2),
        "BLOCK_V": lanes(spec.kv.v_dim),
        "GROUP_R": triton.next_power_of_2(spec.heads // spec.kv.kv_heads),
    }


def _flags(device: DeviceKey) -> tuple[tuple[str, int], ...]:
    return (("PTX", has_ptx(device)), depends_on(device))


def _common(device: DeviceKey) -> tuple[tuple[str, int], ...]:
    """step_attend and step_combine must agree on SHORT, the least pages of a worker."""
    return (*_flags(device), ("SHORT", SHORTEST))


def heuristic_append(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """A warp for a key, a value and their queries."""
    return Tile(_flags(device), 1, 1)


def candidates_append(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps."""
    return [Tile(_flags(device), warps, 1) for warps in (1, 2, 4)]


def heuristic(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """One warp for eight rows of 128 channels; `size` = sequences. One launch: see FUSED."""
    return Tile((*_common(device), ("FUSED", FUSED)), _warps(spec, device), STAGES)


def candidates(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps times stages: in one launch, as of two only the second would be timed."""
    tiles = {heuristic(spec, size, device): None}
    for num_warps in (1, 2, 4):
        for num_stages in (3, 5, 7):
            tiles[Tile((*_common(device), ("FUSED", 1)), num_warps, num_stages)] = None
    return tuple(tiles)


def heuristic_combine(spec: StepSpec, size: int, device: DeviceKey) -> Tile:
    """32 channels of a head per block: a small batch offers few. One wait for up to 128 parts."""
    return Tile((*_common(device), ("COLUMNS", 32), ("AT_ONCE", 128)), 4, 1)


def candidates_combine(spec: StepSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Other widths, and numbers of parts at a time."""
    tiles = {heuristic_combine(spec, size, device): None}
    for columns, at_once, warps in ((32, 32, 4), (16, 128, 4), (32, 256, 8)):
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


def shared_bytes(spec: StepSpec, tile: Tile) -> int:
    """Estimate of a block's shared memory: staged pages and words, and exchanges between warps.

    Or parts that are added up, after all that.
    """
    width = max(2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim))
    page = PAGE * (2 * lanes(spec.kv.k_dim // 2) + lanes(spec.kv.v_dim)) * spec.kv.bits // 8
    staged = max(1, (tile.num_stages - 1) // 2) * (page + 2 * PAGE * 4)
    group: int = triton.next_power_of_2(spec.heads // spec.kv.kv_heads)
    attending = staged + max(8, group) * (width * 8 + PAGE * 2)
    v_dim = lanes(spec.kv.v_dim)
    return max(attending, _at_once(group, v_dim, tile) * group * v_dim * 4) + 2048


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
    trial_attend,
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
