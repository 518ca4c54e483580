"""GPTQ's layout (AutoGPTQ, GPTQModel): W[n, k] = (q - zero) * scale of the group of k.

With act-order ("desc_act") the groups are not neighbours: g_idx says which one an input channel
is in. Version 1 stores zero - 1, "gptq_v2" the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qoqc.errors import Unsupported
from qoqc.formats.layer import Found, Layer, per_group
from qoqc.formats.words import PER_WORD, unpack_words

MARK = "qweight"
SUFFIXES = (MARK, "qzeros", "scales", "g_idx")

VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""What a stored zero point is to be raised by, by the name of the format."""


def zero_offset(config: Mapping[str, Any]) -> int:
    """What stored zero points lack; Unsupported for other bits and other layouts."""
    bits = config.get("bits", 4)
    if bits != 4:
        raise Unsupported(f"GPTQ with bits={bits!r}: qoqc takes 4")
    name = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        name = "marlin"
    if name not in VERSIONS:
        raise Unsupported(
            f"GPTQ in the format {name!r}: qoqc reads {', '.join(VERSIONS)}; "
            "save the checkpoint in one of these"
        )
    return VERSIONS[name]


def read(layer: Layer, offset: int) -> Found:
    """The fp32 weight [N, K] of a linear: exact, as it has 5 and 11 bits to multiply."""
    qweight = layer.take(MARK, (torch.int32,), None, None)
    k, n = qweight.shape[0] * PER_WORD, qweight.shape[1]
    scales = layer.take("scales", (torch.float16, torch.bfloat16, torch.float32), None, n)
    groups = scales.shape[0]
    qzeros = layer.take("qzeros", (torch.int32,), groups, -(-n // PER_WORD))
    zeros = unpack_words(qzeros, 1, size=n)
    if offset and (zeros == 15).any():
        # 0 - 1: AutoGPTQ spoils the zeros after it in the word, GPTQModel borrows from the next
        raise layer.wrong(
            "qzeros",
            "has a zero point 0, which version 1 of the format cannot hold; save it as gptq_v2",
        )
    group = _group_of(layer, k, groups)
    codes = unpack_words(qweight, 0).float()
    values = (codes - (zeros.float() + offset)[group]) * scales.float()[group]
    scale = None
    if not k % groups and torch.equal(group, _neighbours(k, groups)):
        scale = per_group(scales.float().t(), k)
    return Found(values.t().contiguous(), scale=scale)


def _group_of(layer: Layer, k: int, groups: int) -> torch.Tensor:
    """The group of every input channel, int64 [K]."""
    if layer.has("g_idx"):
        group: torch.Tensor = layer.take("g_idx", (torch.int32, torch.int64), k).long()
        if ((group < 0) | (group >= groups)).any():
            raise layer.wrong("g_idx", f"is not within 0..{groups - 1}; the file is damaged")
        return group
    if not groups or k % groups:
        raise layer.wrong("scales", f"has {groups} groups for {k} input channels")
    return _neighbours(k, groups)


def _neighbours(k: int, groups: int) -> torch.Tensor:
    return torch.arange(groups).repeat_interleave(k // groups)
