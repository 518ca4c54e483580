"""Kernels in an artifact: sources to read, machine code per architecture, tuning entries.

Nothing of it is executed by who loads the artifact: kernels are generated from the templates of
the installed qoqc, with the tiles that the entries name if the templates have them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from qoqc.artifact import machine_code
from qoqc.artifact.kernel_sources import Choice, Wanted, choices, devices
from qoqc.artifact.manifest import KERNELS, TUNING
from qoqc.codegen.aot import compile_for
from qoqc.codegen.build import OPS
from qoqc.codegen.roofline import TOKENS, gemm_bytes, gemm_operations, limits_of
from qoqc.codegen.tuning import table
from qoqc.codegen.tuning.choose import BUCKETS
from qoqc.errors import Unsupported
from qoqc.ir.spec import LinearSpec, to_json
from qoqc.runtime.device import DeviceKey


def write_kernels(
    kernels: Sequence[Wanted], device: torch.device, draft: Path, archs: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Write them below `draft`; returns an entry of the manifest for each choice.

    archs  compute capabilities (90 = sm_90) whose machine code is written too; needs no GPU

    Raises OptionError for an arch qoqc does not know, Unsupported where Triton only interprets.
    """
    if archs and triton.knobs.runtime.interpret:
        raise Unsupported("--arch: nothing is compiled under TRITON_INTERPRET=1; unset it")
    found = choices(kernels, devices(device, archs))
    folder = draft / KERNELS
    folder.mkdir(parents=True, exist_ok=True)
    for choice in {choice.stem: choice for choice in found}.values():
        (folder / f"{choice.stem}.py").write_text(choice.source)
    for choice in found:
        if choice.device.arch in archs:
            path = folder / _cubin(choice)
            if not path.exists():
                machine_code.write(_compiled(choice), path)
    _write_tuning(found, draft / TUNING)
    return [_entry(choice, archs) for choice in found]


def _compiled(choice: Choice) -> Any:
    return compile_for(
        choice.family, choice.wanted.spec, choice.tile, choice.size, choice.device.arch
    )


def _cubin(choice: Choice) -> str:
    # argument types and alignment differ with the size of the launch
    return f"{choice.stem}-{choice.size}.sm_{choice.device.arch}.cubin"


def _entry(choice: Choice, archs: Sequence[int]) -> dict[str, Any]:
    tile = choice.tile
    return {
        "file": f"{KERNELS}/{choice.stem}.py",
        "cubin": f"{KERNELS}/{_cubin(choice)}" if choice.device.arch in archs else None,
        "op": choice.wanted.op,
        "form": choice.family.name,
        "spec": to_json(choice.wanted.spec),
        "size": choice.size,
        "tile": {
            **dict(tile.constexprs),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        },
        "tuned": choice.known,
        "roofline": _roofline(choice),
        "device": dataclasses.asdict(choice.device),
    }


def _roofline(choice: Choice) -> float | None:
    """The least time of a GEMM over what the model of its tile expects; None for other ops."""
    spec, work = choice.wanted.spec, choice.family.work
    if work is None or not isinstance(spec, LinearSpec):
        return None
    limits = limits_of(choice.device)
    least = max(
        float(gemm_bytes(spec).subs(TOKENS, choice.size)) / limits.read,
        float(gemm_operations(spec).subs(TOKENS, choice.size)) / limits.int8,
    )
    expected = work(spec, choice.tile, choice.device).seconds(choice.size, choice.device)
    return round(least / expected, 4) if expected else None


def _write_tuning(found: Sequence[Choice], folder: Path) -> None:
    """What was searched for these kernels, at any size; a file per device, in the tables' own form.

    Not what qoqc ships: whoever loads the artifact has that, maybe a newer one.
    """
    tables: dict[DeviceKey, table.Table] = {}
    for wanted, device in dict.fromkeys((choice.wanted, choice.device) for choice in found):
        op = OPS[wanted.op]
        for size in BUCKETS:
            winner = table.own(op, wanted.spec, size, device)
            if winner is not None:
                form, tile = winner
                key = table.entry_key(op, wanted.spec, size, device)
                tables.setdefault(device, {})[key] = (form.name, tile)
    for device, entries in tables.items():
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        table.write(folder / f"{name}-sm_{device.arch}.json", entries)
