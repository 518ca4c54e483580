"""What a pass gets beside the graph: options, the live inputs, and where refusals are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.nn import Parameter

from qoqc.config import Options
from qoqc.runtime.dynamo import qualified_name
from qoqc.runtime.weights import STORE, Bundle, WeightStore


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A node left as it was. `kept` if a rule says so (heads, routers, excludes), not a failing."""

    name: str
    reason: str
    kept: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclasses.dataclass
class Context:
    """The state of one run of the pipeline over one graph.

    values   placeholder -> the object that will be passed for it: a Parameter, a tensor, an int
    index    placeholder -> its position among the arguments Dynamo passes
    bound    placeholder added by a pass -> the tensor qoqc passes for it
    bundles  (bundle, the placeholders of its Parameters), one per packed weight in use
    unfused  what stands in front of a quantized linear and is computed apart: right, but slower
    tables   the embedding tables, once they have been looked for: no pass changes them
    """

    options: Options
    values: dict[Node, Any]
    index: dict[Node, int]
    store: WeightStore = dataclasses.field(default_factory=lambda: STORE)
    bound: dict[Node, torch.Tensor] = dataclasses.field(default_factory=dict)
    bundles: list[tuple[Bundle, tuple[Node, ...]]] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    unfused: list[Refusal] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    tables: list[torch.Tensor] | None = None

    @classmethod
    def of(cls, placeholders: Sequence[Node], values: Sequence[Any], options: Options) -> Context:
        """The context of a fresh graph whose placeholders stand for `values`, in order."""
        return cls(
            options,
            dict(zip(placeholders, values, strict=True)),
            {node: position for position, node in enumerate(placeholders)},
        )

    def parameter(self, node: Node) -> Parameter | None:
        """The live Parameter behind a placeholder, or None if the node is something else."""
        value = self.values.get(node)
        return value if isinstance(value, Parameter) else None

    def name(self, node: Node) -> str:
        """The module path of a parameter placeholder, `model.layers.0.mlp.up_proj.weight`."""
        return qualified_name(node)

    def refuse(self, name: str, reason: str, *, kept: bool = False) -> None:
        """Record why a node stays in 16 bit; each (name, reason) once."""
        refusal = Refusal(name, reason, kept)
        if refusal not in self.refusals:
            self.refusals.append(refusal)
