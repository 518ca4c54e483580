"""Every private call into torch.compile's internals, in one place (torch >= 2.11, < 2.14)."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch
import torch._functorch.config as functorch_config
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cudagraph_utils import BoxedDeviceIndex
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import BoxedBool
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

_NAME_PART = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers"})
_ROOTS = frozenset({"self", "kwargs"})

ShapeFacts = tuple[list[str], dict[str, tuple[int, "int | None"]]]
"""What was found out about the sizes of a graph: formulas that must hold, and symbols' ranges."""


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
    found = ["".join(groups) for groups in _NAME_PART.findall(source_of(placeholder))]
    parts = [part for part in found if part not in _CONTAINERS]
    # only in front: "self" is also a module's name (roberta: attention.self.query)
    if parts and parts[0] in _ROOTS:
        parts = parts[1:]
    return ".".join(parts) or placeholder.name


def source_of(placeholder: Node) -> str:
    """Where Dynamo takes an input from, as an expression of the call's L; empty if it says not."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = source.name if source is not None else ""
    if callable(name):  # a method in some releases, a property in others
        name = name()
    return str(name)


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
    gm: GraphModule, examples: Sequence[Any], mode: str, cache_key: str, *, portable: bool = False
) -> Callable[..., Any]:
    """Hand the rewritten graph to Inductor; qoqc ops stay opaque calls.

    AOTAutograd keeps graphs that call functions of qoqc's in its cache only if they are named,
    with what is to be in the key for them. `cache_key` goes into the key for the ops too, whose
    shape functions it does not look at either.

    portable  keep all of the code in one piece, for `code_of`
    """
    patches = list_mode_options(mode)
    patches["unsafe_marked_cacheable_functions"] = {
        name: cache_key for name in sorted({"qoqc", *_own_functions(gm)})
    }
    if not portable:
        compiled: Any = compile_fx(gm, list(examples), config_patches=patches)
        return cast("Callable[..., Any]", compiled)
    # Inductor's own cache, which it counts by, is not asked then, only AOTAutograd's
    found, hits = counters["aot_autograd"], counters["aot_autograd"]["autograd_cache_hit"]
    with functorch_config.patch("bundled_autograd_cache", True):
        compiled = compile_fx(gm, list(examples), config_patches=patches)
    _PORTABLE[found["autograd_cache_hit"] > hits] += 1
    return cast("Callable[..., Any]", compiled)


_PORTABLE = {True: 0, False: 0}
"""Graphs whose code was kept in one piece, by whether they came from the cache or a record."""


def count_cached_graph() -> None:
    """Count a graph that was taken from a record."""
    _PORTABLE[True] += 1


def code_of(compiled: Callable[..., Any]) -> bytes:
    """The code that compile_with_inductor made `portable`, for `load_code` of another process.

    Raises ValueError if Inductor cannot write it down.
    """
    serialize = getattr(compiled, "serialize", None)
    with functorch_config.patch("bundled_autograd_cache", True):
        entry = None if serialize is None else serialize()
    if entry is None:
        raise ValueError("its compiled code cannot be written down")
    return pickle.dumps(entry)


def load_code(code: bytes) -> Callable[..., Any]:
    """The callable behind `code_of`'s bytes, which are a pickle: only for those of one's own.

    Raises ValueError if torch cannot make it.
    """
    config = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": BoxedDeviceIndex(None)}
    try:
        entry = pickle.loads(code)
        entry.guards_expr = None  # whoever calls the code has compared the sizes
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
            compiled = entry.wrap_post_compile([], entry.sanitized_aot_config, config)
    except Exception as error:  # compiled code runs while it is loaded: anything can come of it
        raise ValueError(f"its compiled code cannot be loaded: {error!r}") from error

    def run(*args: Any) -> Any:
        return compiled(list(args))

    return run


def formula(size: int | torch.SymInt) -> str:
    """A size of a traced graph as a number, or a formula of the symbols of the graph's sizes."""
    # not `expr`: that is what the size was found to be equal to, which a guard says
    return PythonPrinter().doprint(size.node._expr) if isinstance(size, torch.SymInt) else str(size)


