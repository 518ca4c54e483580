"""A model built from an artifact alone, its packed weights never present in 16 bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode

from qoqc.artifact.packed_file import PackedFile
from qoqc.config import Options
from qoqc.errors import ArtifactError
from qoqc.runtime.weights import STORE, WeightRef


def load_model(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[Any, Options]:
    """The model of an artifact, ready for qoqc.compile, and the options it was made with.

    Packed weights wait in STORE; the Parameters they belong to read as NaN. Peak memory on the
    device: the artifact's tensors, one NaN buffer and one empty tensor of the largest weight.
    Raises ArtifactError if the artifact is missing, damaged, of another version, or needs a
    class that this transformers does not have.
    """
    with PackedFile(Path(directory), torch.device(device)) as file:
        model = _build(file)
        _fill(model, file)
    # a dump directory belongs to a process, not to the model
    options = dataclasses.replace(Options.parse(file.manifest.options), dump=None)
    model.qoqc_options = options
    return model.eval().requires_grad_(False), options


class _NoValues(TorchFunctionMode):
    """Puts what `torch.empty` makes on the meta device.

    Modules make their weights with torch.empty and buffers (rotary frequencies, masks) with
    functions that give values: so weights cost nothing here and computed buffers are real.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _build(file: PackedFile) -> Any:
    name = file.manifest.architecture
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ArtifactError(
            f"{file.directory} needs the class {name}, which transformers "
            f"{transformers.__version__} does not have; it was made with "
            f"{file.manifest.versions.get('transformers')}"
        )
    config = kind.config_class.from_pretrained(file.directory)
    with _NoValues():
        model = kind._from_config(config)
    if (file.directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(file.directory)
    return model


def _fill(model: Any, file: PackedFile) -> None:
    """Put every tensor of the artifact in its place and check that none is left out."""
    manifest = file.manifest
    # the largest first: all released weights share one NaN buffer as large as the largest
    order = sorted(manifest.weights.items(), key=lambda item: -item[1].shape[0] * item[1].shape[1])
    for name, entry in order:
        empty = torch.empty(entry.shape, dtype=entry.torch_dtype, device=file.device)
        param = Parameter(empty, requires_grad=False)
        ref = WeightRef(param, entry.transposed, name)
        STORE.adopt(ref, file.packed(name))
        STORE.release(STORE.bundle([ref], entry.group_size), [param])
        _place(model, name, param, file)
    for name in manifest.tensors:
        _place(model, name, file.tensor(name), file)
    for alias, name in manifest.aliases.items():
        _place(model, alias, model.get_parameter(name), file)
    for name, buffer in model.named_buffers():
        if buffer.device != file.device and not buffer.is_meta:
            owner, leaf = _owner(model, name)
            setattr(owner, leaf, buffer.to(file.device))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ArtifactError(f"{file.directory} has no values for {missing[0]}")


def _place(model: Any, name: str, value: torch.Tensor, file: PackedFile) -> None:
    """Replace the parameter or buffer `name` of the model by `value`, of the same shape."""
    try:
        owner, leaf = _owner(model, name)
        old = getattr(owner, leaf)
    except AttributeError as error:
        raise ArtifactError(
            f"{file.directory} holds {name}, which {type(model).__name__} does not have"
        ) from error
    if old.shape != value.shape:
        raise ArtifactError(
            f"{name} has shape {list(value.shape)} in {file.directory} and {list(old.shape)} in "
            f"{type(model).__name__}"
        )
    if isinstance(old, Parameter) and not isinstance(value, Parameter):
        value = Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def _owner(model: Module, name: str) -> tuple[Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf
