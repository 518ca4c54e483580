"""Packed weights of an artifact for a model that was loaded with its 16-bit ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.fx import GraphModule
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from qoqc.artifact.packed_file import PackedFile
from qoqc.codegen.tuning import table
from qoqc.runtime.dynamo import qualified_name
from qoqc.runtime.weights import STORE, WeightRef

_ADOPTED: Any = WeakTensorKeyDictionary()
"""Parameter -> directory its packed weight came from."""


def adopt_weights(
    directory: str | os.PathLike[str],
    gm: GraphModule,
    example_inputs: Sequence[Any],
    group_size: int | None = None,
) -> int:
    """Give the Parameters of a captured graph the packed weights of an artifact; returns how many.

    For a model that was loaded with its 16-bit weights. Weights adopted before are left alone, so
    later graphs of the model cost nothing.
    Raises ArtifactError if a Parameter is not in the artifact, or has another shape there, or the
    artifact was packed with another `group_size`.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = zip(placeholders, example_inputs, strict=True)
    root = os.fspath(Path(directory).resolve())
    waiting = [
        (qualified_name(node), value)
        for node, value in inputs
        if isinstance(value, Parameter) and _ADOPTED.get(value) != root
    ]
    if not waiting:
        return 0
    with PackedFile(Path(directory), waiting[0][1].device) as file:
        file.require_group_size(group_size)
        weights = file.manifest.weights
        stored = {name: file.find(name, tuple(param.shape)) for name, param in waiting}
        file.read_ahead(found for found in stored.values() if found in weights)
        adopted = [
            (WeightRef(param, weights[found].transposed, name), file.packed(found))
            for name, param in waiting
            if (found := stored[name]) in weights
        ]
    # only now the files are known to be sound
    table.adopt(file.directory, file.manifest.tuning_tables(file.directory))
    for ref, packed in adopted:
        STORE.adopt(ref, packed)
    for _, param in waiting:
        _ADOPTED[param] = root
    return len(adopted)
