"""Directories that appear whole or not at all, and checksums of their files."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qoqc.config import cache_dir
from qoqc.errors import ArtifactError

LOCK_S = 10.0
"""How long to wait for another process that writes the same directory: it may be about to end."""

PIECE = 32 << 20
"""Bytes hashed at once. Beside a thread that runs Python, another waits up to 5 ms whenever it
comes back for the interpreter's lock: pieces of 1 MB were hashed at 0.09 GB/s then, of 32 MB at
0.87, and alone at 1.3 (a server's core with SHA instructions)."""


@contextmanager
def publish(target: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its place when the block ends well.

    A block that fails leaves nothing behind; a process that is killed leaves `target` as it was.
    With `overwrite`, a directory that `is_ours` is replaced; anything else never is.
    Raises ArtifactError when the target stands in the way.
    """
    require_free(target, overwrite=overwrite, is_ours=is_ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _beside(target)
    draft.mkdir()
    try:
        yield draft
        _sync(draft)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def locked(target: Path, timeout: float = LOCK_S) -> Iterator[None]:
    """Hold the right to write `target`, among the processes of a user that ask for it.

    Raises ArtifactError if another has it for `timeout` seconds more. Lock files are kept in the
    cache directory and stay: removing one would let two processes hold it. One left by a process
    that died locks nothing.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:16]
    try:
        with FileLock(folder / f"{name}.lock", timeout=timeout):
            yield
    except Timeout:
        raise ArtifactError(
            f"another process is writing {target}; wait for it, or choose another name"
        ) from None


def require_free(target: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise ArtifactError if `publish` may not write to `target`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not is_ours(target):
        raise ArtifactError(f"{target} exists and is not an artifact of qoqc; choose another name")
    if not overwrite:
        raise ArtifactError(f"{target} exists; choose another name, or overwrite it (--force)")


def _swap(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`. An old target is moved aside first and removed last."""
    if not target.exists():
        os.rename(draft, target)
    else:
        old = _beside(target)
        os.rename(target, old)
        try:
            os.rename(draft, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_entry(target.parent)


def _beside(target: Path) -> Path:
    """A hidden name in the same directory, on the same file system, that nobody else has."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")


def _sync(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path, start: int = 0, most: int | None = None) -> str:
    """The SHA-256 of a file, or of up to `most` bytes of it from `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = max(os.fstat(file.fileno()).st_size - start, 0)
        left = left if most is None else min(left, most)
        buffer = memoryview(bytearray(min(PIECE, left)))
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def files_below(root: Path) -> dict[str, Path]:
    """Every file below `root`, by its path from there with forward slashes, sorted."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}
