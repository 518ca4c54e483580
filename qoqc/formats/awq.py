"""AutoAWQ's "gemm" layout: W[n, k] = (q - zero) * scale, the zeros and scales per group of k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qoqc.errors import Unsupported
from qoqc.formats.layer import Found, Layer, per_group
from qoqc.formats.words import PER_WORD, unpack_words

MARK = "qweight"
SUFFIXES = (MARK, "qzeros", "scales")

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel, of eight neighbours, in each nibble of a word from the lowest on."""


def check(config: Mapping[str, Any]) -> None:
    """Raise Unsupported for another number of bits or another of AWQ's layouts."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise Unsupported(f"AWQ with bits={bits!r}: qoqc takes 4")
    # AutoAWQ calls it "version", newer files "format"
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise Unsupported(
            f"AWQ version {version!r} orders its weights for one kernel; qoqc reads 'gemm'; "
            "export the checkpoint again with AutoAWQ's version='GEMM'"
        )


def read(layer: Layer) -> Found:
    """The fp32 weight [N, K] of a linear: exact, as it has 4 and 11 bits to multiply."""
    qweight = layer.take(MARK, (torch.int32,), None, None)
    k, n = qweight.shape[0], qweight.shape[1] * PER_WORD
    scales = layer.take("scales", (torch.float16, torch.bfloat16, torch.float32), None, n)
    groups = scales.shape[0]
    if not groups or k % groups:
        raise layer.wrong("scales", f"has {groups} groups for {k} input channels")
    qzeros = layer.take("qzeros", (torch.int32,), groups, n // PER_WORD)
    codes = unpack_words(qweight, 1, ORDER).view(groups, k // groups, n).float()
    zeros = unpack_words(qzeros, 1, ORDER).float()
    values = (codes - zeros[:, None]) * scales.float()[:, None]
    return Found(values.view(k, n).t().contiguous(), scale=per_group(scales.float().t(), k))
