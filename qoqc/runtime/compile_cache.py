"""Where compiled code is kept between processes, under a key of everything it depends on.

    <cache>/compiled/<key>   Inductor's: entries are pickles, so they are never part of an artifact
    <cache>/triton           Triton's, keyed by Triton itself: source, options, target, versions

A graph's own part of the key (nodes, shapes, options that change it) is Inductor's business, and
so is a kernel's spec Triton's: it is in the kernel's source. Weights are arguments of compiled
code, never part of it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from qoqc.config import cache_dir, private_cache_dir
from qoqc.log import get_logger
from qoqc.runtime import compile_probes
from qoqc.runtime.device import device_key
from qoqc.runtime.dynamo import driver_version, inductor_directory

log = get_logger("cache")

FOLDER = "compiled"
TRITON = "triton"
PARTS = "key.json"
ENVIRONMENT = "environment"

MAX_BYTES = 2 << 30
"""Of all keys together; the one in use is not counted out. A decoder's graphs take a few MB."""

SWITCHES = ("QOQC_", "TORCH", "TRITON_", "PYTORCH_", "CUDA_", "NVIDIA_TF32", "OMP_", "CXX", "CC")
"""Beginnings of the names of environment variables that may change what is compiled."""

PLACES = frozenset(
    {
        "QOQC_CACHE",
        "QOQC_CHECK_PAGES",
        "QOQC_DUMP",
        "QOQC_LOG",
        "QOQC_VERIFY",
        "TORCH_LOGS",
        "TORCH_TRACE",
    }
    | {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_HOME", "CUDA_VISIBLE_DEVICES"}
)
"""Those among them that say where to put or print something, or which of equal devices to use."""


def key_parts(device: torch.device, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything outside of a graph that compiled code depends on, by name."""
    environment = os.environ if environment is None else environment
    switches = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(SWITCHES) and name not in PLACES
    }
    return {
        "qoqc sources": sources_digest(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version("triton"),
        "device": _device(device),
        ENVIRONMENT: json.dumps(switches),
    }


def digest(parts: Mapping[str, str]) -> str:
    """The key that stands for the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def sources_digest() -> str:
    """Of every source file of the package: passes, templates and definitions are among them."""
    return digest_of_tree(Path(__file__).resolve().parents[1])


def digest_of_tree(root: Path) -> str:
    """Of the Python files and tables below `root`, by their paths; follows links to folders."""
    found = hashlib.sha256()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith((".py", ".json")):
                path = Path(folder, name)
                found.update(f"{path.relative_to(root)}\n".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


_CHANGED: list[str] = []
"""What differs from the last key in use, if this process began a new one."""


def changed() -> str:
    """It in words, to be put behind a statement; empty if nothing did."""
    return f" (changed since the last run: {'; '.join(_CHANGED)})" if _CHANGED else ""


def activate(device: torch.device) -> Path | None:
    """Have Inductor and Triton keep their code in qoqc's cache; returns Inductor's directory.

    Unless the user chose directories (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR): the result is
    None then. What differs from the last key in use is logged, when a key is new.
    """
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(private_cache_dir(TRITON))
    chosen = inductor_directory()
    root = cache_dir() / FOLDER
    if chosen is not None and Path(chosen).parent != root:
        return None
    parts = key_parts(device)
    folder = private_cache_dir(FOLDER) / digest(parts)
    if not (folder / PARTS).is_file():
        _explain(root, parts)
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / PARTS).write_text(json.dumps(parts, indent=1) + "\n")
        evict(root, folder)
    os.utime(folder / PARTS)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    compile_probes.keep_in(folder)
    return folder


def keys_in_use(root: Path) -> list[Path]:
    """The directories of all keys, used last first."""
    marks = [path for path in root.glob(f"*/{PARTS}") if path.is_file()]
    return [mark.parent for mark in sorted(marks, key=lambda path: -path.stat().st_mtime)]


def size_of(folder: Path) -> int:
    """Bytes of the files below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def evict(root: Path, keep: Path, limit: int = MAX_BYTES) -> list[Path]:
    """Remove the keys used longest ago until all take `limit` bytes; returns those removed."""
    left, gone = limit, []
    for folder in keys_in_use(root):
        left -= size_of(folder)
        if left < 0 and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The parts that differ, each in a few words; of the environment, which variables."""
    found = []
    for name in new:
        before, after = old.get(name), new[name]
        if before == after:
            continue
        if name == ENVIRONMENT:
            found.append(f"{name}: {_variables(before, after)}")
        elif len(f"{before}{after}") > 100:
            found.append(f"{name} (changed)")
        else:
            found.append(f"{name}: {before} -> {after}")
    return found


def _variables(before: str | None, after: str) -> str:
    old, new = json.loads(before or "{}"), json.loads(after)
    return ", ".join(
        f"{name} {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def _explain(root: Path, parts: Mapping[str, str]) -> None:
    for folder in keys_in_use(root)[:1]:
        try:
            _CHANGED[:] = differences(json.loads((folder / PARTS).read_text()), parts)
        except (OSError, ValueError):
            return
        log.info("graphs are compiled anew%s", changed())


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    driver = driver_version()
    return f"{device_key(device)} CUDA {torch.version.cuda}, driver {driver}"


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # triton exists for Linux only
        return "not installed"
