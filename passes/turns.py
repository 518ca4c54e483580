"""The rotation that ends in a node, in any spelling.

y = x * cos + cat(-second(x), first(x)) * sin                            form "half"
y = x * cos + stack(-odd(x), even(x)).flatten(-2) * sin                  form "interleaved"
y = cat(first(x) * c - second(x) * s, second(x) * c + first(x) * s)      "half", c and s of R / 2
y = stack(even(x) * c - odd(x) * s, odd(x) * c + even(x) * s).flatten(-2)
y = cat(any of these of x[..., :R], x[..., R:])                          the first R channels only

Casts to fp32 and back may stand around each step.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch.fx import Node

from qoqc.ir.rotary import RotaryForm
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.passes.channels import channels, half_of, joined
from qoqc.passes.fusing import operands
from qoqc.passes.match import example, is_copy_of
from qoqc.passes.structure.nodes import operation, shape


@dataclasses.dataclass(frozen=True)
class Turn:
    """x * cos + partner(x) * sin, cos and sin as the graph multiplies them.

    per_pair  they have one value per pair of channels, not one per channel
    """

    x: Node
    cos: Node
    sin: Node
    form: RotaryForm
    per_pair: bool


def turn_of(node: Any) -> Turn | None:
    """The rotation that ends in `node`, of all channels or of the first ones."""
    whole = _whole_turn(node)
    join = joined(node)
    if whole is not None or join is None or join[0] != "half":
        return whole
    part = _whole_turn(_plain(join[1]))
    rest = channels(_plain(join[2]))
    if part is None or rest is None:
        return None
    rotated = channels(part.x)
    width = shape(node)[-1]
    if rotated is None or _plain(rotated[0]) is not _plain(rest[0]):
        return None
    count = len(rotated[1])
    in_order = rotated[1] == range(count) and rest[1] == range(count, width)
    if not in_order or shape(rest[0]) != shape(node):
        return None
    return dataclasses.replace(part, x=_plain(rest[0]))


def _whole_turn(node: Any) -> Turn | None:
    turn = _sum(node) or _pairwise(node)
    if turn is None:
        return None
    factor = 2 if turn.per_pair else 1
    fits = all(shape(x)[-1:] == (shape(turn.x)[-1] // factor,) for x in (turn.cos, turn.sin))
    return turn if fits else None


def _sum(node: Any) -> Turn | None:
    """x * cos + partner(x) * sin."""
    for straight, crossed in _orders(operands(node, "add")):
        for other, sin in _orders(operands(_plain(crossed), "mul")):
            found = _partner(_plain(other))
            if found is None:
                continue
            x, form = found
            for same, cos in _orders(operands(_plain(straight), "mul")):
                if _plain(same) is x and isinstance(cos, Node) and isinstance(sin, Node):
                    return Turn(x, cos, sin, form, per_pair=False)
    return None


def _partner(node: Any) -> tuple[Node, RotaryForm] | None:
    """(x, form) if the node is `partner` of x (ir/rotary.py)."""
    join = joined(node)
    if join is None:
        return None
    form, first, second = join
    negated = _plain(first)
    if operation(negated) != "neg":
        return None
    turned, straight = _half(negated.args[0]), _half(second)
    if turned is None or straight is None:
        return None
    x = straight[0]
    return (x, form) if (straight, turned) == ((x, form, 0), (x, form, 1)) else None


def _pairwise(node: Any) -> Turn | None:
    """Both halves of a rotation written out, and joined."""
    join = joined(node)
    if join is None:
        return None
    form, first, second = join
    minus, plus = operands(_plain(first), "sub"), operands(_plain(second), "add")
    if minus is None or plus is None:
        return None
    left, right = _product(minus[0]), _product(minus[1])
    if left is None or right is None:
        return None
    x, cos, sin = left[0], left[3], right[3]
    wanted = ((x, form, 0, cos), (x, form, 1, sin))
    crossed = {(x, form, 1, cos), (x, form, 0, sin)}
    if (left, right) != wanted or {_product(term) for term in plus} != crossed:
        return None
    return Turn(x, cos, sin, form, per_pair=True)


def _product(node: Any) -> tuple[Node, RotaryForm, int, Node] | None:
    """(x, form, which half of x, factor) of a product of half the channels with angles."""
    for part, factor in _orders(operands(_plain(node), "mul")):
        half = _half(part)
        if half is not None and isinstance(factor, Node):
            return *half, factor
    return None


def _half(node: Any) -> tuple[Node, RotaryForm, int] | None:
    found = channels(_plain(node))
    half = None if found is None else half_of(found[1], shape(found[0])[-1])
    if found is None or half is None:
        return None
    return _plain(found[0]), *half


def _orders(pair: tuple[Any, Any] | None) -> Any:
    return () if pair is None else itertools.permutations(pair)


def misfit(turn: Turn, head_axis: int) -> str | None:
    """Why the angles of a rotation are not [B or 1, S, R], the same for all heads; or None."""
    batch, *_, width = shape(turn.x)
    tokens = shape(turn.x)[3 - head_axis]
    for angles in (turn.cos, turn.sin):
        sizes = shape(angles)
        if example(angles).dtype not in OUTPUT_DTYPES:
            return f"its angles are {example(angles).dtype}"
        if len(sizes) > 4 or len(sizes) < (2 if head_axis == 1 else 3):
            return f"its angles have {len(sizes)} axes"
        sizes = (*[1] * (4 - len(sizes)), *sizes)
        if sizes[head_axis] != 1:
            return "its angles differ from head to head"
        if sizes[0] not in (1, batch) or sizes[3 - head_axis] != tokens:
            return f"its angles are {tuple(sizes)} for {tokens} tokens of {batch} sequences"
        if not isinstance(sizes[3], int) or sizes[3] > width:
            return f"its angles have {sizes[3]} channels"
    if shape(turn.cos) != shape(turn.sin):
        return "its cosines and sines differ in shape"
    return None


def _plain(node: Any) -> Any:
    """The value behind copies and casts to fp32."""
    while is_copy_of(node):
        node = node.args[0]
    return node
