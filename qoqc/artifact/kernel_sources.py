"""The kernels a model will run, as source text: found from its graphs, written without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.codegen.build import OPS, generate
from qoqc.codegen.kernels import act_quantize, attention, attention_decode, norm_call
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.tuning.choose import known
from qoqc.ir import ops
from qoqc.ir.spec import LinearSpec
from qoqc.passes.match import argument, example, is_call
from qoqc.runtime.device import DeviceKey, device_key

NOMINAL = (
    DeviceKey("A100", 80, 108, 163 * 1024),
    DeviceKey("L40S", 89, 142, 99 * 1024),
    DeviceKey("H100", 90, 132, 227 * 1024),
)
"""What sources are written for where there is no GPU: one well-known part per architecture."""

SIZES = (1, 16, 512)
"""Tokens per launch that tiles are chosen for: decode, a small batch, prefill."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A kernel a graph needs: what the tuner calls its op, and its spec."""

    op: str
    spec: Any


def wanted(gm: GraphModule) -> list[Wanted]:
    """The kernels behind the qoqc ops of a rewritten graph."""
    found: dict[Wanted, None] = {}
    for node in gm.graph.nodes:
        if is_call(node, ops.quantize_act):
            x = example(node.args[0])
            found[Wanted("quantize", QuantizeSpec(int(x.shape[-1]), x.dtype))] = None
        if is_call(node, ops.norm_quant):
            tensors = (example(arg) for arg in node.args[:4])
            scalars: Any = node.args[4:]
            found[Wanted("norm_quantize", norm_call.call_of(*tensors, *scalars).spec)] = None
        if is_call(node, ops.act_quant):
            gate, up = (example(arg) for arg in node.args[:2])
            kind: Any = node.args[2]
            found[Wanted("act_quantize", act_quantize.spec_of(gate, up, kind))] = None
        spec = node.meta.get("qoqc")
        if isinstance(spec, LinearSpec):
            found[Wanted("w4a8_linear", spec)] = None
        if is_call(node, ops.kv4_append):
            k_pages, v_pages, kv_words, table = (example(arg) for arg in node.args[:4])
            bits: Any = argument(node, 7, "bits")
            cache = attention.kv_spec_of(k_pages, v_pages, kv_words, table, bits)
            found[Wanted("kv_append", cache)] = None
        if is_call(node, ops.kv4_attention):
            found.update(dict.fromkeys(_attention(node)))
    return list(found)


def _attention(node: Node) -> list[Wanted]:
    """Split along the cache for few queries, tiled over them for many, as codegen/dispatch.py."""
    scale: Any = argument(node, 9, "scale")
    bits: Any = argument(node, 10, "bits")
    causal: Any = argument(node, 11, "causal")
    q, k_pages, v_pages, kv_words, block_table, length, mask, k_chunk, v_chunk = (
        example(arg) for arg in node.args[:9]
    )
    call = attention.Call(
        q, k_pages, v_pages, kv_words, block_table, length, mask, k_chunk, v_chunk, scale
    )
    spec = attention.spec_of(call, bits, causal)
    if call.rows > attention_decode.MAX_ROWS:
        return [Wanted("attention_prefill", spec)]
    return [Wanted("attention_decode", spec), Wanted("attention_combine", spec)]


def sources(kernels: Sequence[Wanted], device: torch.device) -> dict[str, str]:
    """Source text by file name, for the GPU `device`, or for NOMINAL ones if it is a CPU."""
    keys = (device_key(device),) if device.type == "cuda" else NOMINAL
    texts: dict[str, str] = {}
    for kernel in kernels:
        choices = (known(OPS[kernel.op], kernel.spec, size, key) for key in keys for size in SIZES)
        for family, tile in choices:
            text = generate(family, kernel.spec, tile)
            texts[f"{family.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"] = text
    return texts
