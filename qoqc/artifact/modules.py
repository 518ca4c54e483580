"""A model without 16-bit linears: packed modules put in before loading, closed after it."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from qoqc.artifact.manifest import Manifest, WeightEntry
from qoqc.errors import ArtifactError, Unsupported
from qoqc.runtime.packed_linear import PackedLinear, replaceable


def open_modules(model: Module, manifest: Manifest, where: object) -> dict[str, PackedLinear]:
    """Replace the linears of `model` that are packed, by the Parameter's name; see PackedLinear.

    A packed weight of another kind of module is left out of the result and in the model.
    Raises ArtifactError, naming `where` it is from, for weights the model has no place for.
    """
    replaced = {}
    for name, entry in manifest.weights.items():
        owner, leaf = owner_of(model, name, where)
        _require_shape(name, entry, owner._parameters.get(leaf), model, where)
        path = name.removesuffix(f".{leaf}")
        if leaf != "weight" or not replaceable(owner):
            continue
        module = PackedLinear(owner, entry.expected())
        if module.transposed != entry.transposed:
            raise ArtifactError(f"{where}: {name} is stored the other way round; compile it again")
        _put(model, path, module)
        replaced[name] = module
    for alias, name in manifest.aliases.items():
        if name in replaced:
            owner, _ = owner_of(model, alias, where)
            if getattr(owner, "bias", None) is not replaced[name].bias:
                raise Unsupported(f"{alias} shares the packed weight of {name}, but not its bias")
            _put(model, alias.removesuffix(".weight"), replaced[name])
    return replaced


def _put(model: Module, path: str, module: Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def seal_modules(modules: dict[str, PackedLinear]) -> None:
    """Give STORE what a loader put into the modules."""
    for name, module in largest_first(modules):
        module.seal(name)


def largest_first(modules: dict[str, PackedLinear]) -> list[tuple[str, PackedLinear]]:
    """In this order because released weights share a NaN buffer as large as the largest."""
    return sorted(modules.items(), key=lambda item: -item[1].out_features * item[1].in_features)


def owner_of(model: Module, name: str, where: object) -> tuple[Module, str]:
    """The module that has the parameter or buffer `name`, and the name it has there.

    Raises ArtifactError, naming `where` the name is from, if there is none.
    """
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError as error:
        raise _foreign(model, name, where) from error
    if owner._parameters.get(leaf) is None and owner._buffers.get(leaf) is None:
        raise _foreign(model, name, where)
    return owner, leaf


def _require_shape(name: str, entry: WeightEntry, old: Any, model: Module, where: object) -> None:
    if old is None:
        raise _foreign(model, name, where)
    if tuple(old.shape) != entry.shape:
        raise ArtifactError(
            f"{name} has shape {list(entry.shape)} in {where} and {list(old.shape)} in "
            f"{type(model).__name__}"
        )


def _foreign(model: Module, name: str, where: object) -> ArtifactError:
    return ArtifactError(f"{where} holds {name}, which {type(model).__name__} does not have")
