"""The kernels a model will run, as source text: found from its graphs, written without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.codegen.build import OPS, generate, runs
from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels import (
    act_quantize,
    attention,
    attention_decode,
    few_call,
    kv_round,
    norm_call,
    rotate_append_call,
    step_spec,
)
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.kernels.sampling import SampleSpec
from qoqc.codegen.kernels.step_spec import StepSpec
from qoqc.codegen.pair import Pair, pairs
from qoqc.codegen.tuning import table
from qoqc.codegen.tuning.choose import bucket, known
from qoqc.errors import OptionError
from qoqc.ir import ops
from qoqc.ir.spec import AttentionSpec, LinearSpec
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
    found = {kernel: None for node in gm.graph.nodes for kernel in kernels_of(node)}
    found.update({few_kernel(each): None for each in pairs(gm.graph)})
    found.update({each: None for kernel in list(found) for each in _with_masks(kernel)})
    return list(found)


def _with_masks(kernel: Wanted) -> list[Wanted]:
    """What stands for an attention where sequences of a batch begin with padding.

    Of the mask the padding alone is left, causality and windows are arguments (passes/windows.py).
    """
    if not isinstance(kernel.spec, (AttentionSpec, StepSpec)):
        return []
    return [Wanted(kernel.op, dataclasses.replace(kernel.spec, has_mask=True))]


def beyond_windows(kernels: Iterable[Wanted]) -> list[Wanted]:
    """What prompts take that are longer than a window: the one that was captured is short.

    kernels  of a model's prompt and step; the step's say which caches have windows
    """
    kernels = list(kernels)
    steps = [each.spec for each in kernels if isinstance(each.spec, StepSpec)]
    windowed = {spec.kv for spec in steps if spec.has_window}
    return [
        Wanted(each.op, dataclasses.replace(each.spec, has_window=True))
        for each in kernels
        if isinstance(each.spec, AttentionSpec) and each.spec.kv in windowed
    ]


def sampling_kernels(vocabulary: int) -> list[Wanted]:
    """What a server and generate(top_p=...) choose tokens with, which is in no graph."""
    specs = (SampleSpec(vocabulary, True, True, True), SampleSpec(vocabulary, has_top_p=True))
    return [Wanted("sample_scores", spec) for spec in specs]


def few_kernel(pair: Pair) -> Wanted:
    """What takes the place of both of a pair's kernels where tokens are few."""
    norm = None
    if is_call(pair.quantizer, ops.norm_quant):
        norm = norm_call.call_of(*_values(pair.quantizer)).spec
    return Wanted(few_call.OP, few_call.FewSpec(pair.linear.meta["qoqc"], norm))


def kernels_of(node: Node) -> list[Wanted]:
    """The kernels behind one node of a rewritten graph; none where it is no op of qoqc's."""
    spec = node.meta.get("qoqc")
    if isinstance(spec, LinearSpec):
        return [Wanted("w4a8_linear", spec)]
    make = _MAKERS.get(node.target) if node.op == "call_function" else None
    return [] if make is None else make(node)


def _quantize(node: Node) -> list[Wanted]:
    x = example(node.args[0])
    return [Wanted("quantize", QuantizeSpec(int(x.shape[-1]), x.dtype))]


def _norm_quant(node: Node) -> list[Wanted]:
    return [Wanted("norm_quantize", norm_call.call_of(*_values(node)).spec)]


def _act_quant(node: Node) -> list[Wanted]:
    gate, up, kind = _values(node)
    return [Wanted("act_quantize", act_quantize.spec_of(gate, up, kind))]


def _append(node: Node) -> list[Wanted]:
    k_pages, v_pages, kv_words, table = (example(arg) for arg in node.args[:4])
    bits: Any = argument(node, 7, "bits")
    return [Wanted("kv_append", attention.kv_spec_of(k_pages, v_pages, kv_words, table, bits))]


def _round(node: Node) -> list[Wanted]:
    bits: Any = argument(node, 1, "bits")
    return [Wanted("kv_round", kv_round.spec_of(example(node.args[0]), bits))]


def _rotate_append(node: Node) -> list[Wanted]:
    append: Any = rotate_append_call.Append(*_values(node))
    return [Wanted("kv_rotate_append", rotate_append_call.spec_of(append))]


