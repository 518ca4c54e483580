"""Whether the files of an artifact are those it was written with."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from qoqc.artifact.folder import checksum
from qoqc.config import Verify
from qoqc.errors import ArtifactError

MAX_HEADER = 100_000_000
"""What safetensors takes as a header, in bytes."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """What can be told of a weight file without reading it all.

    size    in bytes
    header  SHA-256 of its safetensors header: names, dtypes, shapes and places of the tensors
    """

    size: int
    header: str

    @classmethod
    def of(cls, path: Path) -> Shard:
        """Of a file; ValueError if it has no header."""
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            return cls(size, hashlib.sha256(file.read(length)).hexdigest())

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Shard:
        """Of a manifest; ValueError if it is not one."""
        shard = cls(**raw)
        if type(shard.size) is not int or type(shard.header) is not str:
            raise ValueError(f"{shard} is not a weight file")
        return shard


def require_plain_names(names: Iterable[str]) -> None:
    """ValueError unless each is a relative path that stays in its directory."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"{name!r} is not a file of the artifact")


def verify_files(
    directory: Path,
    files: Mapping[str, str],
    shards: Mapping[str, Shard],
    mode: Verify = "full",
    *,
    optional: Iterable[str] = (),
) -> int:
    """Compare files with their SHA-256, many at a time; returns how many were there.

    mode      "lazy": of the weight files only size and header are compared
    optional  names that may be missing; they are compared if they are there

    Raises ArtifactError, naming the file.
    """
    may_miss = set(optional)
    present = []
    for name in files:
        if (directory / name).is_file():
            present.append(name)
        elif name not in may_miss:
            raise ArtifactError(f"{directory}: {name} is missing; {_remedy(directory)}")
    # hashing leaves the interpreter's lock, and one stream is slower than memory and disk
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, sound in zip(
            present,
            pool.map(
                lambda name: _is_sound(directory / name, files[name], shards.get(name), mode),
                present,
            ),
            strict=True,
        ):
            if not sound:
                raise ArtifactError(
                    f"{directory}: {name} is damaged (its SHA-256 is not the recorded one); "
                    f"{_remedy(directory)}"
                )
    return len(present)


def _is_sound(path: Path, expected: str, shard: Shard | None, mode: Verify) -> bool:
    if shard is not None:
        try:
            if Shard.of(path) != shard:
                return False
        except ValueError:
            return False
        if mode == "lazy":
            return True
    return checksum(path) == expected


def _remedy(directory: Path) -> str:
    if directory.parent.name == "snapshots":  # in the cache of the Hugging Face Hub
        return "download the model again"
    return "copy the artifact again, or compile the model again"
