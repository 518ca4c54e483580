"""From a captured graph to something that runs. Read `compile_graph` first: it is the compiler."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.codegen.lower import lower
from qoqc.config import Options
from qoqc.errors import Unsupported
from qoqc.log import dump, get_logger
from qoqc.passes import manager
from qoqc.passes.context import Context, Refusal
from qoqc.runtime.compile_cache import activate, digest, key_parts
from qoqc.runtime.compile_count import graph_from_cache
from qoqc.runtime.dynamo import (
    ShapeFacts,
    compile_with_inductor,
    copy_graph,
    fake_input,
    shape_facts,
)
from qoqc.runtime.executable import Executable, Slot
from qoqc.runtime.weights import Bundle

log: logging.Logger = get_logger("pipeline")
_graph_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one graph: rewrites by pass, nodes left in 16 bit, seconds spent."""

    graph: str
    counts: dict[str, int]
    refusals: tuple[Refusal, ...]
    seconds: float

    def __str__(self) -> str:
        left = "; ".join(map(str, self.refusals)) or "none"
        return (
            f"{self.graph}: {self.counts['linear']} linears quantized, "
            f"{self.counts['attention']} attentions; left in 16 bit: {left}; {self.seconds:.1f} s"
        )


reports: deque[Report] = deque(maxlen=256)
"""The reports of the last graphs, newest last."""


@dataclasses.dataclass
class Made:
    """A graph that was compiled inside of `watched`, with what is needed to run it elsewhere.

    kept      the placeholders of the arguments it takes, in order
    bound     the packed tensors it takes after them
    slots     each bundle those come from, with the placeholders of its Parameters
    facts     what holds for the sizes of the arguments
    compiled  Inductor's code
    result    what its last run gave, until `forget`
    """

    kept: list[Node]
    bound: list[torch.Tensor]
    slots: list[tuple[Slot, tuple[Node, ...]]]
    facts: ShapeFacts
    compiled: Callable[..., Any]
    result: Any = None
    watching: bool = True

    def run(self, *args: Any) -> Any:
        """Run the code and remember what came out."""
        result = self.compiled(*args)
        if self.watching:
            self.result = result
        return result

    def forget(self) -> None:
        """Keep nothing of the graph but what runs it."""
        self.kept, self.bound, self.slots = [], [], []
        self.result, self.watching = None, False


class _Watch(threading.local):
    graphs: list[Made] | None = None


_WATCH = _Watch()


@contextmanager
def watched() -> Iterator[list[Made]]:
    """The graphs that Inductor compiles inside the block, for this thread; innermost block only."""
    outer, made = _WATCH.graphs, list[Made]()
    _WATCH.graphs = made
    try:
        yield made
    finally:
        _WATCH.graphs = outer


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Compile a graph captured by Dynamo into a callable with the same arguments and results.

    Raises Unsupported for graphs that need gradients and, under `strict`, for refusals.
    """
    start = time.perf_counter()
    name = f"graph{next(_graph_numbers):03d}"
    _require_inference(example_inputs)
    gm = copy_graph(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    ctx = Context.of(placeholders, example_inputs, options)
    manager.run(gm, ctx, name)
    activate(_device(example_inputs))
    lower(gm, ctx.bound, _device(example_inputs), options)
    _require_unreleased(ctx, gm)
    executable = _bind(gm, ctx, name)
    if options.release:
        for bundle, nodes in ctx.bundles:
            ctx.store.release(bundle, [ctx.values[node] for node in nodes])
    seconds = time.perf_counter() - start
    report = Report(name, dict(ctx.counts), tuple(ctx.refusals), seconds)
    reports.append(report)
    log.info("%s", report)
    dump(options.dump, f"{name}/report.txt", f"{report}\n")
    return executable


def _bind(gm: GraphModule, ctx: Context, name: str) -> Executable:
    """Compile what is left and remember which arguments it takes from whom."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    kept = [node for node in placeholders if node not in ctx.bound]
    bound = [node for node in placeholders if node in ctx.bound]
    assert placeholders == kept + bound, "added inputs stand last"
    run: Callable[..., Any]
    # with eager glue too: kernels are compiled at their first launch
    with torch.no_grad(), graph_from_cache(name, required=ctx.options.require_cached):
        if ctx.options.glue == "eager":
            run = gm.forward
        else:
            examples = [ctx.values[n] for n in kept] + [fake_input(ctx.bound[n]) for n in bound]
            cache_key = digest(key_parts(_device([ctx.values[n] for n in kept])))
            run = compile_with_inductor(
                gm, examples, ctx.options.mode, cache_key, portable=_WATCH.graphs is not None
            )
    tensors = [ctx.bound[n] for n in bound]
    slots = [
        Slot(bundle, tuple(ctx.index[n] for n in nodes), _fields(bundle, tensors))
        for bundle, nodes in ctx.bundles
    ]
    assert sum(len(slot.fields) for slot in slots) == len(bound), "each belongs to one bundle"
    if _WATCH.graphs is not None and ctx.options.glue == "inductor":
        owners = [nodes for _, nodes in ctx.bundles]
        facts = shape_facts(kept)
        made = Made(kept, list(tensors), list(zip(slots, owners, strict=True)), facts, run)
        _WATCH.graphs.append(made)
        run = made.run
    positions = [ctx.index[n] for n in kept]
    return Executable(run, positions, tensors, slots, ctx.store, release=ctx.options.release)


def _fields(bundle: Bundle, tensors: Sequence[torch.Tensor]) -> dict[int, str]:
    """Which of the bound tensors are the bundle's, and under which name."""
    names = {id(tensor): name for name, tensor in bundle.tensors().items()}
    return {i: names[id(tensor)] for i, tensor in enumerate(tensors) if id(tensor) in names}


def _device(example_inputs: Sequence[Any]) -> torch.device:
    """The device of the parameters; graphs over several are not split here."""
    devices = [x.device for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    return devices[0] if devices else torch.device("cpu")


def _require_inference(example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        raise Unsupported(
            'backend "qoq" is inference only, and this graph was captured with gradients enabled; '
            "call the model under torch.no_grad() or torch.inference_mode(), "
            "or model.requires_grad_(False)"
        )


def _require_unreleased(ctx: Context, gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op != "placeholder" or node in ctx.bound:
            continue
        param = ctx.parameter(node)
        if param is not None and node.users and ctx.store.is_released(param):
            raise Unsupported(
                f"{ctx.name(node)} was released after packing, but this graph reads it in 16 bit; "
                "load the model again and compile it with release=False"
            )
