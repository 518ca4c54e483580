"""Which format a checkpoint is in, by its config.json and, for QServe's, by its tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from qoqc.errors import Unsupported
from qoqc.formats import awq, compressed_tensors, gptq, qserve
from qoqc.formats.files import TensorFiles
from qoqc.formats.layer import Found, Layer

GroupSize = Literal[128, -1]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kind of checkpoint is read.

    mark      suffix of a tensor that every quantized linear has, and nothing else
    suffixes  all its tensors
    read      finds the weight of a linear
    group     what an inexact one is rounded to; None: what load_source was asked for
    foreign   suffixes of other tensors that are dropped
    """

    mark: str
    suffixes: tuple[str, ...]
    read: Callable[[Layer], Found]
    group: Callable[[Layer], GroupSize] | None = None
    foreign: tuple[str, ...] = ()


def detect(directory: Path, found: Any, files: TensorFiles) -> tuple[str, Format]:
    """Which format it is, by quantization_config; QServe's own files have none."""
    if found is not None and not isinstance(found, Mapping):
        raise Unsupported(f"{directory}/config.json: quantization_config is not an object")
    if any(name.endswith(".channel_scale") for name in files.names):
        raise Unsupported(f"{directory} is an artifact of qoqc already")
    has_qserve = any(name.endswith(f".{qserve.MARK}") for name in files.names)
    method = None if found is None else str(found.get("quant_method")).lower()
    if method in (None, "qoq", "qserve"):
        if not has_qserve:
            raise Unsupported(
                f"{directory} has no 4-bit weights: no quantization_config that qoqc reads, and "
                f"no tensor *.{qserve.MARK}; a 16-bit model goes to `qoqc compile`"
            )
        return "qserve", _QSERVE
    config: Mapping[str, Any] = found or {}
    if method == "awq":
        awq.check(config)
        return method, Format(awq.MARK, awq.SUFFIXES, awq.read)
    if method == "gptq":
        read = functools.partial(gptq.read, offset=gptq.zero_offset(config))
        return method, Format(gptq.MARK, gptq.SUFFIXES, read)
    if method == "compressed-tensors":
        compressed_tensors.check(config)
        suffixes = compressed_tensors.SUFFIXES
        scales = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")
        return method, Format(
            compressed_tensors.MARK, suffixes, compressed_tensors.read, foreign=scales
        )
    raise Unsupported(
        f"{directory} is quantized by {method!r}; qoqc reads awq, gptq, compressed-tensors and "
        "QServe's checkpoints, or takes the 16-bit model (`qoqc compile`)"
    )


def _qserve_group(layer: Layer) -> GroupSize:
    return -1 if layer.has("s1_szeros") else 128


_QSERVE = Format(
    qserve.MARK,
    qserve.SUFFIXES,
    qserve.read,
    _qserve_group,
    # of QServe's KV cache per tensor, which ours (per token and head) does not need
    foreign=(".kv_scale_quant_orig",),
)
