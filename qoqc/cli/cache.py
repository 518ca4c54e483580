"""`qoqc cache`: what is in the cache directory, whether it is sound, and making it smaller.

Only files that qoqc wrote are counted or removed: generated kernels (by name and first line),
compiled graphs by key, Triton's cache, temporary files of a process that died, and the tuning
table. Lock files stay: removing one lets two processes hold it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton
from filelock import FileLock
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from qoqc.cli.cache_files import KERNEL, Entry, entries, is_generated, plain_files
from qoqc.codegen.build import digest_of
from qoqc.codegen.tuning import table
from qoqc.config import cache_dir
from qoqc.errors import OptionError
from qoqc.runtime.compile_cache import PARTS, digest

ABANDONED_S = 3600.0
"""A temporary file this old belongs to no process that is still writing it."""

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
AGES = {"M": 60.0, "H": 3600.0, "D": 86400.0, "W": 7 * 86400.0}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What `prune` removes: all, or kernels beyond a size in bytes or an age in seconds."""

    everything: bool = False
    max_size: int | None = None
    older_than: float | None = None


def list_entries() -> None:
    """Print every entry, newest first, and the sum."""
    found = sorted(entries(), key=lambda entry: -entry.modified)
    shown = Table("file", "kind", "size", "age")
    now = time.time()
    for entry in found:
        name = entry.path.relative_to(cache_dir()).as_posix()
        shown.add_row(name, entry.kind, decimal(entry.size), age(now - entry.modified))
    if found:
        Console(highlight=False).print(shown)
    print(f"{cache_dir()}: {_sum(found)}")


def verify() -> int:
    """Print what is wrong with the cache; 1 if anything is.

    The name of a kernel holds a digest of its text and of Triton's version: a file that does not
    fit is damaged, edited, or of another Triton. It is never used: building a kernel compares.
    """
    problems = [line for entry in entries() for line in _problems(entry)]
    problems += [
        f"{path}: not a kernel that qoqc wrote, or its beginning is damaged; it is not used"
        for path in plain_files(cache_dir() / "kernels")
        if KERNEL.fullmatch(path.name) and not is_generated(path)
    ]
    for line in problems:
        print(line)
    print(f"{cache_dir()}: {_sum(entries())}; {len(problems)} not sound")
    return 1 if problems else 0


def prune(limits: Limits) -> None:
    """Remove what is beyond the limits, the oldest first, and print how much that was.

    Raises OptionError if there is no limit.
    """
    if limits == Limits():
        raise OptionError("prune: name a limit: --max-size, --older-than or --all")
    now = time.time()
    gone = [e for e in entries() if e.kind == "temporary" and now - e.modified > ABANDONED_S]
    gone += _beyond([e for e in entries() if e.kind in ("kernel", "compiled graphs")], limits, now)
    if limits.everything:
        gone += [e for e in entries() if e.kind == "Triton cache"]
    for entry in gone:
        if entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
    if limits.everything and table.table_path().exists():
        gone += [e for e in entries() if e.kind == "tuning table"]
        with FileLock(f"{table.table_path()}.lock"):
            table.table_path().unlink(missing_ok=True)
    print(f"{cache_dir()}: removed {_sum(gone)}; left are {_sum(entries())}")


def parse_size(text: str) -> int:
    """`500MB` in bytes; raises OptionError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in SIZES:
        raise OptionError(f"--max-size {text}: expected a size such as 500MB or 2GB")
    return int(float(match[1]) * SIZES[match[2]])


def parse_age(text: str) -> float:
    """`30d` in seconds; raises OptionError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z])", text.strip().upper())
    if match is None or match[2] not in AGES:
        raise OptionError(f"--older-than {text}: expected an age such as 90m, 12h, 30d or 8w")
    return float(match[1]) * AGES[match[2]]


def age(seconds: float) -> str:
    """Seconds as a person reads them: `3 h`."""
    for unit, length in (("d", AGES["D"]), ("h", AGES["H"]), ("min", AGES["M"])):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _beyond(kernels: Sequence[Entry], limits: Limits, now: float) -> list[Entry]:
    if limits.everything:
        return list(kernels)
    gone = []
    left = sum(entry.size for entry in kernels)
    for entry in sorted(kernels, key=lambda entry: entry.modified):
        old = limits.older_than is not None and now - entry.modified > limits.older_than
        if old or (limits.max_size is not None and left > limits.max_size):
            gone.append(entry)
            left -= entry.size
    return gone


def _problems(entry: Entry) -> Iterator[str]:
    if entry.kind == "kernel":
        match = KERNEL.fullmatch(entry.path.name)
        text = entry.path.read_bytes()
        if match is None or digest_of(text) != match[1]:
            yield (
                f"{entry.path}: damaged, edited, or made with another Triton than "
                f"{triton.__version__}; it is not used, and written anew when it is needed"
            )
    elif entry.kind == "temporary" and time.time() - entry.modified > ABANDONED_S:
        yield f"{entry.path}: left by a process that died; `qoqc cache prune` removes it"
    elif entry.kind == "compiled graphs":
        if _parts_digest(entry.path) != entry.path.name:
            yield f"{entry.path}: its key.json does not fit its name; it is not used; remove it"
    elif entry.kind == "tuning table":
        reason = _table_problem(entry.path)
        if reason is not None:
            yield f"{entry.path}: {reason}; it is not used; remove it"


def _parts_digest(folder: Path) -> str | None:
    """The key of a directory of compiled graphs by what is written in it."""
    try:
        parts = json.loads((folder / PARTS).read_text())
        return digest(parts)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _table_problem(path: Path) -> str | None:
    """Why the tuning table is ignored, or None."""
    try:
        raw = json.loads(path.read_bytes())
        if raw["version"] != table.VERSION:
            return f"version {raw['version']}, this qoqc reads {table.VERSION}"
        for entry in raw["entries"]:
            for name in (*table.KEY, "form"):
                entry[name]
            for name in ("constexprs", "num_warps", "num_stages"):
                entry["tile"][name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"damaged ({error!r})"
    return None


def _sum(found: Sequence[Entry]) -> str:
    """`12 kernels, 1 tuning table: 300.0 kB`."""
    counts = []
    for kind in ("kernel", "compiled graphs", "Triton cache", "tuning table", "temporary"):
        count = sum(entry.kind == kind for entry in found)
        name = {"temporary": "temporary file", "compiled graphs": "key of compiled graph"}.get(
            kind, kind
        )
        if count or kind == "kernel":
            counts.append(f"{count} {name}{'' if count == 1 else 's'}")
    return f"{', '.join(counts)} ({decimal(sum(entry.size for entry in found))})"
