"""Which modules are a model's blocks, and which of the discovered layers is in which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch.nn import ModuleList

from qoqc.errors import Unsupported
from qoqc.passes.structure.facts import Layer, ModelStructure


def block_names(model: Any, structure: ModelStructure) -> list[str]:
    """The modules that run one after the other: `model.layers.0`, `model.layers.1`, ...

    They are the members of the outermost list of modules that the discovered layers are in.
    Raises Unsupported if no layer was discovered, or not all in one list.
    """
    lists = {_list_of(model, layer.name) for layer in structure.layers}
    if len(lists) != 1 or None in lists:
        why = f": {structure.problems[0]}" if structure.problems else ""
        raise Unsupported(
            f"{type(model).__name__}: no chain of layers was recognised{why}; use --recipe rtn"
        )
    (name,) = lists
    return [f"{name}.{number}" for number in range(len(model.get_submodule(name)))]


def layers_by_block(names: Sequence[str], structure: ModelStructure) -> list[Layer | None]:
    """The discovered layer of each block; None for a block in which nothing was recognised."""
    found: list[Layer | None] = []
    for name in names:
        own = [x for x in structure.layers if x.name == name or x.name.startswith(f"{name}.")]
        if not own:
            found.append(None)
            continue
        attentions = [x.attention for x in own if x.attention is not None]
        mlps = tuple(mlp for x in own for mlp in x.mlps)
        attention = attentions[0] if len(attentions) == 1 else None
        found.append(Layer(name, attention, mlps, own[0].parallel))
    return found


def structure_for(structure: ModelStructure, layer: Layer | None) -> ModelStructure:
    """The structure with one layer only, so that folds of attention and MLP touch no other."""
    return dataclasses.replace(structure, layers=() if layer is None else (layer,))


def _list_of(model: Any, name: str) -> str | None:
    """The outermost ModuleList on the path `name`."""
    module: Any = model
    path: list[str] = []
    for part in name.split("."):
        if isinstance(module, ModuleList):
            return ".".join(path)
        module = module.get_submodule(part)
        path.append(part)
    return None
