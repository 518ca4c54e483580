"""A rewritten graph as text to read: in parts, layers that are alike written once."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.match import example, is_slice

LEGEND = """\
%3 is the third value of a part; ^3 that of the layer before, first.3 that of the first part, and
%3.1 its second result. In names * stands for the number of the layer. Shapes are of the tokens and
the cache that the graph was captured with.
"""

_LAYER = re.compile(r"(.*?\.)(\d+)(?=\.)")


@dataclasses.dataclass
class _Part:
    """Some lines of a listing: what stands before the layers, a layer, or what stands behind."""

    title: str
    number: str | None
    lines: list[str] = dataclasses.field(default_factory=list)


def listing(gm: GraphModule, ctx: Context, title: str) -> str:
    """The graph behind the passes, operation by operation; the same graph gives the same text.

    A layer begins where a weight of the next one is read first: its number is the first in the
    weight's name.
    """
    written = _Writer(_input_names(ctx)).parts(gm, ctx)
    text = [f"{title}\n\n{LEGEND}"]
    for (_, lines), group in itertools.groupby(
        written, lambda part: (part.number is None, part.lines)
    ):
        titles = [part.title for part in group]
        head = titles[0] if len(titles) == 1 else f"{titles[0]} to {titles[-1]}, each"
        text.append("\n".join([f"{head}:", *(f"  {line}" for line in lines)]) + "\n")
    return "\n".join(text)


def _input_names(ctx: Context) -> dict[Node, str]:
    """The names of all placeholders: those that Dynamo made, and packed weights by module."""
    names = {node: ctx.name(node) for node in ctx.values}
    for bundle, _ in ctx.bundles:
        fields = {id(tensor): field for field, tensor in bundle.tensors().items()}
        modules = [name.removesuffix(".weight").rpartition(".") for name in bundle.names]
        path, dot, last = modules[0]
        if len(modules) > 1:
            last = f"({' '.join(module[2] for module in modules)})"
        for node, tensor in ctx.bound.items():
            if id(tensor) in fields:
                names[node] = f"{path}{dot}{last}.{fields[id(tensor)]}"
    return names


class _Writer:
    """Gives values their names, part by part."""

    def __init__(self, inputs: Mapping[Node, str]) -> None:
        self._inputs = inputs
        self._places: dict[Node, tuple[int, int]] = {}
        self._parts = [_Part("first", None)]

    def parts(self, gm: GraphModule, ctx: Context) -> list[_Part]:
        """The parts of a graph; the first may be empty, and is left out then."""
        weights = {node for node in ctx.values if ctx.parameter(node) is not None} | {*ctx.bound}
        for node in gm.graph.nodes:
            if node.op == "placeholder" or _is_result(node):
                continue
            read = [self._inputs[arg] for arg in node.all_input_nodes if arg in weights]
            if read:
                self._begin(_LAYER.match(read[-1]))
            part = self._parts[-1]
            self._places[node] = len(self._parts) - 1, len(part.lines) + 1
            part.lines.append(self._line(node))
        return [part for part in self._parts if part.lines]

    def _begin(self, layer: re.Match[str] | None) -> None:
        """A new part, if what is read belongs to one."""
        part = self._parts[-1]
        if layer is not None and part.number != layer[2]:
            self._parts.append(_Part(layer[0], layer[2]))
        elif layer is None and part.number is not None:
            self._parts.append(_Part("last", None))

    def _line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self._text(node.args[0])}"
        number = self._places[node][1]
        arguments = [self._text(arg) for arg in node.args]
        arguments += [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        kind = _kind(example(node))
        called = f"{_name(node)}({', '.join(arguments)})"
        if node.op == "call_method":
            called = f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        elif node.op == "get_attr":
            called = str(node.target)
        return f"%{number} = {called}" + (f"  # {kind}" if kind else "")

    def _text(self, value: Any) -> str:
        """An argument; tensors by the names of their nodes."""
        if isinstance(value, Node):
            return self._value(value)
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self._text, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._text(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            ends = [value.start, value.stop] + ([] if value.step is None else [value.step])
            return ":".join("" if end is None else self._text(end) for end in ends)
        if value is Ellipsis:
            return "..."
        if isinstance(value, str):
            return repr(value)
        if hasattr(value, "__name__"):  # a function, whose own text has its address
            return str(value.__name__)
        return str(value).removeprefix("torch.")

    def _value(self, node: Node) -> str:
        here = len(self._parts) - 1
        if node in self._inputs:
            name = self._inputs[node]
            layer = _LAYER.match(name)
            if layer is not None and layer[2] == self._parts[here].number:
                return f"{layer[1]}*{name[layer.end() :]}"
            return name
        if _is_result(node):
            return f"{self._value(node.args[0])}.{node.args[1]}"  # type: ignore[arg-type]
        part, number = self._places[node]
        if part == here:
            return f"%{number}"
        if part == 0:
            return f"first.{number}"
        if part == here - 1:
            return f"^{number}"
        return f"{self._parts[part].title}.{number}"


def _is_result(node: Node) -> bool:
    """Is this one of several results of an operation? They have no lines of their own."""
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], Node)
        and node.args[0].op != "placeholder"
        and isinstance(node.args[1], int)
        and not is_slice(node)
    )


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _kind(value: Any) -> str:
    """`bf16[1, 4, 256]` of a tensor; of several, each."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(filter(None, map(_kind, value)))
    return ""
