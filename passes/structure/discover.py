"""`discover`: all facts of a captured graph. `structure_of`: the same for a live model."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.config import Options
from qoqc.errors import Unsupported
from qoqc.passes.context import Context
from qoqc.passes.eligible import ROUTING, downstream_near
from qoqc.passes.match import is_call
from qoqc.passes.normalize import normalize
from qoqc.passes.structure.attention import attention_block
from qoqc.passes.structure.attention_sites import AttentionSite, attention_sites
from qoqc.passes.structure.facts import (
    AttentionBlock,
    Consumer,
    Layer,
    LinearRef,
    MlpBlock,
    ModelStructure,
    NormRef,
    Producer,
    ResidualStream,
)
from qoqc.passes.structure.linears import LinearSite, linear_sites
from qoqc.passes.structure.mlp import mlp_block
from qoqc.passes.structure.nodes import ASKS_SHAPE, operation
from qoqc.passes.structure.norms import NormSite, norm_sites
from qoqc.passes.structure.stream import Reader, State, StreamWalk
from qoqc.passes.structure.trace import Tracer
from qoqc.runtime.dynamo import copy_graph

TOKENS = 6
"""Length of the captured text: above 1, which is a decode step, and unlike common sizes."""


def structure_of(model: Any) -> ModelStructure:
    """Capture one forward of a Hugging Face decoder (no cache, no gradients) and discover it.

    Runs the model once. Raises Unsupported if Dynamo does not capture it as one graph.
    """
    found: list[ModelStructure] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(discover(gm, inputs))
        return gm.forward

    # a code object of its own: Dynamo counts graphs per code object, against a limit
    step = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
    tokens = torch.arange(TOKENS, device=model.device)[None]
    with torch.no_grad():
        torch.compile(step, backend=backend, dynamic=False)(model, tokens)
    if len(found) != 1:
        raise Unsupported(
            f"{type(model).__name__}: Dynamo captured {len(found)} graphs of its forward, not one; "
            "calibrate nothing: compile it with --recipe rtn"
        )
    return found[0]


def _forward(self: Any, tokens: torch.Tensor) -> Any:
    # "self" keeps the parameters' names free of a prefix
    return self.forward(input_ids=tokens, use_cache=False)


def discover(gm: GraphModule, inputs: Sequence[Any]) -> ModelStructure:
    """The facts of a graph captured by Dynamo, with the objects it passes; edits nothing.

    The graph is to hold one forward of batch 1, static shapes, without a cache.
    """
    gm = copy_graph(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    ctx = Context.of(placeholders, inputs, Options())
    normalize(gm, ctx)
    return _Discovery(gm, ctx).result()


@dataclasses.dataclass(frozen=True)
class _Found:
    """What ends in the linear `weight`; no block if it was not recognised."""

    weight: str
    is_attention: bool
    block: AttentionBlock | MlpBlock | None
    state: State | None


class _Discovery:
    """The steps of `discover`, over one graph."""

    def __init__(self, gm: GraphModule, ctx: Context) -> None:
        """Find the sites and walk the stream."""
        self.linears, self.problems = linear_sites(gm, ctx)
        self.norms = norm_sites(gm, ctx)
        self.attentions = attention_sites(gm)
        self.tracer = Tracer(self.linears, self.norms, self.attentions)
        self.walk = StreamWalk(self.linears, self.norms, ctx)
        for node in gm.graph.nodes:
            self.walk.visit(node)
        self.readers = {reader.linear.node: reader for reader in self.walk.readers}
        self.head = next((r for r in self.walk.readers if self._is_head(r)), None)

    def result(self) -> ModelStructure:
        """Put the facts together."""
        writers = [node for node in self.linears if node in self.walk.writers]  # in graph order
        layers = self._layers([self._block(self.linears[node]) for node in writers])
        missing = len(self.attentions) - sum(layer.attention is not None for layer in layers)
        if missing:
            self.problems.append(f"{missing} of {len(self.attentions)} attentions not recognised")
        stream = self._stream(writers)
        return ModelStructure(stream, tuple(layers), tuple(dict.fromkeys(self.problems)))

    def _is_head(self, reader: Reader) -> bool:
        """Does it reach the output without another linear or an attention?"""
        queue, seen = list(reader.linear.node.users), set()
        while queue:
            node = queue.pop()
            if node.op == "output":
                return True
            if node not in seen and node not in self.linears and node not in self.attentions:
                seen.add(node)
                queue.extend(node.users)
        return False

    def _block(self, site: LinearSite) -> _Found:
        """The attention or MLP that ends in a linear, and the state it reads."""
        attention = self._attention_before(site)
        reader = self._reader_before(site if attention is None else attention)
        norm, post_norm = _ref(reader), self._post(site)
        block: AttentionBlock | MlpBlock | str
        if attention is None:
            router = self._router(reader)
            block = mlp_block(site, self.tracer, self.linears, norm, post_norm, router)
        else:
            block = attention_block(attention, site, self.tracer, self.linears, norm, post_norm)
        if not isinstance(block, str):
            block = self._leak(block, site, attention) or block
        if isinstance(block, str):
            self.problems.append(block)
        elif reader is None:
            self.problems.append(f"{site.ref.weight}: what is before it reads no residual stream")
        return _Found(
            site.ref.weight,
            attention is not None,
            None if isinstance(block, str) or reader is None else block,
            None if reader is None else reader.state,
        )

    def _leak(
        self, block: AttentionBlock | MlpBlock, site: LinearSite, attention: AttentionSite | None
    ) -> str | None:
        """What else reads the channels made for a block: it would see what folds do to them."""
        if isinstance(block, AttentionBlock):
            refs: list[LinearRef] = [block.q, block.k, block.v]
        else:
            refs = [ref for ref in (block.gate, block.up) if ref is not None]
        names = {ref.weight for ref in (*refs, site.ref)}
        nodes = [node for node, found in self.linears.items() if found.ref.weight in names]
        if len(nodes) != len(names):
            return f"{site.ref.weight}: a weight of its block is used more than once"
        ends = {site.node} if attention is None else {attention.product, attention.output}
        path = set(self._behind([site.x]))
        queue = [user for node in nodes if node is not site.node for user in node.users]
        seen = set(ends)
        while queue:
            node = queue.pop()
            if node in seen or operation(node) in ASKS_SHAPE:
                continue
            seen.add(node)
            inner = self.linears[site.node].inner is node
            if not (inner or (node in path if attention is None else self.tracer.knows(node))):
                return f"{site.ref.weight}: {node.name} too reads what is computed before it"
            queue.extend(node.users)
        return None

    def _attention_before(self, site: LinearSite) -> AttentionSite | None:
        """The attention that a linear reads without another linear in between."""
        nodes = self._behind([site.x])
        return next((self.attentions[n] for n in nodes if n in self.attentions), None)

    def _reader_before(self, site: LinearSite | AttentionSite) -> Reader | None:
        """The first linear of the stream from which an attention or MLP is computed."""
        start = [site.x] if isinstance(site, LinearSite) else [site.q]
        found = [n for n in self._behind(start) if n in self.readers and not _is_router(n)]
        return self.readers[found[0]] if found else None

    def _behind(self, start: list[Node]) -> list[Node]:
        """What values are computed from, nearest first, up to linears and attentions."""
        queue, seen = list(start), dict[Node, None]()
        while queue:
            node = queue.pop(0)
            if node not in seen:
                seen[node] = None
                if node not in self.linears and node not in self.attentions:
                    queue.extend(node.all_input_nodes)
        return list(seen)

    def _post(self, site: LinearSite) -> NormRef | None:
        post_norm = self.walk.writers[site.node]
        return None if post_norm is None else post_norm.ref

    def _router(self, reader: Reader | None) -> LinearRef | None:
        """The router that reads the same state."""
        for other in self.walk.readers:
            if reader is not None and other.state is reader.state and _is_router(other.linear.node):
                return other.linear.ref
        return None

    def _layers(self, blocks: Sequence[_Found]) -> list[Layer]:
        """A layer begins at every attention, recognised or not."""
        groups: list[list[_Found]] = []
        for found in blocks:
            if not groups or (found.is_attention and any(f.is_attention for f in groups[-1])):
                groups.append([])
            groups[-1].append(found)
        return [_layer(group) for group in groups]

    def _stream(self, writers: Sequence[Node]) -> ResidualStream:
        groups: dict[tuple[NormSite | None, State], list[LinearRef]] = {}
        for reader in self.walk.readers:
            if reader is not self.head:
                groups.setdefault((reader.norm, reader.state), []).append(reader.linear.ref)
        head = None if self.head is None else self.head.linear.ref
        problems = list(self.walk.problems)
        if head is None:
            problems.append("no output head reads it")
        return ResidualStream(
            width=self.walk.width,
            embeddings=tuple(self.walk.tables),
            consumers=tuple(
                Consumer(None if norm is None else norm.ref, tuple(linears))
                for (norm, _), linears in groups.items()
            ),
            producers=tuple(
                Producer(self.linears[node].ref, self._post(self.linears[node])) for node in writers
            ),
            stream_norms=tuple(site.ref for site in self.walk.stream_norms),
            final_norm=_ref(self.head),
            head=head,
            tied=head is not None and head.weight in self.walk.tables,
            multipliers=tuple(self.walk.multipliers),
            problems=tuple(problems),
        )


def _ref(reader: Reader | None) -> NormRef | None:
    return None if reader is None or reader.norm is None else reader.norm.ref


def _is_router(node: Node) -> bool:
    return any(is_call(n, *ROUTING) or operation(n) == "topk" for n in downstream_near(node))


def _layer(group: Sequence[_Found]) -> Layer:
    blocks = [found.block for found in group]
    attentions = [block for block in blocks if isinstance(block, AttentionBlock)]
    mlps = [block for block in blocks if isinstance(block, MlpBlock)]
    states = {found.state for found in group}
    path = os.path.commonprefix([found.weight.split(".")[:-1] for found in group])
    return Layer(
        ".".join(path),
        attentions[0] if attentions else None,
        tuple(mlps),
        bool(attentions) and bool(mlps) and len(states) == 1,
    )
