"""Every private call into torch.compile's internals, in one place (torch >= 2.11, < 2.14)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule, Node

_NAME_PART = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers"})
_ROOTS = frozenset({"self", "kwargs"})


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that may be edited: Dynamo keeps using the original to assemble the call's arguments.

    copy.deepcopy would lose the sources by which AOTAutograd tells static inputs.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copied: Any = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    output_args, output = copied
    graph.output(output_args).meta = dict(output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def qualified_name(placeholder: Node) -> str:
    """The path of a lifted tensor, `model.layers.0.mlp.up_proj.weight`, `cache.layers.0.length`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = source.name if source is not None else ""
    if callable(name):  # a method in some releases, a property in others
        name = name()
    found = ["".join(groups) for groups in _NAME_PART.findall(str(name))]
    parts = [part for part in found if part not in _CONTAINERS]
    # only in front: "self" is also a module's name (roberta: attention.self.query)
    if parts and parts[0] in _ROOTS:
        parts = parts[1:]
    return ".".join(parts) or placeholder.name


def add_static_input(graph: Graph, name: str, tensor: torch.Tensor) -> Node:
    """A new placeholder, last of all, that AOTAutograd treats like a parameter (never copied)."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta = {
        "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
        "example_value": tensor,
    }
    node._dynamo_source = ConstantSource(f"qoqc_{node.name}")
    return node


def fake_input(tensor: torch.Tensor) -> torch.Tensor:
    """The fake twin of a tensor added by `add_static_input`, of static shape."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def compile_with_inductor(
    gm: GraphModule, examples: Sequence[Any], mode: str
) -> Callable[..., Any]:
    """Hand the rewritten graph to Inductor; qoqc ops stay opaque calls."""
    patches = list_mode_options(mode)
    compiled: Any = compile_fx(gm, list(examples), config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def allow_graphs(count: int) -> None:
    """Let Dynamo keep `count` graphs per function: beyond its limit it runs the code uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def warn_on_uncompiled_generate(is_ours: Callable[[Any], bool], message: str) -> None:
    """Warn when `.generate` is taken from a torch.compile'd module whose backend is ours.

    OptimizedModule forwards every attribute to the module it wraps, so `generate` would run that
    module's own, uncompiled forward: torch gives no hook for it, hence the patched lookup.
    """
    original = OptimizedModule.__getattr__

    def lookup(self: OptimizedModule, name: str) -> Any:
        if name == "generate" and is_ours(_innermost_backend(self)):
            warnings.warn(message, UserWarning, stacklevel=2)
        return original(self, name)

    OptimizedModule.__getattr__ = lookup  # type: ignore[method-assign]


def _innermost_backend(module: OptimizedModule) -> Any:
    callback: Any = getattr(module.dynamo_ctx, "callback", None)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_fn", callback)
