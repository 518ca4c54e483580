"""The norm that computes a node, step by step as it rounds: a call, or written out.

y = layer_norm(x, (K,), w, b, eps)                         kind "layer"
y = rms_norm(x, (K,), w, eps)                              kind "rms"
u = float(x) * rsqrt(mean(float(x) ** 2) + eps)
y = w * u.to(dtype)                                        kind "rms", round_first
y = (u * (1 + float(w))).to(dtype)                         kind "rms", offset 1
u = c * rsqrt(mean(c ** 2) + eps), c = x - mean(x)         kind "centred"
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from qoqc.ir.glue import NormKind
from qoqc.passes.fusing import alike, operands
from qoqc.passes.match import CASTS, argument, between, example, is_method
from qoqc.passes.structure.nodes import operation


@dataclasses.dataclass(frozen=True)
class Norm:
    """The arguments of ir/glue.norm, and the nodes `inside` that compute the norm from them."""

    x: Node
    weight: Node | None
    bias: Node | None
    kind: NormKind
    eps: float
    offset: float
    round_first: bool
    inside: frozenset[Node]


def norm_of(node: Any) -> Norm | str | None:
    """The norm that ends in `node`; None if none does, a reason if it rounds in another way."""
    if not isinstance(node, Node) or not isinstance(example(node), torch.Tensor):
        return None
    if operation(node) == "layer_norm":
        return _layer_norm(node)
    if operation(node) == "rms_norm":
        return _rms_norm(node)
    return _written_out(node)


def _layer_norm(node: Node) -> Norm | str:
    names = ("normalized_shape", "weight", "bias")
    shape, weight, bias = (argument(node, i, name) for i, name in enumerate(names, start=1))
    return _finish(node, node.args[0], shape, weight, bias, "layer", argument(node, 4, "eps", 1e-5))


def _rms_norm(node: Node) -> Norm | str:
    shape, weight = argument(node, 1, "normalized_shape"), argument(node, 2, "weight")
    return _finish(node, node.args[0], shape, weight, None, "rms", argument(node, 3, "eps"))


def _written_out(node: Node) -> Norm | str | None:
    dtype = example(node).dtype
    product = _uncast(node, dtype)
    factor: Any = None
    unit = product
    if (pair := operands(product, "mul")) is not None:
        vectors = [side for side in pair if _dims(side) == 1]
        if len(vectors) == 1:
            factor = vectors[0]
            unit = pair[1] if factor is pair[0] else pair[0]
    # not through a cast to 16 bit and back
    scaled = _uncast(unit, example(unit).dtype)
    pair = operands(scaled, "mul")
    roots = [side for side in pair or () if operation(side) == "rsqrt"]
    if pair is None or len(roots) != 1:
        return None
    value = pair[1] if roots[0] is pair[0] else pair[0]
    if example(scaled).dtype is not torch.float32:
        return f"computed in {example(scaled).dtype}, not in float32"
    square = _mean_square(roots[0])
    if square is None or not _same(square[0], value):
        return "its root is not that of a mean of squares + eps"
    kind: NormKind = "rms"
    source = value
    if (parts := operands(value, "sub")) is not None:
        kind, source = "centred", parts[0]
        if not _is_mean(parts[1], source):
            return "what it subtracts is not the mean"
    weight: Any = None
    offset = 0.0
    round_first = False
    if factor is not None:
        # in fp32 nothing is rounded, and only the other form knows an offset
        round_first = example(unit).dtype == example(product).dtype == dtype != torch.float32
        if not round_first and example(unit).dtype != example(product).dtype:
            return f"rounded to {example(unit).dtype} before a weight in {example(factor).dtype}"
        weight, offset = (factor, 0.0) if round_first else _offset(factor, dtype)
    return _finish(
        node, _uncast(source, torch.float32), None, weight, None, kind, square[1], offset,
        round_first,
    )  # fmt: skip


def _finish(
    node: Node,
    x: Any,
    shape: Any,
    weight: Any,
    bias: Any,
    kind: NormKind,
    eps: Any,
    offset: float = 0.0,
    round_first: bool = False,
) -> Norm | str:
    """The norm, if its tensors are as the op takes them."""
    if not isinstance(x, Node) or not alike(node, x):
        return "another shape or dtype comes out than goes in"
    width = example(x).shape[-1]
    if shape is not None and tuple(shape) != (width,):
        return f"normalizes {len(shape)} axes"
    if not isinstance(eps, float):
        return f"eps is {eps}, not a number"
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        value = example(vector)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != (width,):
            return f"its {name} is not one value per channel"
        if value.dtype != example(x).dtype:
            return f"its {name} is {value.dtype}, what it normalizes {example(x).dtype}"
    ends = {x, weight, bias}
    return Norm(x, weight, bias, kind, eps, offset, round_first, between(node, ends))


def _uncast(node: Any, dtype: torch.dtype) -> Any:
    """The value behind casts to fp32 and to `dtype`."""
    while is_method(node, *CASTS) and example(node).dtype in (torch.float32, dtype):
        if not isinstance(example(node.args[0]), torch.Tensor):
            break
        node = node.args[0]
    return node


def _dims(node: Any) -> int:
    value = example(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _mean_square(root: Node) -> tuple[Any, float] | None:
    """(x, eps) of rsqrt(mean(x ** 2) + eps) in fp32."""
    pair = operands(root.args[0], "add")
    if pair is None or not isinstance(pair[1], float):
        return None
    mean, eps = pair
    if not _is_row_mean(mean):
        return None
    square = mean.args[0]
    if (power := operands(square, "pow")) is not None and power[1] == 2:
        return power[0], eps
    if (product := operands(square, "mul")) is not None and _same(*product):
        return product[0], eps
    return (square.args[0], eps) if operation(square) == "square" else None


def _is_row_mean(node: Any) -> bool:
    """Is this mean(x, -1, keepdim=True) in fp32?"""
    if operation(node) != "mean" or example(node).dtype is not torch.float32:
        return False
    dim, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    known = set(node.kwargs) <= {"dim", "keepdim"}
    return dim in (-1, (-1,), [-1]) and keep is True and known


def _is_mean(node: Any, x: Any) -> bool:
    return _is_row_mean(node) and _same(node.args[0], x)


def _same(a: Any, b: Any) -> bool:
    """Are these one fp32 value, perhaps computed twice?"""
    if a is b:
        return True
    left, right = operands(a, "sub"), operands(b, "sub")
    if left is not None and right is not None:
        return _same(left[0], right[0]) and left[1] is right[1]
    return (
        is_method(a, *CASTS)
        and is_method(b, *CASTS)
        and example(a).dtype is example(b).dtype is torch.float32
        and a.args[0] is b.args[0]
    )


def _offset(factor: Any, dtype: torch.dtype) -> tuple[Any, float]:
    """(w, number) of `number + float(w)`; (the factor itself, 0) for anything else."""
    pair = operands(factor, "add")
    if pair is None:
        return _uncast(factor, torch.float32), 0.0
    vector, number = pair if isinstance(pair[0], Node) else (pair[1], pair[0])
    if isinstance(number, (int, float)) and example(factor).dtype is torch.float32:
        weight = _uncast(vector, torch.float32)
        if example(weight).dtype == dtype:
            return weight, float(number)
    return factor, 0.0
