"""Checkpoints that others quantized to 4 bit, read as packed weights and 16-bit tensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qoqc.errors import Unsupported
from qoqc.formats import qserve
from qoqc.formats.detect import Format, GroupSize, detect
from qoqc.formats.files import TensorFiles
from qoqc.formats.layer import Layer
from qoqc.formats.regrid import regrid
from qoqc.ir.spec import GROUP
from qoqc.quant.weight import PackedWeight, dequantize_weight, quantize_weight

COMPUTED = (".rotary_emb.inv_freq",)
"""Buffers that older checkpoints carry and models compute."""

Progress = Callable[[int, int], None]
"""Called with (linears read so far, linears in the checkpoint)."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What packing made of a linear's weight.

    name         of the Parameter
    requantized  put on another grid, because the source's is not one of ours
    error        relative RMS of the packed weight against the source's; 0 = bit for bit the same
    """

    name: str
    requantized: bool
    error: float


@dataclasses.dataclass(frozen=True)
class Source:
    """A quantized checkpoint as qoqc takes it.

    kind     "qserve", "awq", "gptq" or "compressed-tensors"
    config   config.json without its quantization_config
    packed   the quantized linears [N, K] by the name of their Parameter
    tensors  everything else, as stored, by name
    report   one line per packed weight, sorted by name
    dropped  names of tensors that only the source's own runtime has a use for
    """

    kind: str
    config: dict[str, Any]
    packed: dict[str, PackedWeight]
    tensors: dict[str, torch.Tensor]
    report: tuple[Change, ...]
    dropped: tuple[str, ...]

    @property
    def group_size(self) -> GroupSize:
        """The format of the packed weights; Unsupported if the linears differ in it."""
        sizes: set[GroupSize] = {packed.group_size for packed in self.packed.values()}
        if len(sizes) != 1:
            raise Unsupported("some linears are quantized per group and some per channel")
        return sizes.pop()


def load_source(
    directory: str | os.PathLike[str],
    group_size: GroupSize = 128,
    progress: Progress | None = None,
) -> Source:
    """Read a quantized checkpoint: QServe, AWQ, GPTQ or compressed-tensors, all 4 bit.

    QServe's linears keep their integers. The other formats have a 16-bit scale per group, which
    ours has not: their weights are dequantized exactly and put on the two-level grid next to
    theirs (regrid.py), or, where their groups are not ours or `group_size` is -1, rounded anew.
    The report says how much that changes.
    Raises Unsupported for other formats and variants, and for damaged or incomplete files.
    """
    path = Path(directory)
    with TensorFiles(path) as files:
        config = _read_config(path)
        kind, form = detect(path, config.pop("quantization_config", None), files)
        mark = f".{form.mark}"
        modules = [name.removesuffix(mark) for name in files.names if name.endswith(mark)]
        if not modules:
            raise Unsupported(f"{path} says {kind}, but no tensor is called *{mark}")
        packed: dict[str, PackedWeight] = {}
        report = []
        for done, module in enumerate(modules, start=1):
            layer, name = Layer(files, module), f"{module}.weight"
            packed[name], change = _pack(name, layer, form, group_size)
            report.append(change)
            if progress is not None:
                progress(done, len(modules))
        own = {f"{module}.{suffix}" for module in modules for suffix in form.suffixes}
        others = [name for name in files.names if name not in own]
        twice = sorted(packed.keys() & set(others))
        if twice:
            raise Unsupported(f"{path} holds {twice[0]} both quantized and as it is; remove one")
        dropped = tuple(name for name in others if name.endswith((*form.foreign, *COMPUTED)))
        tensors = {name: files.get(name) for name in others if name not in dropped}
        if kind == "qserve":
            qserve.require_unit_norms(str(path), tensors)
    return Source(kind, config, packed, tensors, tuple(report), dropped)


def _pack(
    name: str, layer: Layer, form: Format, group_size: GroupSize
) -> tuple[PackedWeight, Change]:
    found = form.read(layer)
    if not torch.isfinite(found.values).all():
        raise Unsupported(f"{layer.files.directory}: {name} overflows fp32; its scales are damaged")
    packed = found.packed
    if packed is None:
        chosen = group_size if form.group is None else form.group(layer)
        if chosen == GROUP and found.scale is not None:
            packed = regrid(found.values, found.scale)
        else:
            packed = quantize_weight(found.values, chosen)
    error = relative_rms(dequantize_weight(packed), found.values)
    return packed, Change(name, found.packed is None, error)


def relative_rms(other: torch.Tensor, reference: torch.Tensor) -> float:
    """The RMS of the difference over that of `reference`; 0 for equal tensors, zeros included."""
    noise = torch.linalg.vector_norm(other - reference, dtype=torch.float64)
    signal = torch.linalg.vector_norm(reference, dtype=torch.float64)
    return float(noise / signal) if noise else 0.0


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Unsupported(f"{directory} has no config.json; add the model's") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unsupported(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise Unsupported(f"{path} is damaged: it holds no object")
    return config
