"""Directories that appear whole or not at all, and checksums of their files."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qoqc.errors import ArtifactError


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


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(root: Path) -> dict[str, Path]:
    """Every file below `root`, by its path from there with forward slashes, sorted."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}
