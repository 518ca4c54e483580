"""A file of tensors, read by several threads at once without mapping it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qoqc.errors import ArtifactError

CHUNK = 8 << 20
"""Bytes on their way to a device at once, per thread. A copy of so many takes some 0.3 ms over
PCIe, long beside what it costs to begin and to wait for one."""


class Staging(threading.local):
    """Memory of each thread that reads for a device, used again for every tensor.

    pinned  a GPU reads it without another copy
    """

    def __init__(self, *, pinned: bool, size: int = CHUNK) -> None:
        """Called in the thread that makes it, and in others when they first ask for `buffer`."""
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class TensorFile:
    """The tensors of a safetensors file, which stays open until `close`.

    `read` asks the system for bytes, instead of touching a mapped file: it leaves the
    interpreter's lock, costs no page fault per 4 kB, and a file that is cut short meanwhile is an
    error, not the end of the process.
    Raises ArtifactError, naming the file, if it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        """Open it and read its header, which safetensors checks."""
        self.path = path
        try:
            mapped: Any = safe_open(path, framework="pt", device="cpu")
            self._mapped = mapped.__enter__()
            self._file = path.open("rb", buffering=0)
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        try:
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
            self._places = {
                name: range(*(8 + length + offset for offset in header[name]["data_offsets"]))
                for name in self._mapped.keys()  # noqa: SIM118  it is no dictionary
            }
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.close()
            raise self._damaged(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._mapped.__exit__(None, None, None)

    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._places)

    def size(self, name: str) -> int:
        """The bytes of a tensor."""
        return len(self._places[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._mapped.get_slice(name).get_shape())

    def read(self, name: str, device: torch.device, staging: Staging | None) -> torch.Tensor:
        """A tensor in memory of its own on `device`, through `staging` unless that is a CPU."""
        try:
            like: torch.Tensor = self._mapped.get_tensor(name)  # none of its pages is touched
            found = torch.empty_like(like, device=device)
            if found.nbytes != self.size(name):
                raise ValueError(f"{name} has {self.size(name)} bytes, not {found.nbytes}")
            target = found.view(-1).view(torch.uint8)
            place = self._places[name].start
            if staging is None:
                self._fill(target, place)
                return found
            for start in range(0, target.numel(), staging.buffer.numel()):
                part = target[start : start + staging.buffer.numel()]
                self._fill(staging.buffer[: part.numel()], place + start)
                part.copy_(staging.buffer[: part.numel()])
        except (OSError, ValueError, SafetensorError) as error:
            raise self._damaged(error) from error
        return found

    def part(self, name: str, index: Any, device: torch.device) -> torch.Tensor:
        """`tensor[index]`, of which no more than that is read, in memory of its own."""
        try:
            found: torch.Tensor = self._mapped.get_slice(name)[index]
        except SafetensorError as error:
            raise self._damaged(error) from error
        return found.clone() if device.type == "cpu" else found.to(device)

    def _fill(self, target: torch.Tensor, place: int) -> None:
        """Read bytes from `place` of the file on until `target`, on the CPU, is full."""
        values: Any = target.numpy()
        buffer = memoryview(values)
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], place)
            if count == 0:
                raise ValueError("it ends too early")
            buffer, place = buffer[count:], place + count

    def _damaged(self, error: Exception) -> ArtifactError:
        return ArtifactError(f"{self.path.parent}: {self.path.name} is damaged: {error}")
