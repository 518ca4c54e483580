"""`qoqc doctor`: is everything here that qoqc needs, what will run where, and why.

The checks import neither torch nor Triton: a broken installation must be able to say so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from qoqc.config import cache_dir, log_level
from qoqc.errors import OptionError

Status = Literal["ok", "note", "problem"]

STYLES = {"ok": "green", "note": "yellow", "problem": "red"}

INTERPRETER_ONLY = ("numpy",)
"""Packages whose range only Triton's interpreter needs (Triton 3.6 with NumPy 2.4 fails there)."""

NEEDED_FIRST = ("qoqc", "torch", "triton", "transformers", "QOQC_LOG")
"""What must be right before the modules that look at devices can be imported."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at; `remedy` says what to do, or what a note means."""

    name: str
    found: str
    status: Status
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a piece of a model runs in on a device, and why not in something else."""

    device: str
    work: str
    runs: str
    why: str


def run(*, as_json: bool) -> int:
    """Print all checks and what will run; 1 if there is a problem."""
    checks = list(environment())
    runs: list[Run] = []
    if not any(check.status == "problem" and check.name in NEEDED_FIRST for check in checks):
        from qoqc.cli import doctor_device  # noqa: PLC0415  it imports torch and Triton

        checks += doctor_device.checks()
        runs = doctor_device.runs()
    problems = sum(check.status == "problem" for check in checks)
    if as_json:
        found = {
            "ok": not problems,
            "checks": [dataclasses.asdict(check) for check in checks],
            "runs": [dataclasses.asdict(line) for line in runs],
        }
        print(json.dumps(found, indent=1))
    else:
        _show(checks, runs, problems)
    return 1 if problems else 0


def environment() -> Iterator[Check]:
    """Everything but the devices: versions, compilers, switches, the cache directory."""
    yield from _versions()
    yield _compiler("C compiler", "CC", ("gcc", "cc", "clang"), "Triton's launchers need one")
    reason = "Inductor needs one for a CPU; without it use --glue eager"
    yield _compiler("C++ compiler", "CXX", ("g++", "c++", "clang++"), reason)
    yield from _switches()
    yield _cache()


def _versions() -> Iterator[Check]:
    """Python and the packages against what the installed qoqc asks for."""
    try:
        meta = importlib.metadata.metadata("qoqc")
        wanted = importlib.metadata.requires("qoqc") or []
    except importlib.metadata.PackageNotFoundError:
        remedy = "versions cannot be checked, and backend='qoq' is not found; pip install -e ."
        yield Check("qoqc", "not installed, run from its sources", "problem", remedy)
        return
    yield Check("qoqc", meta["Version"], "ok")
    python, needed = platform.python_version(), SpecifierSet(meta["Requires-Python"] or "")
    right = needed.contains(python, prereleases=True)
    remedy = "" if right else f"needs Python {needed}"
    yield Check("python", f"{python} ({sys.executable})", "ok" if right else "problem", remedy)
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement)


def package(requirement: Requirement) -> Check:
    """An installed package against a requirement."""
    name, remedy = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", "problem", remedy)
    # prereleases: a nightly 2.13.0.dev... is judged by its number; a local +cu130 does not matter
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name, version, "ok")
    if name in INTERPRETER_ONLY and not interpreting():
        return Check(name, version, "note", f"only TRITON_INTERPRET=1 fails with it; {remedy}")
    return Check(name, version, "problem", remedy)


def interpreting() -> bool:
    """Whether Triton will interpret kernels, as the environment says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _compiler(name: str, variable: str, commands: tuple[str, ...], reason: str) -> Check:
    given = os.environ.get(variable)
    for command in (given,) if given else commands:
        found = shutil.which(command)
        if found is not None:
            return Check(name, found, "ok")
    if given:
        return Check(name, f"{variable}={given}", "problem", f"no such command; {reason}")
    return Check(name, "none", "problem", f"{reason}; install {commands[0]}, or set {variable}")


def _switches() -> Iterator[Check]:
    try:
        yield Check("QOQC_LOG", log_level(), "ok")
    except OptionError as error:
        yield Check("QOQC_LOG", os.environ.get("QOQC_LOG", ""), "problem", str(error))
    dump = os.environ.get("QOQC_DUMP")
    if dump:
        yield Check("QOQC_DUMP", dump, "note", "graphs and kernels are written there")
    if interpreting():
        remedy = "kernels are interpreted, for tests; unset it for speed"
        yield Check("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"], "note", remedy)


def _cache() -> Check:
    """The directory for kernels and tuning tables: writable, by nobody else, how full."""
    path = cache_dir()
    # the nearest directory that exists: looking must not make one
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); set QOQC_CACHE to a directory of yours"
        return Check("cache", str(path), "problem", remedy)
    if there != path:
        return Check("cache", f"{path}, not there yet", "ok")
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    free = shutil.disk_usage(path).free
    used = decimal(sum(file.stat().st_size for file in files))
    found = f"{path}: {len(files)} files, {used}; {decimal(free)} free"
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Check("cache", found, "note", f"others can write there; chmod go-w {path}")
    return Check("cache", found, "ok")


def _show(checks: list[Check], runs: list[Run], problems: int) -> None:
    console = Console(highlight=False)
    table = Table("", "found", "", "")
    for check in checks:
        style = STYLES[check.status]
        table.add_row(check.name, check.found, f"[{style}]{check.status}[/]", check.remedy)
    console.print(table)
    if runs:
        table = Table("device", "work", "runs in", "why")
        for line in runs:
            table.add_row(line.device, line.work, line.runs, line.why)
        console.print(table)
    else:
        print("what will run where is shown once these are put right")
    print("everything qoqc needs is here" if not problems else f"{problems} to put right")
