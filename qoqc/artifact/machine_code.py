"""Machine code in an artifact: written beside the sources, put into Triton's cache when asked.

Triton finds it there by the key it computes itself at a launch: of source, argument types,
options, target, and its own build. Code for another of these is never looked up. But no key tells
who made the code: this is the one place where something that came with an artifact is executed,
and so it is a command of its own (`qoqc cache seed`) and no part of loading.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from triton.runtime.cache import get_cache_manager, triton_key

from qoqc.artifact.checked import verify_files
from qoqc.artifact.manifest import KERNELS, Manifest
from qoqc.config import private_cache_dir
from qoqc.errors import ArtifactError
from qoqc.runtime.compile_cache import TRITON

FACTS = ".cubin.json"

_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,149}")


@dataclasses.dataclass(frozen=True)
class Seeded:
    """How many kernels were added to the cache, were there already, or are of another Triton."""

    added: int = 0
    present: int = 0
    foreign: int = 0


def write(compiled: Any, path: Path) -> None:
    """Write the code of a CompiledKernel of Triton to `path`, and its cache entry beside it."""
    facts = {
        "key": compiled.hash,
        "name": compiled.src.name[:150],  # as Triton cuts it
        "triton": triton_key(),
        "metadata": compiled.metadata._asdict(),
    }
    path.write_bytes(compiled.asm["cubin"])
    path.with_name(f"{path.name}.json").write_text(json.dumps(facts, default=vars) + "\n")


def seed(directory: Path) -> Seeded:
    """Put the kernels of an artifact into Triton's cache, as if Triton had compiled them here.

    Whoever calls it trusts the artifact: its machine code will run on the GPU. Needs no GPU.
    Raises ArtifactError if the artifact or a kernel in it is damaged, or has no machine code.
    """
    files = Manifest.read(directory).files
    kernels = {name: files[name] for name in files if name.startswith(f"{KERNELS}/")}
    verify_files(directory, kernels, {}, optional=kernels)
    found = sorted(
        path
        for path in (directory / name for name in kernels)
        if path.name.endswith(FACTS) and path.is_file() and _code(path).is_file()
    )
    if not found:
        raise ArtifactError(
            f"{directory} has no machine code; make it by qoqc compile --arch sm_90"
        )
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(private_cache_dir(TRITON))
    counts = {"added": 0, "present": 0, "foreign": 0}
    for path in found:
        counts[_put(path)] += 1
    return Seeded(**counts)


def _code(path: Path) -> Path:
    """The machine code that the file `path` tells of."""
    return path.with_name(path.name.removesuffix(".json"))


def _put(path: Path) -> str:
    """Make an entry of Triton's cache; returns what became of it, a field of Seeded."""
    try:
        facts = json.loads(path.read_bytes())
        key, name, metadata = facts["key"], facts["name"], facts["metadata"]
        if not (_KEY.fullmatch(key) and _NAME.fullmatch(name) and metadata["hash"] == key):
            raise ValueError("it is not an entry of Triton's cache")
        code = _code(path).read_bytes()
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r:.200}") from error
    if facts["triton"] != triton_key():
        return "foreign"
    cache = get_cache_manager(key)
    listed = f"{name}.json"
    if cache.get_group(listed):
        return "present"
    files = {
        f"{name}.cubin": cache.put(code, f"{name}.cubin"),
        listed: cache.put(json.dumps(metadata), listed),
    }
    cache.put_group(listed, files)  # last: it is what makes the entry one
    return "added"
