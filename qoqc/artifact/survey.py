"""What the passes make of a model: one prefill and one decode graph, captured and rewritten."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule
from torch.nn import Parameter

from qoqc.artifact.kernel_sources import (
    Wanted,
    beyond_windows,
    devices,
    sampling_kernels,
    wanted,
)
from qoqc.artifact.launches import LayerLaunches, launches
from qoqc.artifact.listing import listing
from qoqc.config import Options
from qoqc.errors import QoqcError, Unsupported
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.pipeline import Report
from qoqc.runtime.attention_interface import adopted
from qoqc.runtime.device import DeviceKey
from qoqc.runtime.dynamo import copy_graph
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.runtime.weights import STORE, Bundle, GroupSize, WeightRef, WeightStore

PROMPT = 4
"""Tokens of the captured prefill: any number above 1, which Dynamo would specialize on."""

TITLES = {
    "prefill": f"prefill: {PROMPT} tokens of one sequence",
    "decode": f"decode: the next token of one sequence, after {PROMPT}",
}

Progress = Callable[[int, int], None]
"""Called with (weights packed so far, weights in the graph)."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """The outcome: a report per graph, the weights that are packed, the kernels they need.

    listings  the graphs of the reports behind the passes, as text to read
    launches  what a decode step of one sequence launches per layer, on the model's GPU or, where
              it has none, on the last of the NOMINAL ones
    """

    reports: tuple[Report, ...]
    weights: tuple[WeightRef, ...]
    kernels: tuple[Wanted, ...]
    launches: tuple[LayerLaunches, ...]
    listings: tuple[str, ...]


def survey(model: Any, options: Options, progress: Progress | None = None) -> Survey:
    """Capture a prefill and a decode step of a Hugging Face decoder and run the passes on them.

    Packs the weights of every linear that is quantized (they stay in STORE), runs the graphs in
    16 bit, compiles nothing. Raises what the passes raise, and Unsupported for a model that
    cannot be captured.
    """
    STORE.note_tables_of(model)
    # an artifact keeps the head in 16 bit: it is packed after loading, as its options say
    options = dataclasses.replace(options, lm_head="16")
    collector = _Collector(options, progress, devices(model.device)[-1])
    # Dynamo keeps compiled code with the code object and counts it there against a limit: one of
    # its own takes both along when the survey is over
    step = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
    # static, so that the kernels' specs hold numbers
    forward: Any = torch.compile(step, backend=collector.backend, dynamic=False)
    tokens = torch.zeros(1, PROMPT, dtype=torch.long, device=model.device)
    # as qoqc.compile has it run
    own = contextlib.nullcontext() if options.kv_bits == 16 else adopted(model)
    with own, torch.no_grad():
        cache = _cache(model, options)
        collector.stage = "prefill"
        output = forward(model, input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        collector.stage = "decode"
        forward(model, input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    if collector.error is not None:
        raise collector.error
    if not collector.reports:
        raise Unsupported(f"{type(model).__name__}: Dynamo captured no graph of its forward")
    weights = tuple(collector.weights.values())
    others = [*beyond_windows(collector.kernels), *sampling_kernels(int(output.logits.shape[-1]))]
    kernels = tuple(dict.fromkeys([*collector.kernels, *others]))
    return Survey(
        tuple(collector.reports),
        weights,
        kernels,
        tuple(collector.launches),
        tuple(collector.listings),
    )


def _forward(self: Any, **kwargs: Any) -> Any:
    return self.forward(**kwargs)


def _cache(model: Any, options: Options) -> KV4Cache | None:
    """The quantized cache the model will run with, allocated by an eager token; None for 16 bit."""
    if options.kv_bits == 16:
        return None
    bits = options.kv_layers or options.kv_bits
    cache = KV4Cache(model.config, 2 * PROMPT, bits, options.prefill_kv)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.forward(input_ids=token, past_key_values=cache, use_cache=True)
    if not all(layer.is_initialized for layer in cache.layers):
        raise Unsupported("a layer keeps no keys and values; compile with kv_bits=16")
    cache.reset()
    return cache


class _Collector:
    """A Dynamo backend that runs the passes on a copy, takes notes, and runs the original.

    It keeps facts, not contexts: Dynamo holds on to its backends for as long as to the code.
    """

    def __init__(self, options: Options, progress: Progress | None, device: DeviceKey) -> None:
        """Run the passes with `options`, telling `progress` about packed weights."""
        self.stage = ""
        self.reports: list[Report] = []
        self.weights: dict[int, WeightRef] = {}
        self.kernels: dict[Wanted, None] = {}
        self.launches: list[LayerLaunches] = []
        self.listings: list[str] = []
        self.error: QoqcError | None = None
        self._options = options
        self._progress = progress
        self._device = device

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Called by Dynamo, once per graph."""
        try:
            self._note(copy_graph(gm), example_inputs)
        except QoqcError as error:
            # raised again by survey(): Dynamo would wrap it in an error of its own
            self.error = self.error or error
        return gm.forward

    def _note(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        start = time.perf_counter()
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        ctx = Context.of(placeholders, example_inputs, self._options)
        if self._progress is not None:
            weights = sum(isinstance(v, Parameter) and v.dim() == 2 for v in example_inputs)
            ctx.store = cast(WeightStore, _CountingStore(self._progress, weights))
        manager.run(gm, ctx, self.stage)
        for bundle, nodes in ctx.bundles:
            for node, name, transposed in zip(nodes, bundle.names, bundle.transposed, strict=True):
                param = ctx.values[node]
                self.weights[id(param)] = WeightRef(param, transposed, name)
        self.kernels.update(dict.fromkeys(wanted(gm)))
        self.listings.append(listing(gm, ctx, TITLES[self.stage]))
        if self.stage == "decode":
            self.launches += launches(gm, self._device)
        seconds = time.perf_counter() - start
        report = Report(self.stage, dict(ctx.counts), tuple(ctx.refusals), seconds)
        self.reports.append(report)


class _CountingStore:
    """STORE, telling how far the packing of one graph is."""

    def __init__(self, progress: Progress, total: int) -> None:
        """Tell `progress` about each of `total` weights."""
        self._progress = progress
        self._total = total
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(STORE, name)

    def bundle(
        self, refs: Sequence[WeightRef], group_size: GroupSize, *, glu: bool = False
    ) -> Bundle:
        """See WeightStore.bundle."""
        found = STORE.bundle(refs, group_size, glu=glu)
        self._done += len(refs)
        self._progress(self._done, self._total)
        return found
