"""Reading an artifact: verified once, tensors one by one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qoqc.artifact.manifest import Manifest, stored_name
from qoqc.config import verify_mode
from qoqc.errors import ArtifactError
from qoqc.quant.weight import PackedWeight


class PackedFile:
    """The tensors of an artifact, read onto `device`. A context manager.

    Raises ArtifactError on entry if the artifact is missing, damaged or of another version.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Read the manifest; the tensors are opened on entry."""
        self.directory = directory
        self.device = device
        self._open = contextlib.ExitStack()
        self._places: dict[str, Any] = {}
        self.manifest = Manifest.read(directory)

    def __enter__(self) -> PackedFile:
        """Verify the files and open those with tensors."""
        self.manifest.verify(self.directory, verify_mode())
        for name in self.manifest.shards:
            try:
                opened: Any = safe_open(
                    self.directory / name, framework="pt", device=str(self.device)
                )
                file = self._open.enter_context(opened)
                self._places.update(dict.fromkeys(file.keys(), file))
            except (OSError, SafetensorError) as error:
                self._open.close()
                raise ArtifactError(f"{self.directory}: {name} is damaged: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._places.clear()
        self._open.close()

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
            stored = self.manifest.weights[found].shape
        elif found in self.manifest.tensors:
            stored = tuple(self._place(found).get_slice(found).get_shape())
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
        tensor: torch.Tensor = self._place(name).get_tensor(name)
        # on a CPU it is a view of the mapped file: not aligned as an allocation is, which changes
        # the order of some floating-point sums, and gone if the file is cut short later
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def packed(self, name: str) -> PackedWeight:
        """The packed weight of the Parameter `name`; shapes, dtypes and scales are checked."""
        entry = self.manifest.weights[name]
        parts = {}
        for suffix, (shape, dtype) in entry.expected().items():
            stored = stored_name(name, suffix)
            tensor = self.tensor(stored)
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

    def _place(self, name: str) -> Any:
        """The file a tensor is in."""
        if name not in self._places:
            raise ArtifactError(f"{self.directory}: no weight file holds {name}")
        return self._places[name]
