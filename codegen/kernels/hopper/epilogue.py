"""What happens to the int32 sums of a tile: parts of other blocks, scales, the store."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def by_channel(pointer, first_n, N, BLOCK_N: gl.constexpr, MMA: gl.constexpr):
    """A value per channel [BLOCK_N]: from memory, as weights are, so better asked for early."""
    offs_n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    return gl.load(pointer + offs_n, mask=offs_n < N, other=0)


@gluon.jit
def by_token(pointer, first_m, M, BLOCK_M: gl.constexpr):
    """A value per token [BLOCK_M], each held once: 256 of them take two registers of a thread."""
    offs_m = first_m + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(pointer + offs_m, mask=offs_m < M, other=0)


@gluon.jit
def as_columns(values, buffer, BLOCK_M: gl.constexpr, MMA: gl.constexpr):
    """Values per token [BLOCK_M] in every thread that has the token's sums, by a free buffer.

    Loaded like that they would be a load, a mask and a register for each column of a thread.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    line = buffer._reinterpret(values.dtype, [BLOCK_M], FLAT)
    line.store(values)
    gl.thread_barrier()
    columns = line.load(gl.SliceLayout(0, MMA))
    gl.thread_barrier()
    return columns


@gluon.jit
def add_parts(
    acc, workspace_ptr, counter_ptr, tile, parts,
    ROW: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Leave a part of a cut tile's sums and, as the last to arrive, take all the others.

    Returns (sums, whether they are complete). The parts of tile t are the first turns of the
    blocks t * parts and up; each block leaves its sums in the slot of its number.
    """
    pid = gl.program_id(0)
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    cell = gl.expand_dims(offs_n, 1) * BLOCK_M + gl.expand_dims(offs_m, 0)
    cell += ROW * (BLOCK_N * BLOCK_M)
    counter = counter_ptr + tile * ROWS + ROW
    gl.store(workspace_ptr + pid * (ROWS * BLOCK_N * BLOCK_M) + cell, acc)
    # every thread's store comes before the release of the counter below
    gl.thread_barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel")
    complete = arrived == parts - 1
    if complete:
        gl.thread_barrier()
        for part in gl.static_range(SPLIT):
            block = tile * parts + part
            there = workspace_ptr + block * (ROWS * BLOCK_N * BLOCK_M) + cell
            wanted = (part < parts) & (block != pid)
            # .cg: not from this SM's L1, which does not see other SMs' stores
            acc += gl.load(there, mask=wanted, other=0, cache_modifier=".cg")
        # ready for the next launch
        gl.store(counter, 0)
    return acc, complete


@gluon.jit
def finish(
    acc, channel_scale, token_scale, y_desc, residual_desc, y_buffer, loaded, finished, bias_ptr,
    first_m, first_n, N, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GLU: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scale the sums [BLOCK_N, BLOCK_M] and store them as y, in the order of the reference.

    The buffer must be free. `finished` counts the tiles: the parity of the residual's barrier.
    """
    if HAS_RESIDUAL:
        # the buffer has just been read by threads
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.expect(loaded, BLOCK_M * BLOCK_N * 2)
        tma.async_copy_global_to_shared(residual_desc, [first_m, first_n], loaded, y_buffer)
    y = acc.to(gl.float32) * gl.expand_dims(channel_scale, 1) * gl.expand_dims(token_scale, 0)
    if HAS_BIAS:
        offs_n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        y += gl.expand_dims(bias.to(gl.float32), 1)
    if HAS_RESIDUAL:
        mbarrier.wait(loaded, finished & 1)
        y += y_buffer.permute((1, 0)).load(MMA).to(gl.float32)
        gl.thread_barrier()
    if GLU:
        y = silu_product(y, y_desc.dtype, BLOCK_M, BLOCK_N)
        first_n = first_n // 2
    y_buffer.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(y_desc, [first_m, first_n], y_buffer)


@gluon.jit
def silu_product(y, KIND: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """silu(gate) * up of rows that are eight of gate and eight of up in turn (quant/glu.py).

    A thread holds row r and row r + 8 of each 16: gate and up meet in its registers.
    """
    y = y.to(KIND).to(gl.float32)
    pairs = y.reshape([BLOCK_N // 16, 2, 8, BLOCK_M]).permute([0, 2, 3, 1])
    gate, up = pairs.split()
    act = (gate / (1.0 + gl.exp(-gate))).to(KIND).to(gl.float32)
    return (act * up).reshape([BLOCK_N // 2, BLOCK_M])
