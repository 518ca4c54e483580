"""The model's tensors as the folds of the residual stream leave them: fp32, a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qoqc.calibrate.recipe import Recipe
from qoqc.passes.folds.norms import fold_norms, gain, norm_refusals
from qoqc.passes.folds.rotate import NAME, rotation, rotation_refusal, turn
from qoqc.passes.folds.tensors import untied
from qoqc.passes.structure.facts import Consumer, ModelStructure, NormRef, ResidualStream


class Source:
    """What calibration reads of a model, which it leaves as it is, wherever its parameters are.

    Norms and rotation are decided once, for the whole model, and folded into each block when it
    is fetched, from its 16-bit values to fp32: nothing is rounded twice, and no more than one
    block is in fp32.

    structure  that of the model with an output head of its own
    refused    what cannot be folded, with the reason
    """

    def __init__(
        self,
        model: Any,
        structure: ModelStructure,
        names: Sequence[str],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        """Decide. `names` are the blocks, `device` is where their tensors go."""
        self.structure, self._head = untied(model, structure)
        self.refused = [f"not recognised: {problem}" for problem in structure.problems]
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        if self._head is not None and structure.stream.head is not None:
            self._parameters[self._head] = self._parameters[structure.stream.head.weight]
        self._prefixes = tuple(f"{name}." for name in names)
        self._device = device
        self._left: dict[str, str] = {}
        self._q: Tensor | None = None
        self._rotates = recipe.rotate
        if recipe.rotate:
            self._decide(recipe.seed)

    def block(self, name: str) -> dict[str, Tensor]:
        """The folded tensors fp32 of one block, on the device, by their names in the model."""
        prefix = f"{name}."
        own = {known for known in self._parameters if known.startswith(prefix)}
        return self._folded(own)

    def outside(self, *, head: bool = True) -> dict[str, Tensor]:
        """The folded tensors outside all blocks; without the output head if it is not wanted.

        The final norm is folded into the head, so one of them never comes without the other.
        """
        stream = self.structure.stream
        own = {name for name in self._parameters if self._owner(name) is None}
        if not head and stream.head is not None:
            own -= {stream.head.weight, *_names(stream.final_norm)}
        return self._folded(own)

    def _decide(self, seed: int) -> None:
        read = _norms(self.structure.stream)
        small = self._fetch({name for norm in read for name in _names(norm)})
        crossing = dict.fromkeys(self._crossing(), "what reads it is in another block")
        self._left = {**norm_refusals(self.structure, small), **crossing}
        gains = {norm.weight: gain(norm, small) for norm in read if norm.weight in self._left}
        kept = [
            name
            for name, scale in gains.items()
            if name is not None and scale is not None and bool((scale != 1).any())
        ]
        reason = rotation_refusal(self.structure, self._parameters, kept)
        self.refused += [f"{name}: {why}" for name, why in self._left.items()]
        if reason is None:
            self._q = rotation(self.structure, seed).to(self._device)
        else:
            self.refused.append(f"{NAME}: {reason}")

    def _crossing(self) -> list[str]:
        """Norms that a linear of another block reads, so that no block could be folded alone."""
        stream = self.structure.stream
        groups = [(c.norm, c.linears) for c in stream.consumers]
        groups.append((stream.final_norm, () if stream.head is None else (stream.head,)))
        return [
            _names(norm)[0]
            for norm, linears in groups
            if norm is not None and _names(norm)
            if {self._owner(ref.weight) for ref in linears} - {self._owner(_names(norm)[0])}
        ]

    def _owner(self, name: str) -> str | None:
        """The prefix of the block that holds a parameter; None outside all."""
        return next((prefix for prefix in self._prefixes if name.startswith(prefix)), None)

    def _fetch(self, names: Collection[str]) -> dict[str, Tensor]:
        """fp32 copies on the device."""
        return {
            name: p.detach().to(self._device, torch.float32, copy=True)
            for name, p in self._parameters.items()
            if name in names
        }

    def _folded(self, names: Collection[str]) -> dict[str, Tensor]:
        tensors = self._fetch(names)
        if self._rotates:
            part = dataclasses.replace(self.structure, stream=_part(self.structure.stream, names))
            fold_norms(part, tensors, self._left)
            if self._q is not None:
                turn(part, tensors, self._q)
        return tensors


def _part(stream: ResidualStream, names: Collection[str]) -> ResidualStream:
    """What the parameters `names` have of the stream."""
    consumers = [
        Consumer(
            c.norm if c.norm is not None and set(_names(c.norm)) & set(names) else None,
            tuple(ref for ref in c.linears if ref.weight in names),
        )
        for c in stream.consumers
    ]
    ends = stream.head is not None and stream.head.weight in names
    return dataclasses.replace(
        stream,
        embeddings=tuple(name for name in stream.embeddings if name in names),
        consumers=tuple(c for c in consumers if c.norm is not None or c.linears),
        producers=tuple(p for p in stream.producers if p.linear.weight in names),
        final_norm=stream.final_norm if ends else None,
        head=stream.head if ends else None,
    )


def _norms(stream: ResidualStream) -> list[NormRef]:
    """The norms that read the stream."""
    found = (*(consumer.norm for consumer in stream.consumers), stream.final_norm)
    return [norm for norm in found if norm is not None]


def _names(norm: NormRef | None) -> list[str]:
    """Its weight and bias, those that it has."""
    return [] if norm is None else [x for x in (norm.weight, norm.bias) if x is not None]
