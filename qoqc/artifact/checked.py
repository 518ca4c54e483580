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


class ShardHashes:
    """Weight files that are being compared with their SHA-256, in threads of its own."""

    def __init__(self, directory: Path, expected: Mapping[str, str]) -> None:
        """Begin, with files of `directory`."""
        self._directory = directory
        self._expected = expected
        # hashing leaves the interpreter's lock, and one stream is slower than memory and disk
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "qoqc-hash")
        self._found = {name: self._pool.submit(checksum, directory / name) for name in expected}

    def close(self) -> None:
        """Wait until all are compared; no thread runs any more."""
        self._pool.shutdown(wait=True)

    def require_sound(self) -> None:
        """Wait until all are compared; raises ArtifactError, naming the first damaged file."""
        self.close()
        for name, found in self._found.items():
            if found.result() != self._expected[name]:
                raise _damaged(self._directory, name)


def begin_verify(
    directory: Path,
    files: Mapping[str, str],
    shards: Mapping[str, Shard],
    mode: Verify = "full",
    *,
    optional: Iterable[str] = (),
) -> ShardHashes:
    """Compare files with their SHA-256; of the weight files, size and header only, for now.

    mode      "lazy": their values are not compared at all
    optional  names that may be missing; they are compared if they are there

    Returns the comparison of the weight files that runs on. Raises ArtifactError, naming the file.
    """
    may_miss = set(optional)
    present = []
    for name in files:
        if (directory / name).is_file():
            present.append(name)
        elif name not in may_miss:
            raise ArtifactError(f"{directory}: {name} is missing; {_remedy(directory)}")
    large = sorted(shards.keys() & set(present), key=lambda name: -shards[name].size)
    small = [name for name in present if name not in shards]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: checksum(directory / name), small)
        damaged = [name for name, digest in zip(small, found, strict=True) if digest != files[name]]
    damaged += [name for name in large if not _has_header(directory / name, shards[name])]
    if damaged:
        raise _damaged(directory, damaged[0])
    return ShardHashes(directory, {name: files[name] for name in large if mode == "full"})


def verify_files(
    directory: Path,
    files: Mapping[str, str],
    shards: Mapping[str, Shard],
    mode: Verify = "full",
    *,
    optional: Iterable[str] = (),
) -> int:
    """`begin_verify` and wait for the end; returns how many files were there."""
    begin_verify(directory, files, shards, mode, optional=optional).require_sound()
    return sum((directory / name).is_file() for name in files)


def _has_header(path: Path, shard: Shard) -> bool:
    try:
        return Shard.of(path) == shard
    except ValueError:
        return False


def _damaged(directory: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{directory}: {name} is damaged (its SHA-256 is not the recorded one); "
        f"{_remedy(directory)}"
    )


def _remedy(directory: Path) -> str:
    if directory.parent.name == "snapshots":  # in the cache of the Hugging Face Hub
        return "download the model again"
    return "copy the artifact again, or compile the model again"
