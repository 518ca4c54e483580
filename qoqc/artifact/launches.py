"""The kernels that a decode step launches, layer by layer: counted from its rewritten graph."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from torch.fx import GraphModule, Node

from qoqc.artifact.kernel_sources import Wanted, few_kernel, kernels_of
from qoqc.codegen.build import runs
from qoqc.codegen.kernels.step_call import meets
from qoqc.codegen.pair import pairs
from qoqc.ir import ops
from qoqc.passes.match import example, is_view
from qoqc.runtime.device import DeviceKey

_LAYER = re.compile(r".*?\.\d+(?=\.)")

_FREE = frozenset({"getitem", "split", "chunk", "size", "getattr", "_log_api_usage_once"})
"""What runs nothing on a GPU, beside what only moves values."""


@dataclasses.dataclass(frozen=True)
class LayerLaunches:
    """What one layer launches.

    layer    the path of its module
    kernels  qoqc's, in order: what the tuner calls the op and, of linears, the weights they read
    torch    operations left to torch, which fuses them to fewer kernels
    """

    layer: str
    kernels: tuple[str, ...]
    torch: int


def launches(gm: GraphModule, device: DeviceKey) -> tuple[LayerLaunches, ...]:
    """The launches of each layer behind the passes, for the tokens `gm` was captured with.

    A layer lasts from its first quantizer or linear to the next layer's. What comes before the
    first layer and behind the last linear is no layer's.
    """
    layers = _layers(gm)
    kernels = _kernels(gm, device)
    found: dict[str, LayerLaunches] = {}
    last = max(layers, default=None)
    layer: str | None = None
    for node in gm.graph.nodes:
        layer = layers.get(node, layer)
        if layer is None:
            continue
        before = found.get(layer, LayerLaunches(layer, (), 0))
        found[layer] = dataclasses.replace(
            before,
            kernels=(*before.kernels, *kernels.get(node, ())),
            torch=before.torch + _is_left(node, kernels),
        )
        if node is last:
            break
    return tuple(found.values())


def summary(found: Sequence[LayerLaunches]) -> list[str]:
    """Lines for people: layers that follow one another and launch the same are one line."""
    lines = []
    for (kernels, left), group in itertools.groupby(found, lambda one: (one.kernels, one.torch)):
        names = [one.layer for one in group]
        which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        rest = f", and {left} operations of torch's" if left else ""
        lines.append(f"{which}: {len(kernels)} launches{rest}: {', '.join(kernels)}")
    return lines


def _kernels(gm: GraphModule, device: DeviceKey) -> dict[Node, list[str]]:
    """The names of the kernels of every node that has any."""
    found = {}
    for node in gm.graph.nodes:
        kernels = [each for each in kernels_of(node) if runs(each.op, each.spec, device)]
        found[node] = _named(node, kernels)
    for pair in pairs(gm.graph):
        few = few_kernel(pair)
        if runs(few.op, few.spec, device):
            found[pair.quantizer], found[pair.linear] = [], _named(pair.linear, [few])
    return {node: names for node, names in found.items() if names or node.target in ops.QUANTIZERS}


def _named(node: Node, kernels: Iterable[Wanted]) -> list[str]:
    names = []
    for kernel in kernels:
        if kernel.op == "step_combine" and meets(kernel.spec, example(node.args[0]).shape[0]):
            continue
        names.append(" ".join((kernel.op, *_weights(node))))
    return names


def _weights(node: Node) -> list[str]:
    """The short names of the weights that a linear reads: "(q_proj k_proj v_proj)"."""
    bundle = node.meta.get("qoqc_bundle")
    if bundle is None:
        return []
    return [f"({' '.join(_module(name).rpartition('.')[2] for name in bundle.names)})"]


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _layers(gm: GraphModule) -> dict[Node, str]:
    """The layers of linears, by the names of their weights, and of what quantizes for them."""
    found: dict[Node, str] = {}
    for node in reversed(gm.graph.nodes):
        if "qoqc_bundle" in node.meta:
            layer = _LAYER.match(node.meta["qoqc_bundle"].names[0])
            if layer is not None:
                found[node] = layer.group()
        elif node.target in ops.QUANTIZERS:
            readers = [reader for part in node.users for reader in part.users if reader in found]
            if readers:
                found[node] = found[min(readers)]
    return found


def _is_left(node: Node, kernels: dict[Node, list[str]]) -> bool:
    """Is this an operation that torch runs?"""
    if node in kernels or is_view(node) or node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name not in _FREE
