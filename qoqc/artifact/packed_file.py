"""Reading an artifact: tensors are read ahead while the weight files are verified."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from qoqc.artifact.manifest import Manifest, stored_name
from qoqc.artifact.read_ahead import ReadAhead
from qoqc.artifact.tensor_file import Staging, TensorFile
from qoqc.config import verify_mode
from qoqc.errors import ArtifactError
from qoqc.quant.weight import PackedWeight


class PackedFile:
    """The tensors of an artifact, read onto `device`. A context manager.

    Raises ArtifactError on entry if the artifact is missing, of another version, or damaged as far
    as sizes, headers and small files tell. The values of the weight files are hashed meanwhile:
    damage to them is raised when the block ends, in place of any other error, so what was read
    counts for nothing before.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Read the manifest; the tensors are opened on entry."""
        self.directory = directory
        self.device = device
        self._open = contextlib.ExitStack()
        self._places: dict[str, TensorFile] = {}
        self._staging: Staging | None = None
        self._stream: torch.cuda.Stream | None = None
        self.manifest = Manifest.read(directory)

    def __enter__(self) -> PackedFile:
        """Verify the files but for the values in those with tensors, and open these."""
        self._hashes = self.manifest.begin_verify(self.directory, verify_mode())
        try:
            for name in self.manifest.shards:
                file = self._open.enter_context(
                    contextlib.closing(TensorFile(self.directory / name))
                )
                self._places.update(dict.fromkeys(file.names(), file))
            if self.device.type == "cuda":
                # what is current, device or stream, belongs to a thread: those that read take the
                # caller's, which will use the tensors
                self._stream = torch.cuda.current_stream(self.device)
            if self.device.type != "cpu":
                self._staging = Staging(pinned=self.device.type == "cuda")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self._ahead = self._open.enter_context(ReadAhead(self._read, self._size))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what runs, close the files; raises ArtifactError if one is damaged."""
        try:
            self._open.close()
            self._places.clear()
        finally:
            self._hashes.close()
        if error is None or isinstance(error, Exception):
            self._hashes.require_sound()

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begin to read weights and tensors, in the order in which they will be asked for."""
        self._ahead.expect(names)

    def require_group_size(self, group_size: int | None) -> None:
        """Raise ArtifactError if weights were packed with another group size; None takes any."""
        packed = self.manifest.options["group_size"]
        if group_size is not None and group_size != packed:
            raise ArtifactError(
                f"{self.directory} was packed with group_size={packed}, asked for is "
                f"{group_size}; compile the model again"
            )

    def find(self, name: str, shape: tuple[int, ...]) -> str:
        """The name under which the artifact holds the Parameter `name` of `shape`."""
        found = self.manifest.aliases.get(name, name)
        if found in self.manifest.weights:
            stored: tuple[int, ...] = self.manifest.weights[found].shape
        elif found in self.manifest.tensors:
            stored = self._place(found).shape(found)
        else:
            first = next(iter([*self.manifest.weights, *self.manifest.tensors]), "nothing")
            raise ArtifactError(
                f"the model's parameter {name} is not in {self.directory}, which has {first} and "
                "others; it was made from another model"
            )
        if stored != shape:
            raise ArtifactError(
                f"the model's parameter {name} has shape {list(shape)}, {found} in "
                f"{self.directory} has {list(stored)}; it was made from another model"
            )
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is stored as it is, by its name."""
        if name in self.manifest.weights:
            raise ArtifactError(
                f"{self.directory}: {name} is named as packed and as not; compile the model again"
            )
        tensor: torch.Tensor = self._ahead.take(name)
        return tensor

    def packed(self, name: str) -> PackedWeight:
        """The packed weight of the Parameter `name`; shapes, dtypes and scales are checked."""
        packed: PackedWeight = self._ahead.take(name)
        return packed

    def _read(self, name: str) -> torch.Tensor | PackedWeight:
        """What `tensor` or `packed` returns; runs in several threads at once."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if name in self.manifest.weights:
                return self._read_packed(name)
            return self._read_tensor(name)

    def _size(self, name: str) -> int:
        """Bytes of a tensor, or of a packed weight; 0 of what reading will not find."""
        stored = [name]
        if name in self.manifest.weights:
            stored = [stored_name(name, part) for part in self.manifest.weights[name].expected()]
        return sum(self._places[part].size(part) for part in stored if part in self._places)

    def _read_tensor(self, name: str) -> torch.Tensor:
        return self._place(name).read(name, self.device, self._staging)

    def _read_packed(self, name: str) -> PackedWeight:
        entry = self.manifest.weights[name]
        parts = {}
        for suffix, (shape, dtype) in entry.expected().items():
            stored = stored_name(name, suffix)
            tensor = self._read_tensor(stored)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ArtifactError(
                    f"{self.directory}: {stored} is {tensor.dtype} {list(tensor.shape)}, "
                    f"expected {dtype} {list(shape)}"
                )
            parts[suffix] = tensor
        if not torch.isfinite(parts["channel_scale"]).all():
            raise ArtifactError(
                f"{self.directory}: {stored_name(name, 'channel_scale')} is not finite"
            )
        return PackedWeight(
            parts["qweight"],
            parts["channel_scale"],
            parts.get("group_word"),
            parts.get("channel_zero"),
            entry.out_features,
            entry.in_features,
        )

    def _place(self, name: str) -> TensorFile:
        """The file a tensor is in."""
        if name not in self._places:
            raise ArtifactError(f"{self.directory}: no weight file holds {name}")
        return self._places[name]
