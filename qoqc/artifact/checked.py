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

PIECE = 1 << 26
"""Bytes of a weight file that are hashed by themselves. Part of the format: a manifest's hashes are
of pieces of this size."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """What can be told of a weight file without reading it all.

    size    in bytes
    header  SHA-256 of its safetensors header: names, dtypes, shapes and places of the tensors
    pieces  SHA-256 of every PIECE bytes of it, which many threads can compare at once; none in
            artifacts made before there were any: then the whole file is hashed, by one thread
    """

    size: int
    header: str
    pieces: tuple[str, ...] = ()

    @classmethod
    def hashed(cls, path: Path) -> Shard:
        """Of a file, with its pieces; ValueError if it has no header."""
        shard = cls.of(path)
        with _threads("qoqc-hash") as pool:
            pieces = pool.map(lambda start: checksum(path, start, PIECE), shard.starts())
            return dataclasses.replace(shard, pieces=tuple(pieces))

    def starts(self) -> range:
        """Where its pieces begin."""
        return range(0, self.size, PIECE)

    def parts(self) -> list[tuple[Any, ...]]:
        """(SHA-256, start, size) of each piece; none if there are no hashes of pieces."""
        return [(piece, i * PIECE, PIECE) for i, piece in enumerate(self.pieces)]

    @classmethod
    def of(cls, path: Path) -> Shard:
        """Of a file, without pieces; ValueError if it has no header."""
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            return cls(size, hashlib.sha256(file.read(length)).hexdigest())

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Shard:
        """Of a manifest; ValueError if it is not one."""
        shard = cls(**{**raw, "pieces": tuple(raw.get("pieces", ()))})
        sound = type(shard.size) is int and all(
            type(x) is str for x in (shard.header, *shard.pieces)
        )
        if not sound or len(shard.pieces) not in (0, len(shard.starts())):
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

    def __init__(
        self, directory: Path, files: Mapping[str, str], shards: Mapping[str, Shard]
    ) -> None:
        """Begin, with the `shards` of `directory`; files: SHA-256 of whole files."""
        self._directory = directory
        self._pool = _threads("qoqc-hash")
        self._found = [
            (name, expected, self._pool.submit(checksum, directory / name, *part))
            for name, shard in shards.items()
            for expected, *part in shard.parts() or [(files[name],)]
        ]

    def close(self) -> None:
        """Wait until all are compared; no thread runs any more."""
        self._pool.shutdown(wait=True)

    def require_sound(self) -> None:
        """Wait until all are compared; raises ArtifactError, naming the first damaged file."""
        self.close()
        for name, expected, found in self._found:
            if found.result() != expected:
                raise _damaged(self._directory, name)


def _threads(name: str) -> ThreadPoolExecutor:
    # hashing leaves the interpreter's lock, and one stream is slower than memory and disk
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), name)


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
    with _threads("qoqc-hash") as pool:
        found = pool.map(lambda name: checksum(directory / name), small)
        damaged = [name for name, digest in zip(small, found, strict=True) if digest != files[name]]
    damaged += [name for name in large if not _has_header(directory / name, shards[name])]
    if damaged:
        raise _damaged(directory, damaged[0])
    return ShardHashes(directory, files, {n: shards[n] for n in large if mode == "full"})


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
        return Shard.of(path) == dataclasses.replace(shard, pieces=())
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
