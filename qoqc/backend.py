"""The torch.compile backend "qoq", found through the entry point torch_dynamo_backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule
from torch.nn import Parameter

from qoqc.artifact.adopt import adopt_weights
from qoqc.config import Options
from qoqc.pipeline import compile_graph
from qoqc.runtime.dynamo import allow_graphs, keep_floats, warn_on_uncompiled_generate
from qoqc.runtime.weights import STORE

MAX_GRAPHS = 64
"""Kinds of cache, batch 1 and more, fixed and any length each take two; torch's limit is 8, and
beyond it Dynamo runs the model uncompiled, whose released weights are NaN."""


def qoq(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="qoq", options={...})`; options as in qoqc.config.Options.

    torch's own `mode` argument is taken too; it excludes `options`, which have a `mode` for that.
    Raises OptionError, Unsupported or ArtifactError, which Dynamo wraps.
    """
    allow_graphs(MAX_GRAPHS)
    keep_floats()
    parsed = Options.parse({**(options or {}), **({} if mode is None else {"mode": mode})})
    if "group_size" not in (options or {}):
        parsed = dataclasses.replace(parsed, group_size=_packed_as(example_inputs, parsed))
    if parsed.artifact is not None:
        adopt_weights(parsed.artifact, gm, example_inputs, parsed.group_size)
    return compile_graph(gm, example_inputs, parsed)


def _packed_as(example_inputs: Sequence[Any], parsed: Options) -> Literal[128, -1]:
    """The group size of weights that have no 16-bit values any more, else the default."""
    for value in example_inputs:
        if isinstance(value, Parameter) and STORE.is_released(value):
            packed = STORE.packed(value)
            if packed is not None:
                return packed.group_size
    return parsed.group_size


def _is_qoq(backend: Any) -> bool:
    return backend is qoq or getattr(backend, "compiler_name", None) == "qoq"


warn_on_uncompiled_generate(
    _is_qoq,
    'torch.compile(model, backend="qoq").generate() runs the uncompiled model: torch binds '
    "generate to the module it wraps. Use model = qoqc.compile(model), then model.generate().",
)


def check_torch_version(version: str = torch.__version__) -> str | None:
    """None if this torch is in the supported range, else a line that says what to install."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if (2, 11) <= release < (2, 14):
        return None
    return (
        f"torch {version} is outside the supported range >= 2.11, < 2.14; pip install 'torch<2.14'"
    )
