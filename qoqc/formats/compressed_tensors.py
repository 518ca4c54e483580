"""compressed-tensors with symmetric 4-bit integers per group or channel: W[n, k] = q * scale.

"pack-quantized" holds q + 8 in weight_packed, eight of a row to an int32 word; "int-quantized"
holds q as int8 in weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qoqc.errors import Unsupported
from qoqc.formats.layer import Found, Layer, per_group
from qoqc.formats.words import PER_WORD, unpack_words

MARK = "weight_scale"
PACKED = "weight_packed"
SUFFIXES = (MARK, PACKED, "weight", "weight_shape", "weight_zero_point", "weight_g_idx",
            "input_scale", "input_zero_point")  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized")


def check(config: Mapping[str, Any]) -> None:
    """Raise Unsupported for anything but symmetric int4 weights, and for online transforms."""
    name = config.get("format")
    if name not in FORMATS:
        raise Unsupported(
            f"compressed-tensors in the format {name!r}: qoqc reads {', '.join(FORMATS)}"
        )
    sparsity = _part(config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise Unsupported(f"compressed-tensors with sparsity {sparsity!r}: qoqc takes dense only")
    if config.get("transform_config"):
        raise Unsupported(
            "compressed-tensors with transform_config: its weights need transforms of the "
            "activations, which qoqc does not add; quantize without them"
        )
    groups = _part(config, "config_groups")
    if not groups:
        raise Unsupported("compressed-tensors without config_groups: nothing says what is stored")
    for group in groups:
        weights = _part(_part(groups, group), "weights")
        found = {key: weights.get(key) for key in ("type", "num_bits", "symmetric", "strategy")}
        right = found["strategy"] in ("group", "channel") and found["symmetric"] is True
        if not right or (found["type"], found["num_bits"]) != ("int", 4):
            said = ", ".join(f"{key}={value!r}" for key, value in found.items())
            raise Unsupported(
                f"compressed-tensors {group}: {said}; qoqc takes symmetric 4-bit integers per "
                "group or channel"
            )


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside the config; an empty one where it is missing or null."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise Unsupported(f"compressed-tensors: {key} in config.json is not an object")
    return value


def read(layer: Layer) -> Found:
    """The fp32 weight [N, K] of a linear: exact, as it has 4 and 11 bits to multiply."""
    if layer.has("weight_zero_point"):
        raise layer.wrong("weight_zero_point", "is there, but config.json says symmetric")
    codes = _packed(layer) if layer.has(PACKED) else _plain(layer)
    n, k = codes.shape
    scale = layer.take(MARK, (torch.float16, torch.bfloat16, torch.float32), n, None).float()
    groups = scale.shape[1]
    if layer.has("weight_g_idx"):
        group: torch.Tensor = layer.take("weight_g_idx", (torch.int32, torch.int64), k).long()
        if ((group < 0) | (group >= groups)).any():
            raise layer.wrong("weight_g_idx", f"is not within 0..{groups - 1}")
        return Found(codes.float() * scale[:, group])
    if not groups or k % groups:
        raise layer.wrong(MARK, f"has {groups} groups for {k} input channels")
    values = codes.view(n, groups, k // groups).float() * scale[..., None]
    return Found(values.view(n, k), scale=per_group(scale, k))


def _packed(layer: Layer) -> torch.Tensor:
    """int8 [N, K] within -8..7 from words."""
    shape = layer.take("weight_shape", (torch.int64, torch.int32), 2)
    n, k = (int(size) for size in shape)
    if n <= 0 or k <= 0:
        raise layer.wrong("weight_shape", f"is [{n}, {k}]; the file is damaged")
    words = layer.take(PACKED, (torch.int32,), n, -(-k // PER_WORD))
    return unpack_words(words, 1, size=k).view(torch.int8) - 8


def _plain(layer: Layer) -> torch.Tensor:
    weight: torch.Tensor = layer.take("weight", (torch.int8,), None, None)
    if ((weight < -8) | (weight > 7)).any():
        raise layer.wrong("weight", "is not within -8..7, as 4 bits are")
    return weight
