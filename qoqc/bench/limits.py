"""What a decode step must cost at least: bytes and operations of its parts at the GPU's limits."""

from __future__ import annotations

from typing import Any

from qoqc.codegen.roofline import TOKENS, Limits, gemm_bytes, gemm_operations, limits_of
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey
from qoqc.runtime.weights import STORE


def decode_limits(
    model: Any, kv_bytes: int, batch: int, context: int, device: DeviceKey
) -> dict[str, float]:
    """Microseconds per step by group of bench.breakdown, for a model that qoqc.compile compiled.

    w4a8_linear       packed weights and activations read, results written, or the operations
    step_attend       the keys and values of `context` tokens, `kv_bytes` each, read once (also
                      under the name of the kernel that does not rotate, attention_decode)
    16-bit matmul     the head, read once, if it is in 16 bit
    Groups that are not here are small: launching costs them more than their bytes.
    """
    limits = limits_of(device)
    head = model.get_output_embeddings()
    cache = batch * context * kv_bytes / limits.read
    found = {
        "w4a8_linear": linears_seconds(model, batch, limits),
        "step_attend": cache,
        "attention_decode": cache,
    }
    if head is not None and model.qoqc_options.lm_head == "16":
        rows, columns = head.weight.shape
        moved = 2 * (rows * columns + batch * (rows + columns))
        # a tensor core does half as many bf16 operations as int8 ones
        found["16-bit matmul"] = max(
            moved / limits.read, 2 * batch * rows * columns / (limits.int8 / 2)
        )
    return {group: 1e6 * seconds for group, seconds in found.items()}


def linears_seconds(model: Any, tokens: int, limits: Limits) -> float:
    """All packed linears of a model, each at the larger of its two limits."""
    total = 0.0
    for bundle in STORE.bundles_of(model):
        packed = bundle.packed
        spec = LinearSpec(packed.in_features, packed.out_features, packed.group_size, model.dtype)
        moved, operations = (
            float(work.subs(TOKENS, tokens)) for work in (gemm_bytes(spec), gemm_operations(spec))
        )
        total += max(moved / limits.read, operations / limits.int8)
    return total
