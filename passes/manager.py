"""The order of the passes, and what happens around each."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.fx import GraphModule

from qoqc.errors import Unsupported
from qoqc.ir.verify import check, writes
from qoqc.log import dump, get_logger, span
from qoqc.passes.attention import attention
from qoqc.passes.causal import causal
from qoqc.passes.cleanup import cleanup
from qoqc.passes.context import Context
from qoqc.passes.contiguous import contiguous
from qoqc.passes.fuse_act import fuse_act
from qoqc.passes.fuse_glu import fuse_glu
from qoqc.passes.fuse_norm import fuse_norm
from qoqc.passes.linear import linear
from qoqc.passes.merge import merge
from qoqc.passes.normalize import normalize
from qoqc.passes.prompt_windows import prompt_windows
from qoqc.passes.rotary import rotary
from qoqc.passes.share_quant import share_quant
from qoqc.passes.windows import windows

Pass = Callable[[GraphModule, Context], int]

PIPELINE: tuple[Pass, ...] = (
    normalize,  # first: the others know one spelling each
    causal,  # before attention, which takes masks as they are
    attention,  # before merge: it looks at the nodes the model wrote
    windows,  # after attention, whose masks it takes apart; before rotary, which passes on the rest
    rotary,  # after attention, which tells what reads the cache; before merge, for the same reason
    prompt_windows,  # after rotary, which knows SDPA among new tokens
    merge,  # before linear: packs sibling weights as one
    fuse_glu,  # after merge, which stacks gate and up; before linear, which packs them in turns
    linear,
    share_quant,  # after linear: it looks at quantize_act nodes
    fuse_norm,  # after share_quant: one quantize_act per norm
    fuse_act,
    contiguous,  # after linear, which leaves some in 16 bit
    cleanup,  # last: the others leave dead nodes behind
)

log: logging.Logger = get_logger("passes")


def run(gm: GraphModule, ctx: Context, dump_name: str = "graph") -> None:
    """Run PIPELINE over `gm` in place; counts and refusals end up in `ctx`.

    Raises VerifyError if the result breaks a rule, Unsupported for refusals under `strict`.
    """
    before = writes(gm.graph)
    for number, step in enumerate(PIPELINE):
        name = step.__name__
        _dump(gm, ctx, f"{dump_name}/{number:02d}-{name}.before.py")
        with span(log, f"pass {name}"):
            ctx.counts[name] = step(gm, ctx)
        log.debug("pass %s: %d rewrites", name, ctx.counts[name])
        _dump(gm, ctx, f"{dump_name}/{number:02d}-{name}.after.py")
    for left in ctx.unfused:
        log.info("computed apart: %s", left)
    gm.graph.lint()
    gm.recompile()
    check(gm, before)
    failed = [refusal for refusal in ctx.refusals if not refusal.kept]
    if ctx.options.strict and failed:
        lines = "; ".join(map(str, failed))
        raise Unsupported(f"strict: {lines}. Exclude them, or compile without strict")


def _dump(gm: GraphModule, ctx: Context, name: str) -> None:
    if ctx.options.dump is not None:
        code = gm.graph.python_code("self", verbose=False).src
        dump(ctx.options.dump, name, code)