def shape_facts(placeholders: Sequence[Node]) -> ShapeFacts:
    """Of the graph that is being compiled, whose inputs these are."""
    env: Any = cast("Any", TracingContext.get().fake_mode).shape_env
    guards = [PythonPrinter().doprint(guard.expr) for guard in env.guards]
    ranges: dict[str, tuple[int, int | None]] = {}
    for node in placeholders:
        value = node.meta["example_value"]
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt):
                for symbol in size.node._expr.free_symbols:
                    known = env.var_to_range[symbol]
                    upper = None if known.upper == int_oo else int(known.upper)
                    ranges[str(symbol)] = (int(known.lower), upper)
    return guards, ranges


def dispatch_keys(tensor: torch.Tensor) -> str:
    """What torch looks at to choose an operator's implementation, as text."""
    return str(torch._C._dispatch_keys(tensor))


def undisturbed() -> tuple[Any, ...] | None:
    """The settings of torch that a graph for inference depends on; None where there is more.

    That is: gradients, autocast, modes that see every call, and torch.compile switched off.
    """
    disturbed = (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._dynamo.config.disable
        or eval_frame._stance.stance != "default"
        or torch.nn.modules.module._has_any_global_hook()
    )
    if disturbed:
        return None
    return (
        torch.is_inference_mode_enabled(),
        str(torch.get_default_dtype()),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _own_functions(gm: GraphModule) -> list[str]:
    """The Python functions of qoqc's that a graph calls, which Inductor traces into."""
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return [
        f"{target.__module__}.{target.__name__}"
        for target in targets
        if isinstance(target, FunctionType) and target.__module__.startswith("qoqc.")
    ]


def inductor_directory() -> str | None:
    """Where Inductor keeps its code, if the environment says so; not torch's default, which it
    puts into the environment itself."""
    found = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return None if found == default_cache_dir() else found


def driver_version() -> str:
    """Of CUDA's driver, as CUDA numbers it (12080 = 12.8); only where there is a GPU.

    From the driver's own library, which torch has loaded: no call of torch's gives it in all
    releases (torch 2.11 has none). Raises OSError where there is no such library.
    """
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise OSError(f"cuDriverGetVersion failed with error {status}")
    return str(version.value)


def graphs_compiled() -> tuple[int, int]:
    """How many graphs Inductor compiled in this process, and how many it took from its cache."""
    found = counters["inductor"]
    made = found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]
    return made + _PORTABLE[False], found["fxgraph_cache_hit"] + _PORTABLE[True]


def allow_graphs(count: int) -> None:
    """Let Dynamo keep `count` graphs per function: beyond its limit it runs the code uncompiled."""
    _set_in_all_threads("recompile_limit", max(torch._dynamo.config.recompile_limit, count))


def vary(tensor: torch.Tensor, *dims: int) -> None:
    """Have graphs made for any size of these axes, rather than for the first one met.

    Sizes of 1 stay apart: Dynamo makes graphs of their own for them.
    """
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes of a traced graph equal whatever is passed? Asks without adding a guard."""
    return bool(statically_known_true(a == b))


def keep_floats() -> None:
    """Let Dynamo keep floats (the eps of a norm, a scale) as constants in every graph.

    Else it takes those in which two models of a process differ for inputs, and the second model's
    norms would be no norms to a pass. Holds for everything that torch.compile traces after it:
    the option is Dynamo's, and is read before a backend is called.
    """
    _set_in_all_threads("specialize_float", True)


def _set_in_all_threads(name: str, value: Any) -> None:
    """Set an option of Dynamo's for threads still to come, too, a server's for instance.

    Since torch 2.13 what is assigned holds in the thread that assigns it; others see the default.
    """
    setattr(torch._dynamo.config, name, value)
    cast("Any", torch._dynamo.config)._config[name].default = value


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
