"""Attention of one layer: keys and values smoothed, values rotated, KV bits chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qoqc.calibrate.alpha import search_strength, smoothing_scale
from qoqc.calibrate.kv_bits import LIMIT, fewest_bits
from qoqc.calibrate.recipe import kv_entry, strength
from qoqc.calibrate.work import (
    Fold,
    LayerWork,
    flat_sample,
    judged_error,
    over_query_heads,
    squared_error,
)
from qoqc.passes.folds.rotate_values import rotate_values
from qoqc.passes.folds.smooth_attention import shared_maximum, smooth_attention
from qoqc.passes.folds.smooth_output import smooth_output
from qoqc.passes.folds.tensors import FoldResult, matrix
from qoqc.passes.structure.facts import AttentionBlock, index_of


def attention_step(work: LayerWork) -> None:
    """Fold the layer's attention for a cache of few bits, and choose how many.

    The error of every trial is that of o's output, with keys and values rounded as the cache
    rounds them: values are smoothed before their heads are rotated, because a rotation spreads an
    outlier over the head and nothing takes it out again.
    """
    block = None if work.layer is None else work.layer.attention
    if block is None:
        return
    maxima = _Maxima(work, block)
    if maxima.keys is None:
        work.record.refused.append(f"{block.o.weight}: its keys and values pass no cache")
    if work.recipe.smooth_attention and maxima.keys is not None and work.recipe.kv_bits != 16:
        _smooth_keys(work, block, maxima)
    if work.recipe.smooth_output:
        _smooth_values(work, block, maxima)
    elif work.recipe.rotate_values:
        work.apply(rotate_values)
    if maxima.keys is not None:
        _choose_bits(work, block)


class _Maxima:
    """The exact input of o, and the largest |x| of the channels before any of the steps.

    keys, values  [kv_heads, head_dim] and [kv_heads, value_dim]; None if no cache saw them
    queries       [kv_heads, head_dim] over the query heads of a key head; None behind a norm
    """

    def __init__(self, work: LayerWork, block: AttentionBlock) -> None:
        """Run the search windows once."""
        recorder, blocks = work.blocks.recorder, work.blocks
        self.inputs: list[Tensor] = []
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.queries: Tensor | None = None
        for x in work.inputs:
            recorder.forget()
            (o_input,) = LayerWork.inputs_of(
                _with_inputs(work, x), block.o.weight, work.tensors, bits=16
            )
            self.inputs.append(o_input)
            if recorder.k is None or recorder.v is None:
                continue
            if recorder.k.shape[1] != block.kv_heads or recorder.v.shape[1] != block.kv_heads:
                continue
            self.keys = _largest(self.keys, recorder.k.abs().amax((0, 2)))
            self.values = _largest(self.values, recorder.v.abs().amax((0, 2)))
        if block.q_norm is None:
            self.queries = self._queries(work, block, blocks.names[work.index])
        recorder.forget()

    def _queries(self, work: LayerWork, block: AttentionBlock, name: str) -> Tensor:
        """Before the rotary embedding: channels it turns together share one factor anyway."""
        found: Tensor | None = None
        rows = block.q.index().to(work.tensors[block.q.weight].device)
        weight = matrix(work.tensors, block.q)[rows]
        bias = None if block.q.bias is None else work.tensors[block.q.bias][rows]
        for x in work.inputs_of(block.q.weight, work.tensors, bits=16):
            q = torch.nn.functional.linear(x, weight, bias)
            found = _largest(found, q.abs().amax((0, 1)).view(block.heads, block.head_dim))
        assert found is not None, f"{name}: at least one window"
        return over_query_heads(found, block)


def _with_inputs(work: LayerWork, x: Tensor) -> LayerWork:
    return LayerWork(**{**vars(work), "inputs": [x]})


def _largest(found: Tensor | None, other: Tensor) -> Tensor:
    return other if found is None else torch.maximum(found, other)


def _smooth_keys(work: LayerWork, block: AttentionBlock, maxima: _Maxima) -> None:
    """SmoothAttention with the alpha (and beta, of the queries) of the least error."""
    name, keys, queries = block.o.weight, maxima.keys, maxima.queries
    assert keys is not None, "the caller checks"
    numbers = torch.arange(keys.numel(), dtype=torch.float64, device=keys.device)
    shared = shared_maximum(block, numbers.view_as(keys)).long()

    def fold(alpha: float, beta: float) -> Fold:
        scale = smoothing_scale(keys, queries, alpha, beta, block.k.weight, shared)
        return lambda structure, tensors: smooth_attention(structure, tensors, {name: scale})

    refused = smooth_attention(work.structure, work.after(_nothing), {name: torch.ones_like(keys)})
    if refused.refused:
        work.record.refused += [str(refusal) for refusal in refused.refused]
        return
    exact = [_output(x, block, work.tensors) for x in maxima.inputs]

    def error(alpha: float, beta: float) -> float:
        tensors = work.after(fold(alpha, beta))
        found = work.inputs_of(name, tensors, work.recipe.kv_bits)
        return sum(
            squared_error(_output(x, block, tensors), y) for x, y in zip(found, exact, strict=True)
        )

    search = search_strength(error, block.k.weight, with_beta=queries is not None)
    work.apply(fold(search.best.alpha, search.best.beta))
    work.record.strengths["attention"] = strength(search)


def _smooth_values(work: LayerWork, block: AttentionBlock, maxima: _Maxima) -> None:
    """Output smoothing of o, judged behind the rotation of the value heads."""
    name = block.o.weight
    exact = _output(flat_sample(maxima.inputs), block, work.tensors)
    columns = matrix(work.tensors, block.o)[..., index_of(block.columns).to(exact.device)]
    largest = columns.abs().amax(0).view(block.heads, block.value_dim)
    weights = over_query_heads(largest, block)
    values = maxima.values
    if values is None:
        found = torch.cat([x.reshape(-1, x.shape[-1]) for x in maxima.inputs]).abs().amax(0)
        found = found[index_of(block.columns).to(found.device)]
        values = over_query_heads(found.view(block.heads, block.value_dim), block)

    def fold(alpha: float, beta: float) -> Fold:
        scale = smoothing_scale(values, weights, alpha, beta, block.v.weight)

        def both(structure: object, tensors: dict[str, Tensor]) -> FoldResult:
            result = smooth_output(work.structure, tensors, {name: scale})
            if result.applied and work.recipe.rotate_values:
                rotate_values(work.structure, tensors)
            return result

        return both

    def error(alpha: float, beta: float) -> float:
        tensors = work.after(fold(alpha, beta))
        x = flat_sample(work.inputs_of(name, tensors, work.recipe.kv_bits))
        return squared_error(work.rounded_output(x, block.o, tensors), exact)

    if block.v_norm is not None:
        work.apply(fold(0.0, 0.0))  # it is refused, and that is recorded
        return

    def judged(alpha: float, beta: float) -> float:
        tensors = work.after(fold(alpha, beta))
        found = work.inputs_of(name, tensors, work.recipe.kv_bits)
        return judged_error(work, found, outputs, block.o, tensors)

    search = search_strength(error, name)
    outputs = torch.cat([_output(x[0], block, work.tensors) for x in maxima.inputs])
    plain, best = judged(0.0, 0.0), judged(search.best.alpha, search.best.beta)
    gain = best / plain if plain > 0 else 1.0
    chosen = strength(search, gain)
    work.apply(fold(chosen["alpha"], chosen["beta"]))
    work.record.strengths["values"] = chosen


def _choose_bits(work: LayerWork, block: AttentionBlock) -> None:
    """The fewest bits that keep what the attention heads give o within kv_bits.LIMIT."""
    exact = work.inputs_of(block.o.weight, work.tensors, bits=16)
    columns = index_of(block.columns).to(exact[0].device)
    heads = (block.heads, block.value_dim)

    def error(bits: int) -> float:
        found = work.inputs_of(block.o.weight, work.tensors, bits)
        parts = [
            torch.stack([(x - y).double().square(), y.double().square()])[:, 0, :, columns]
            .view(2, -1, *heads)
            .sum((1, 3))
            for x, y in zip(found, exact, strict=True)
        ]
        noise, signal = torch.stack(parts).sum(0)
        ratio = torch.where(signal > 0, noise / signal, 0.0)
        return math.sqrt(float(ratio.amax()))

    choice = fewest_bits(error, block.k.weight, limit=LIMIT, start=work.recipe.kv_bits)
    work.record.kv = kv_entry(choice)


def _output(x: Tensor, block: AttentionBlock, tensors: dict[str, Tensor]) -> Tensor:
    return x @ matrix(tensors, block.o).t()


def _nothing(structure: object, tensors: dict[str, Tensor]) -> FoldResult:
    return FoldResult((), ())
