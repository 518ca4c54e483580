"""A record of the graph that was just compiled for a call."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qoqc.pipeline import Made
from qoqc.records.expressions import evaluate, resolve
from qoqc.records.files import Input, Record, Weight
from qoqc.runtime.dynamo import formula, source_of


def record_of(made: Made, roots: dict[str, Any]) -> Record:
    """What a compiled graph takes, by where it is found; `roots` are the call's model and kwargs.

    Raises ValueError if something of it cannot be found again, or the formulas do not hold.
    """
    inputs = [_input(node) for node in made.kept]
    weights = [
        Weight(
            sources=[source_of(node) for node in nodes],
            names=list(slot.bundle.names),
            transposed=list(slot.bundle.transposed),
            eight=slot.bundle.eight,
            glu=slot.bundle.glu,
            group_size=slot.bundle.packed.group_size,
            fields=sorted(slot.fields.items()),
        )
        for slot, nodes in made.slots
    ]
    bound = [(str(tensor.dtype), list(tensor.shape)) for tensor in made.bound]
    record = Record(inputs, bound, weights, *made.facts)
    arguments(record, roots)
    for weight in weights:
        for source in weight.sources:
            resolve(source, roots)
    return record


def _input(node: Node) -> Input:
    value = node.meta["example_value"]
    if isinstance(value, torch.SymInt):
        return Input(source_of(node), formula(value), None, "int")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{node.name} is neither an integer nor a tensor")
    return Input(source_of(node), "", [formula(size) for size in value.shape], str(value.dtype))


def arguments(record: Record, roots: dict[str, Any]) -> list[Any]:
    """The arguments of a call for the code of a record, before the bound tensors.

    Raises ValueError if one is missing, is of another kind, or is of sizes the code is not for.
    """
    symbols: dict[str, int] = {}
    found = [resolve(each.source, roots) for each in record.inputs]
    for each, value in zip(record.inputs, found, strict=True):
        if each.sizes is None:
            _expect(each, each.symbol, value, symbols)
            continue
        if not isinstance(value, torch.Tensor) or str(value.dtype) != each.dtype:
            raise ValueError(f"{each.source} is no tensor of {each.dtype}")
        if not value.is_contiguous() or value.dim() != len(each.sizes):
            raise ValueError(f"{each.source} has another layout")
        for size, actual in zip(each.sizes, value.shape, strict=True):
            _expect(each, size, actual, symbols)
    for name, (least, largest) in record.ranges.items():
        value = symbols[name]
        if value < least or (largest is not None and value > largest):
            raise ValueError(f"the code is for {name} from {least} to {largest}, not {value}")
    for guard in record.guards:
        if not evaluate(guard, symbols):
            raise ValueError(f"the code is for {guard}")
    return found


def _expect(each: Input, size: str, actual: Any, symbols: dict[str, int]) -> None:
    """Compare a size with its formula; the first value of a symbol is its own."""
    if type(actual) is not int:
        raise ValueError(f"{each.source} is no integer")
    if size.isidentifier():
        symbols.setdefault(size, actual)
    if evaluate(size, symbols) != actual:
        raise ValueError(f"{each.source} is {actual}, the code is for {size}")
