"""The tensors of a foreign checkpoint: found through its index, checked as they are taken."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qoqc.errors import Unsupported

PATTERNS = ("*.safetensors", "*.bin", "*.pt")
"""Files with tensors, in the order they are looked for: pickles only if there is nothing else."""

Shape = tuple[int | None, ...]
"""An expected shape; None takes any size."""


class TensorFiles:
    """All tensors of a checkpoint directory by name. A context manager.

    Files are safetensors, or pickles read with `weights_only`, which runs no code from them.
    Raises Unsupported for a directory without tensors, and for a file that is damaged, lacks a
    tensor its index promises, repeats one of another file, or holds more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        """Nothing is opened yet."""
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._home: dict[str, str] = {}

    def __enter__(self) -> TensorFiles:
        """Open the files and read their tables of contents."""
        if not self.directory.is_dir():
            raise Unsupported(f"{self.directory} is not a directory; name one with a checkpoint")
        with ExitStack() as stack:
            self._stack = stack
            promised = self._index()
            for name in sorted(set(promised.values())) if promised else self._unindexed():
                self._open(name)
            for tensor, name in promised.items():
                if self._home.get(tensor) != name:
                    raise Unsupported(
                        f"{self.directory}: {name} lacks {tensor}, which the index puts there; "
                        "download the checkpoint again"
                    )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._files.clear()
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def get(self, name: str) -> torch.Tensor:
        """A copy of one tensor, on the CPU, contiguous."""
        if name not in self._home:
            raise Unsupported(
                f"{self.directory}: the tensor {name} is missing; download the checkpoint again"
            )
        file = self._files[self._home[name]]
        try:
            tensor: torch.Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(self._home[name], error) from error
        # a copy: what comes from the mapped file is gone if the file is cut short later
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def take(self, name: str, dtypes: tuple[torch.dtype, ...], shape: Shape) -> torch.Tensor:
        """A tensor of one of `dtypes` and of `shape`; floating-point ones must be finite."""
        tensor = self.get(name)
        right = len(tensor.shape) == len(shape) and all(
            expected in (None, size) for size, expected in zip(tensor.shape, shape, strict=True)
        )
        if not right or tensor.dtype not in dtypes:
            wanted = " or ".join(_word(dtype) for dtype in dtypes)
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise Unsupported(
                f"{self.directory}/{self._home[name]}: {name} is {_word(tensor.dtype)} "
                f"{list(tensor.shape)}, expected {wanted} [{sizes}]; it is not in this format"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Unsupported(
                f"{self.directory}/{self._home[name]}: {name} holds NaN or infinite values; "
                "repair the checkpoint"
            )
        return tensor

    def _index(self) -> dict[str, str]:
        """File by tensor as the index has it; empty if there is none."""
        for pattern in PATTERNS:
            paths = sorted(self.directory.glob(f"{pattern}.index.json"))
            if not paths:
                continue
            try:
                mapping = json.loads(paths[0].read_bytes())["weight_map"]
                files = {str(tensor): str(name) for tensor, name in mapping.items()}
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._damaged(paths[0].name, error) from error
            for name in files.values():
                # an index may come from anywhere: it must not name files elsewhere
                if Path(name).name != name or not (self.directory / name).is_file():
                    raise Unsupported(
                        f"{paths[0]} names the file {name!r}, which is not in {self.directory}; "
                        "download the checkpoint again"
                    )
            return files
        return {}

    def _unindexed(self) -> list[str]:
        for pattern in PATTERNS:
            names = sorted(path.name for path in self.directory.glob(pattern))
            if names:
                return names
        raise Unsupported(f"{self.directory} holds no tensors ({', '.join(PATTERNS)})")

    def _open(self, name: str) -> None:
        path = self.directory / name
        file: Any
        if path.suffix == ".safetensors":
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise self._damaged(name, error) from error
        else:
            file = self._unpickle(path)
        for tensor in file.keys():  # noqa: SIM118  a safetensors file is not iterable
            if tensor in self._home:
                raise Unsupported(
                    f"{self.directory}: both {self._home[tensor]} and {name} hold {tensor}; "
                    "remove the file that does not belong to the checkpoint"
                )
            self._home[tensor] = name
        self._files[name] = file

    def _unpickle(self, path: Path) -> dict[str, torch.Tensor]:
        """A state dict saved by torch.save."""
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Unsupported(
                f"{path} is a pickle with more than tensors in it, or is damaged, and was not "
                "loaded; save its state dict as safetensors"
            ) from error
        except Exception as error:  # on damaged bytes torch.load raises whatever it runs into
            raise self._damaged(path.name, error) from error
        if not isinstance(found, Mapping) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in found.items()
        ):
            raise Unsupported(f"{path} is not a state dict; save its tensors as safetensors")
        return dict(found)

    def _damaged(self, name: str, error: BaseException) -> Unsupported:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Unsupported(
            f"{self.directory}/{name} is damaged: {reason}; download the checkpoint again"
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
