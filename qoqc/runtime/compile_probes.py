"""Inductor's trials of the C++ compiler: made once per key of the cache, not once per process.

Before it loads code for a CPU, from its cache as well, Inductor tries for each set of vector
instructions whether the compiler's code for it loads. What it compiles for that it keeps; but each
time it starts a Python per set to load it, up to seven, which take a second together (in torch 2.11
each of them imports torch). Here what went well is written down.

The one private place of torch's that is not in dynamo.py; a test notices when it moves.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from torch._inductor.cpu_vec_isa import VecISA, _get_isa_dry_compile_fingerprint

FOLDER = "probes"

_PLACE: list[Path] = []
"""The directory in use: none, or one."""


def keep_in(folder: Path) -> None:
    """From now on, write down in `folder` which trials went well, and do not repeat those.

    A failed one is repeated by the next process: the compiler may have been repaired. The folder
    belongs to one torch and one kind of CPU; the compiler's version is in the names of the files.
    """
    _PLACE[:] = [folder / FOLDER]
    _patch()


@functools.cache
def _patch() -> None:
    """torch has no hook for it, hence the patched method."""
    original = VecISA.check_build

    def check_build(self: VecISA, code: str) -> bool:
        mark = _PLACE[0] / _name(self, code)
        if mark.is_file():
            return True
        passed: bool = original(self, code)
        if passed:
            mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark.touch()
        return passed

    VecISA.check_build = check_build  # type: ignore[method-assign]


def _name(isa: VecISA, code: str) -> str:
    """Of the trial: the compiler with its flags, torch, and what is compiled."""
    flags = f"{isa._arch_flags} {isa.build_arch_flags()}"  # one release takes these, others those
    parts = [str(isa), _get_isa_dry_compile_fingerprint(flags), code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
