"""Where the tensors of several packed weights go in the parameters of one layer.

vLLM makes one layer of linears that share an input (q, k, v; gate, up) and loads it tensor by
tensor. Tiles hold 128 rows, so a part whose rows do not fill its last tile begins the next part's
rows at a new one; `joined` closes such gaps when all is there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qoqc.artifact.manifest import WeightEntry, stored_name
from qoqc.errors import ArtifactError, Unsupported
from qoqc.ir.spec import TILE_N
from qoqc.quant.weight import PackedWeight, concat_rows

ROWS = {"qweight": 0, "channel_scale": 0, "group_word": 1, "channel_zero": 0}
"""The axis of the output channels (of their tiles: qweight), by field."""

_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclasses.dataclass(frozen=True)
class Part:
    """A packed weight of the artifact, by the name of its Parameter there."""

    name: str
    entry: WeightEntry


class FieldLoader:
    """Fills the parameter of one field (qweight, ...) with the parts' tensors, in any order.

    shape  of the parameter: the parts' tensors, one behind the other along the output channels
    dtype  of the parameter and of each tensor
    """

    def __init__(self, field: str, parts: Sequence[Part]) -> None:
        """Nothing is loaded yet; the parts have one format and in_features."""
        expected = [part.entry.expected()[field] for part in parts]
        self._axis = ROWS[field]
        self._shapes = [shape for shape, _ in expected]
        self.sizes = [shape[self._axis] for shape in self._shapes]
        self._starts = [0, *itertools.accumulate(self.sizes)]
        self._names = [stored_name(part.name, field) for part in parts]
        self._seen: set[int] = set()
        whole = list(self._shapes[0])
        whole[self._axis] = self._starts[-1]
        self.shape = tuple(whole)
        self.dtype = expected[0][1]

    def load(self, param: Tensor, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        """Copy the tensor of one part; vLLM calls it as `param.weight_loader`, by these names.

        shard_id  which part: its number, or one of q, k, v; None if there is one only

        Raises Unsupported for another shard_id, ArtifactError for another shape or dtype.
        """
        index = self._index(shard_id)
        found, shape = tuple(loaded_weight.shape), self._shapes[index]
        if found != shape or loaded_weight.dtype != self.dtype:
            raise ArtifactError(
                f"{self._names[index]} is {loaded_weight.dtype} {list(found)}, expected "
                f"{self.dtype} {list(shape)}; compile the model again"
            )
        if len(self._seen) == len(self._shapes):
            self._seen.clear()  # it is loaded once more
        to = param.data.narrow(self._axis, self._starts[index], self.sizes[index])
        to.copy_(loaded_weight)
        self._seen.add(index)

    def missing(self) -> list[str]:
        """The stored names of the tensors that have not come."""
        return [name for i, name in enumerate(self._names) if i not in self._seen]

    def _index(self, shard_id: int | str | None) -> int:
        index = _SHARDS.get(shard_id) if isinstance(shard_id, str) else shard_id
        if index is None and shard_id is None and len(self._shapes) == 1:
            return 0
        if not isinstance(index, int) or not 0 <= index < len(self._shapes):
            raise Unsupported(
                f"{self._names[0]}: vLLM loads it as shard {shard_id!r} of {len(self._shapes)}, "
                "which the plug-in of qoqc does not know; use qoqc serve for this model"
            )
        return index


def joined(tensors: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of one packed weight [sum of the parts' N, K], from those FieldLoaders filled.

    The very same tensors if every part but the last fills its tiles, else repacked, exactly.
    """
    entries = [part.entry for part in parts]
    if all(entry.out_features % TILE_N == 0 for entry in entries[:-1]):
        return dict(tensors)
    pieces = {
        field: tensor.split(FieldLoader(field, parts).sizes, dim=ROWS[field])
        for field, tensor in tensors.items()
    }
    packed = []
    for i, entry in enumerate(entries):
        piece = {field: tensors[i] for field, tensors in pieces.items()}
        packed.append(
            PackedWeight(
                piece["qweight"],
                piece["channel_scale"],
                piece.get("group_word"),
                piece.get("channel_zero"),
                entry.out_features,
                entry.in_features,
            )
        )
    return concat_rows(packed).tensors()


def require_one_kind(parts: Sequence[Part], prefix: str) -> None:
    """Raise Unsupported if the parts of the layer `prefix` cannot be one packed weight."""
    first = parts[0]
    for part in parts[1:]:
        for what in ("group_size", "in_features"):
            mine, others = getattr(part.entry, what), getattr(first.entry, what)
            if mine != others:
                raise Unsupported(
                    f"{prefix}: vLLM makes one layer of {first.name} with {what} {others} and "
                    f"{part.name} with {mine}; compile the model again, with one format"
                )


def require_finite(scale: Tensor, parts: Sequence[Part]) -> None:
    """Raise ArtifactError if a channel_scale that was loaded is not finite."""
    if not torch.isfinite(scale).all():
        raise ArtifactError(
            f"the channel_scale of {', '.join(part.name for part in parts)} is not finite; copy "
            "the artifact again"
        )
