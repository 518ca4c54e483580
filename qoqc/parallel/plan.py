"""Who holds which part of every linear: transformers' plan of the model, in whole heads and groups.

The plan (`model.tp_plan`) says which linears are split along their outputs (q, k, v; gate, up) and
which take those parts and give a sum (o, down). Where the parts begin is decided here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch.nn import Linear, Module

from qoqc.errors import Unsupported
from qoqc.ir.spec import GROUP
from qoqc.parallel.cut import Cut
from qoqc.parallel.ranks import Ranks
from qoqc.quant.pack import ceil_div

OUTPUTS, SUM = "colwise", "rowwise"
GATHERED = ("colwise_gather_output", "colwise_rep")
DISTRIBUTED = ("rowwise_split_input", "rowwise_rep")
WHOLE = ("replicate", "replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise")
"""What every rank holds. Embeddings too: a table is looked up, never read as a whole."""

STYLES = frozenset({OUTPUTS, SUM, *GATHERED, *DISTRIBUTED, *WHOLE})


def cuts(model: Any, ranks: Ranks) -> dict[str, Cut]:
    """The part of this rank of each linear that is split, by the path of its module.

    The model may be on the meta device, and has its full sizes. Raises Unsupported, with the layer
    and its sizes, for a model without a plan and for one that does not split evenly enough.
    """
    if ranks.size == 1:
        return {}
    found: dict[str, Cut] = {}
    blocks: dict[str, list[tuple[str, Linear, str]]] = defaultdict(list)
    for path, module, style in _planned(model):
        if style in (OUTPUTS, SUM):
            blocks[path.rpartition(".")[0]].append((path, module, style))
        elif style in DISTRIBUTED:
            found[path] = _groups(path, module.in_features, ranks, whole_outside=True)
        elif not _stays_whole(model, module, ranks):
            found[path] = _equal(path, module.out_features, ranks)
    for parent, members in blocks.items():
        found.update(_block(parent, model.get_submodule(parent), members, ranks))
    return found


def _planned(model: Any) -> Iterator[tuple[str, Linear, str]]:
    """The linears that the plan splits, with their styles."""
    plan = model.tp_plan
    name = type(model).__name__
    if not plan:
        raise Unsupported(
            f"{name}: transformers has no tensor-parallel plan for it; run it on one device"
        )
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    for path in [*parameters, *(path for path, _ in model.named_modules())]:
        style = plan.get(_pattern(path))
        if style is not None and style not in STYLES:
            raise Unsupported(
                f"{path}: the plan of {name} splits it in the style {style!r}, which qoqc does not "
                "know (experts are not split yet); run it on one device"
            )
    for path, module in model.named_modules():
        style = plan.get(_pattern(path))
        if style is None or style in WHOLE:
            continue
        if not isinstance(module, Linear):
            kind = type(module).__name__
            raise Unsupported(f"{path}: a {kind} cannot be split; run the model on one device")
        yield path, module, style


def _pattern(path: str) -> str:
    """The path as plans write it: `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _stays_whole(model: Any, module: Linear, ranks: Ranks) -> bool:
    """Is this an output head of odd size, or the embedding table, which each rank has anyway?"""
    if module is not model.get_output_embeddings():
        return False
    config = model.config.get_text_config(decoder=True)
    tied = getattr(config, "tie_word_embeddings", False)
    shared = tied or module.weight is model.get_input_embeddings().weight
    return bool(shared) or module.out_features % ranks.size != 0


def _block(
    parent: str, owner: Module, members: list[tuple[str, Linear, str]], ranks: Ranks
) -> dict[str, Cut]:
    """The parts of the linears of one attention or MLP, which begin at the same units in all."""
    sums = [(path, module) for path, module, style in members if style == SUM]
    outputs = [(path, module) for path, module, style in members if style == OUTPUTS]
    if len(sums) != 1 or not outputs:
        raise Unsupported(
            f"{parent}: the plan splits {len(outputs)} linears by outputs and {len(sums)} by "
            "inputs, which do not make pairs; run the model on one device"
        )
    path, module = sums[0]
    head_dim = getattr(owner, "head_dim", getattr(owner, "head_size", None))
    if head_dim is None:
        if any(output.out_features != module.in_features for _, output in outputs):
            raise Unsupported(
                f"{path}: takes {module.in_features} channels, the linears before it give "
                f"{[output.out_features for _, output in outputs]}; run the model on one device"
            )
        cut = _groups(path, module.in_features, ranks)
        return {path: cut, **{name: Cut("rows", cut.start, cut.stop) for name, _ in outputs}}
    sizes = [module.in_features, *(output.out_features for _, output in outputs)]
    heads = _kv_heads(parent, sizes, head_dim)
    return _heads(path, module.in_features, heads, ranks) | {
        name: _share("rows", output.out_features, heads, ranks) for name, output in outputs
    }


def _kv_heads(parent: str, sizes: list[int], head_dim: int) -> int:
    """Heads that can only be split together with the queries that read them: KV heads.

    Query heads are a multiple of them, and so are those of a fused q, k, v.
    """
    if any(size % head_dim for size in sizes):
        raise Unsupported(
            f"{parent}: linears of {sizes} channels are not made of heads of {head_dim}; run the "
            "model on one device"
        )
    return math.gcd(*(size // head_dim for size in sizes))


def _heads(path: str, k: int, heads: int, ranks: Ranks) -> dict[str, Cut]:
    """The part of the linear behind attention, whose ranks have equally many KV heads."""
    if heads % ranks.size:
        raise Unsupported(
            f"{path}: {heads} KV heads cannot be divided among {ranks.size} ranks; the number of "
            f"ranks must divide {heads}"
        )
    step = k // ranks.size
    if step % GROUP:
        raise Unsupported(
            f"{path}: {k} input channels in {ranks.size} parts of {step}, which is not a multiple "
            f"of {GROUP}: groups of weights are not torn apart; start fewer ranks"
        )
    return {path: _share("columns", k, heads, ranks)}


def _share(axis: Any, channels: int, units: int, ranks: Ranks) -> Cut:
    """The rank's units of `channels` that are made of `units` equal ones."""
    mine, each = ranks.share(units), channels // units
    return Cut(axis, mine.start * each, mine.stop * each, first=ranks.rank == 0)


def _groups(path: str, k: int, ranks: Ranks, *, whole_outside: bool = False) -> Cut:
    """The rank's groups of `k` input channels: some ranks may have one more than others."""
    groups = ceil_div(k, GROUP)
    if groups < ranks.size:
        raise Unsupported(
            f"{path}: {k} input channels are {groups} groups of {GROUP}, fewer than "
            f"{ranks.size} ranks; start fewer ranks"
        )
    mine = ranks.share(groups)
    stop = min(mine.stop * GROUP, k)
    return Cut("columns", mine.start * GROUP, stop, whole_outside, first=ranks.rank == 0)


def _equal(path: str, n: int, ranks: Ranks) -> Cut:
    """The rank's part of outputs that are gathered: as many on each rank."""
    if n % ranks.size:
        raise Unsupported(
            f"{path}: {n} output channels cannot be divided among {ranks.size} ranks; the number "
            f"of ranks must divide {n}"
        )
    mine = ranks.share(n)
    return Cut("rows", mine.start, mine.stop, whole_outside=True)
