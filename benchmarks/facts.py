"""What the benchmarks of kernels write beside their figures, and how."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except FileNotFoundError:  # no git
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    }


def write_csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> Path:
    """Write the columns `names` of rows, then those of `provenance`; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*names, "device", "torch", "triton", "commit"))
        writer.writeheader()
        for row in rows:
            writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()})
    return path
