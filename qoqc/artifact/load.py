"""A model built from an artifact alone, its packed weights never present in 16 bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from qoqc.artifact.huggingface import attach, made_with
from qoqc.artifact.modules import largest_first, open_modules, owner_of
from qoqc.artifact.packed_file import PackedFile
from qoqc.config import Options
from qoqc.errors import ArtifactError
from qoqc.runtime.packed_linear import released_parameter


def load_model(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[Any, Options]:
    """The model of an artifact, ready for qoqc.compile, and the options it was made with.

    Packed weights wait in STORE; the Parameters they belong to read as NaN. Peak memory on the
    device: the artifact's tensors, and one NaN buffer as large as the largest weight.
    Raises ArtifactError if the artifact is missing, damaged, of another version, or needs a
    class that this transformers does not have.
    """
    with PackedFile(Path(directory), torch.device(device)) as file:
        options = made_with(file.manifest)
        model = build(file)
        fill(model, file)
    attach(model, file.manifest, file.directory)
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


def build(file: PackedFile) -> Any:
    """The model that an artifact's config describes, its weights on the meta device.

    Raises ArtifactError if the config is damaged, or transformers lacks the class.
    """
    name = file.manifest.architecture
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ArtifactError(
            f"{file.directory} needs the class {name}, which transformers "
            f"{transformers.__version__} does not have; it was made with "
            f"{file.manifest.versions.get('transformers')}"
        )
    try:
        config = kind.config_class.from_pretrained(file.directory)
        # the packed modules are put in here, not by transformers
        del config.quantization_config
        with _NoValues():
            model = kind._from_config(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{file.directory}: {name} cannot be built from config.json: {error}"
        ) from error
    if (file.directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(file.directory)
    return model


def fill(model: Any, file: PackedFile) -> None:
    """Put every tensor of the artifact in its place and check that none is left out.

    Raises ArtifactError if the artifact and the model differ in names or shapes.
    """
    manifest = file.manifest
    packed_modules = open_modules(model, manifest, file.directory)
    in_order = largest_first(packed_modules)
    # weights of another kind of module, which runs compiled only
    others = [name for name in manifest.weights if name not in packed_modules]
    file.read_ahead([*(name for name, _ in in_order), *others, *manifest.tensors])
    for name, module in in_order:
        module.seal(name, file.packed(name))
    for name in others:
        entry, packed = manifest.weights[name], file.packed(name)
        param = released_parameter(name, packed, entry.torch_dtype, entry.transposed)
        _place(model, name, param, file)
    for name in manifest.tensors:
        _place(model, name, file.tensor(name), file)
    for alias, name in manifest.aliases.items():
        owner, leaf = owner_of(model, name, file.directory)
        _place(model, alias, getattr(owner, leaf), file)
    for name, buffer in model.named_buffers():
        if buffer.device != file.device and not buffer.is_meta:
            owner, leaf = owner_of(model, name, file.directory)
            setattr(owner, leaf, buffer.to(file.device))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ArtifactError(f"{file.directory} has no values for {missing[0]}")


def _place(model: Any, name: str, value: torch.Tensor, file: PackedFile) -> None:
    """Replace the parameter or buffer `name` of the model by `value`, of the same shape."""
    owner, leaf = owner_of(model, name, file.directory)
    old = getattr(owner, leaf)
    if old.shape != value.shape:
        raise ArtifactError(
            f"{name} has shape {list(value.shape)} in {file.directory} and {list(old.shape)} in "
            f"{type(model).__name__}"
        )
    if isinstance(old, Parameter) and not isinstance(value, Parameter):
        value = Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)