def _decode(node: Node) -> list[Wanted]:
    step: Any = step_spec.Step(*_values(node))
    spec = step_spec.spec_of(step)
    # many sequences have their parts added up where they meet, which takes one kernel less;
    # step_append is for tiles without FUSED, which no heuristic chooses
    return [Wanted(name, spec) for name in ("step_attend", "step_combine")]


def _values(node: Node) -> list[Any]:
    """The arguments of a call, tensors by their example."""
    return [example(arg) if isinstance(arg, Node) else arg for arg in node.args]


def _attention(node: Node) -> list[Wanted]:
    """Split along the cache for few queries, tiled over them for many, as codegen/dispatch.py."""
    scale: Any = argument(node, 9, "scale")
    bits: Any = argument(node, 10, "bits")
    causal: Any = argument(node, 11, "causal")
    q, k_pages, v_pages, kv_words, block_table, length, mask, k_chunk, v_chunk = (
        example(arg) for arg in node.args[:9]
    )
    softcap: Any = argument(node, 12, "softcap", 0.0)
    sinks = example(argument(node, 13, "sinks"))
    window: Any = argument(node, 14, "window", 0)
    call = attention.Call(
        q, k_pages, v_pages, kv_words, block_table, length, mask, k_chunk, v_chunk, scale, softcap,
        sinks, window,
    )  # fmt: skip
    spec = attention.spec_of(call, bits, causal)
    # the unpacking belongs to the form for sm_90, and is refused where that is
    tiled = [Wanted("attention_unpack", spec), Wanted("attention_prefill", spec)]
    if not attention_decode.takes(call, spec):
        return tiled
    split = [Wanted("attention_decode", spec), Wanted("attention_combine", spec)]
    # a captured prompt stands for longer ones
    return split if q.shape[2] == 1 else [*split, *tiled]


_MAKERS: dict[Any, Callable[[Node], list[Wanted]]] = {
    ops.quantize_act: _quantize,
    ops.norm_quant: _norm_quant,
    ops.act_quant: _act_quant,
    ops.kv4_append: _append,
    ops.kv4_round: _round,
    ops.kv4_attention: _attention,
    ops.kv4_rotate_append: _rotate_append,
    ops.kv4_decode: _decode,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel as it is generated: for launches of about `size` tokens on `device`.

    known  the choice comes from a tuning table, not from a heuristic
    """

    wanted: Wanted
    family: Family
    tile: Tile
    size: int
    device: DeviceKey
    known: bool
    source: str

    @property
    def stem(self) -> str:
        """Its file name without extension: the same source has the same name."""
        return f"{self.family.name}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"


def devices(device: torch.device, archs: Sequence[int] = ()) -> tuple[DeviceKey, ...]:
    """What kernels are chosen for: the GPU `device` if it is one, and a nominal one per arch.

    Neither given: all of NOMINAL. Raises OptionError for an arch that NOMINAL has no part for.
    """
    nominal = {key.arch: key for key in NOMINAL}
    for arch in archs:
        if arch not in nominal:
            names = ", ".join(f"sm_{known}" for known in nominal)
            raise OptionError(f"arch sm_{arch}: expected {names}")
    here = (device_key(device),) if device.type == "cuda" else ()
    rest = archs or ([] if here else list(nominal))
    return (*here, *(nominal[arch] for arch in rest if arch not in {key.arch for key in here}))


def choices(kernels: Sequence[Wanted], keys: Sequence[DeviceKey]) -> list[Choice]:
    """Form, tile and source of every kernel at each of SIZES for each device."""
    found = []
    texts: dict[tuple[str, Any, Tile], str] = {}
    for kernel in kernels:
        for key in keys:
            if not runs(kernel.op, kernel.spec, key):
                continue
            op = OPS[kernel.op]
            for size in SIZES:
                if kernel.op == few_call.OP and size > few_call.MAX_TOKENS:
                    continue
                family, tile = known(op, kernel.spec, size, key)
                in_table = table.look_up(op, kernel.spec, bucket(size), key) is not None
                same = (family.name, kernel.spec, tile)
                if same not in texts:
                    texts[same] = generate(family, kernel.spec, tile)
                found.append(Choice(kernel, family, tile, size, key, in_table, texts[same]))
    return found
