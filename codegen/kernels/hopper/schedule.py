"""Which part of which tile a persistent block works on, turn by turn."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def next_part(turn, work):
    """(tile, first step, last step, next turn) of what a block does at `turn`.

    Turns below `cut * parts` are parts of tiles that are cut along K, the others whole tiles.
    """
    tiles_m, tiles_n, steps, cut, parts = work
    tile = turn // parts
    part = turn - tile * parts
    first = part * steps // parts
    last = (part + 1) * steps // parts
    if tile >= cut:
        tile = turn - cut * parts + cut
        first = 0
        last = steps
    return tile, first, last, turn + gl.num_programs(0)


@gluon.jit
def turns(work):
    """How many turns there are for all blocks together."""
    tiles_m, tiles_n, steps, cut, parts = work
    return tiles_m * tiles_n + cut * (parts - 1)


@gluon.jit
def place(tile, work, GROUP_M: gl.constexpr):
    """Tile number -> (token block, channel block), GROUP_M token blocks sharing weights in L2."""
    tiles_m, tiles_n, steps, cut, parts = work
    group = tile // (GROUP_M * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    rest = tile - group * GROUP_M * tiles_n
    return group * GROUP_M + rest % height, rest // height
