"""`qoqc cache seed`: the machine code of an artifact, into Triton's cache."""

from __future__ import annotations

from pathlib import Path

from qoqc.artifact.machine_code import seed


def run(artifact: str) -> None:
    """Print what became of the kernels."""
    found = seed(Path(artifact))
    print(f"{artifact}: {found.added} kernels added, {found.present} were there already")
    if found.foreign:
        print(f"{found.foreign} are of another build of Triton and will be compiled anew")
