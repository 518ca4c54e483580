"""The structure in words, one row per kind of layer, for `qoqc inspect`."""

from __future__ import annotations

from collections.abc import Iterable

from qoqc.passes.structure.facts import AttentionBlock, Layer, LinearRef, MlpBlock, ModelStructure

COLUMNS = ("layers", "attention", "MLP", "residual")

UNKNOWN = "not recognised"


def layer_rows(structure: ModelStructure) -> list[tuple[str, str, str, str]]:
    """A row of COLUMNS for every distinct kind of layer, in order of first appearance."""
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for number, layer in enumerate(structure.layers):
        numbers.setdefault(_row(layer), []).append(number)
    return [(_spans(found), *row) for row, found in numbers.items()]


def stream_line(structure: ModelStructure) -> str:
    """`128 channels from model.embed_tokens to model.embed_tokens (tied)`, and what is special."""
    stream = structure.stream
    tables = ", ".join(name.removesuffix(".weight") for name in stream.embeddings) or UNKNOWN
    head = UNKNOWN if stream.head is None else stream.head.weight.removesuffix(".weight")
    parts = [f"{stream.width} channels from {tables} to {head}{' (tied)' if stream.tied else ''}"]
    if stream.multipliers:
        parts.append("multiplied by " + ", ".join(f"{value:g}" for value in stream.multipliers))
    if stream.stream_norms:
        parts.append(f"{len(stream.stream_norms)} norms in the stream itself")
    return "; ".join(parts)


def _row(layer: Layer) -> tuple[str, str, str]:
    attention = UNKNOWN if layer.attention is None else _attention(layer.attention)
    mlp = " + ".join(map(_mlp, layer.mlps)) or UNKNOWN
    return attention, mlp, _residual(layer)


def _attention(block: AttentionBlock) -> str:
    shared = "" if block.heads == block.kv_heads else f"/{block.kv_heads}"
    parts = [f"{block.heads}{shared} heads of {block.head_dim}"]
    if block.rope == "none":
        parts.append("no RoPE")
    else:
        part = "" if block.rotary_dim == block.head_dim else f" {block.rotary_dim}"
        parts.append(f"RoPE {block.rope}{part}")
    if block.q.weight == block.k.weight:
        parts.append("fused qkv")
    biased = "".join(n for n in "qkvo" if getattr(block, n).bias is not None)
    if biased:
        parts.append(f"bias {biased}")
    normed = "".join(n for n in "qkv" if getattr(block, f"{n}_norm") is not None)
    if normed:
        parts.append(f"norm on {normed}")
    if block.softcap is not None:
        parts.append(f"soft-cap {block.softcap:g}")
    if block.window is not None:
        parts.append(f"window {block.window}")
    return ", ".join(parts)


def _mlp(block: MlpBlock) -> str:
    act = f"{block.activation}(up)" if block.gate is None else f"{block.activation}(gate) * up"
    parts = [f"{act}, {block.down.in_features}"]
    if block.gate is not None and block.gate.weight == block.up.weight:
        parts.append("fused")
    if _has_bias((block.up, block.down)):
        parts.append("bias")
    if block.down.experts:
        parts.append(f"{block.down.experts} experts")
    return ", ".join(parts)


def _has_bias(refs: Iterable[LinearRef]) -> bool:
    return any(ref.bias is not None for ref in refs)


def _residual(layer: Layer) -> str:
    blocks = [block for block in (layer.attention, *layer.mlps) if block is not None]
    norms = [block.norm for block in blocks if block.norm is not None]
    parts = ["parallel" if layer.parallel else "sequential"]
    parts += sorted({"RMSNorm" if norm.kind == "rms" else "LayerNorm" for norm in norms})
    if any(norm.offset == 1 for norm in norms):
        parts.append("1 + weight")
    if any(block.post_norm is not None for block in blocks):
        parts.append("post-norm")
    return ", ".join(parts)


def _spans(numbers: list[int]) -> str:
    """`0-3, 5 (5)`: which layers, and how many."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(shown) > 3:
        shown = [*shown[:2], "...", shown[-1]]
    return f"{', '.join(shown)} ({len(numbers)})"
