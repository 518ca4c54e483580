"""Packed weights of live Parameters: packed once, shared by all graphs, never stale.

A Bundle is what one GEMM reads: the rows of one Parameter, or of several that share an input
(q, k, v). The store remembers for every Parameter which rows of which bundle are its own, so that
another grouping, or an artifact, can be made from them exactly, also after the 16-bit release.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from qoqc.errors import StaleWeights, Unsupported
from qoqc.quant.glu import interleaved
from qoqc.quant.weight import (
    PackedWeight,
    concat_rows,
    expand_int8,
    quantize_weight,
    reordered_rows,
    rows,
)
from qoqc.quant.weight8 import quantize_weight8

GroupSize = Literal[128, -1]
Format = Literal[128, -1, "w8"]


@dataclasses.dataclass(frozen=True)
class WeightRef:
    """A Parameter used as a weight [N, K]; `transposed` if it is stored [K, N] (Conv1D).

    eight  it is to be packed in 8 bit, as [N, 2 * K] (quantize_weight8), whatever the group size
    """

    param: Parameter
    transposed: bool
    name: str
    eight: bool = False

    def dense(self) -> torch.Tensor:
        """The 16-bit weight [N, K]."""
        data = self.param.detach()
        return data.t() if self.transposed else data


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What changes when a Parameter is written in place or given other storage.

    Two writes leave no trace in torch and are not noticed: in place through `.data`
    (`p.data.mul_(2)`), and in place to a Parameter made under inference_mode.
    """

    version: int
    address: int


def fingerprint(param: torch.Tensor) -> Fingerprint:
    """The fingerprint of a Parameter as it is now."""
    return Fingerprint(version(param), param.data_ptr())


def version(param: torch.Tensor) -> int:
    """How often torch saw the tensor written; 0 for inference tensors, which do not count."""
    return 0 if param.is_inference() else param._version


class Bundle:
    """A packed weight with the Parameters its rows come from.

    glu  its rows, a gate's and then an up's, were put in turns for w4a8_glu (quant/glu.py)
    """

    def __init__(
        self, packed: PackedWeight, refs: Sequence[WeightRef], *, glu: bool = False
    ) -> None:
        """`packed` holds the rows of `refs` one after the other, or with `glu` in turns."""
        self.glu = glu
        self.packed = _in_turns(packed) if glu else packed
        self.names = [ref.name for ref in refs]
        self.transposed = [ref.transposed for ref in refs]
        self.eight = refs[0].eight
        self.fingerprints = [fingerprint(ref.param) for ref in refs]
        self.starts = [0]
        for ref in refs:
            self.starts.append(self.starts[-1] + ref.param.shape[1 if ref.transposed else 0])
        self._int8: torch.Tensor | None = None

    def stacked(self) -> PackedWeight:
        """The packed weight with the rows of its Parameters one after the other."""
        if not self.glu:
            return self.packed
        return reordered_rows(self.packed, torch.argsort(interleaved(self.width)))

    @property
    def width(self) -> int:
        """Rows of the gate, and of the up."""
        return self.packed.out_features // 2

    def int8(self) -> torch.Tensor:
        """The expanded weight int8 [N, K] for CPUs; made once, twice the size of the 4-bit one."""
        if self._int8 is None:
            self._int8 = expand_int8(self.packed).contiguous()
        return self._int8

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a graph may be bound to, by field name: the packed tensors, and "int8" if made."""
        expanded = {} if self._int8 is None else {"int8": self._int8}
        return {**self.packed.tensors(), **expanded}

    def overwrite(self, packed: PackedWeight) -> None:
        """Take other values, rows of the Parameters in order, keeping all addresses."""
        packed = _in_turns(packed) if self.glu else packed
        for name, tensor in packed.tensors().items():
            self.packed.tensors()[name].copy_(tensor)
        if self._int8 is not None:
            self._int8.copy_(expand_int8(self.packed))


@dataclasses.dataclass(frozen=True)
class _Rows:
    bundle: Bundle
    position: int

    def packed(self) -> PackedWeight:
        starts = self.bundle.starts
        return rows(self.bundle.stacked(), starts[self.position], starts[self.position + 1])


class WeightStore:
    """All packed weights of the process, found by Parameter. Entries die with their Parameter."""

    def __init__(self) -> None:
        self._rows = WeakTensorKeyDictionary()
        self._tables = WeakTensorKeyDictionary()
        self._tombstones: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}

    def bundle(
        self, refs: Sequence[WeightRef], group_size: GroupSize, *, glu: bool = False
    ) -> Bundle:
        """The bundle of these weights, in this order; packs what is new or changed since.

        With `glu` the rows of their first and second half are in turns (quant/glu.py).

        Raises StaleWeights if a packed weight was changed after its 16-bit release.
        """
        found = [self._find(ref, group_size) for ref in refs]
        first = found[0]
        if (
            first is not None
            and first.bundle.glu == glu
            and len(first.bundle.names) == len(refs)
            and all(f is not None and f.bundle is first.bundle for f in found)
            and [f.position for f in found if f is not None] == list(range(len(refs)))
        ):
            return first.bundle
        parts = [
            self._quantize(ref, group_size) if rows_ is None else rows_.packed()
            for ref, rows_ in zip(refs, found, strict=True)
        ]
        return self._remember(Bundle(concat_rows(parts), refs, glu=glu), refs)

    def adopt(self, ref: WeightRef, packed: PackedWeight) -> None:
        """Use `packed` for a Parameter without looking at its 16-bit values (artifact load)."""
        self._remember(Bundle(packed, [ref]), [ref])

    def packed(self, param: Parameter) -> PackedWeight | None:
        """The packed rows of one Parameter in the format it was packed in last, or None."""
        entry: dict[Format, _Rows] = self._rows.get(param, {})
        return list(entry.values())[-1].packed() if entry else None

    def current(self, param: Parameter) -> PackedWeight:
        """The packed rows of a Parameter; StaleWeights if it has none or changed since packing."""
        entry: dict[Format, _Rows] = self._rows.get(param, {})
        found = list(entry.values())[-1] if entry else None
        if found is None or found.bundle.fingerprints[found.position] != fingerprint(param):
            self._mend(param)
            raise StaleWeights(
                f"a packed weight {list(param.shape)} was replaced, copied or written after it was "
                "packed, and has no 16-bit values; load the artifact again"
            )
        return found.packed()

    def name(self, param: Parameter) -> str:
        """The module path that a packed Parameter was adopted or packed under."""
        found: _Rows = list(self._entry(param).values())[-1]
        return found.bundle.names[found.position]

    def bundles_of(self, model: torch.nn.Module) -> list[Bundle]:
        """The bundles that the parameters of a model were packed into last, each once."""
        entries = [self._rows.get(param, {}) for param in model.parameters()]
        last = [list(entry.values())[-1].bundle for entry in entries if entry]
        return list({id(bundle): bundle for bundle in last}.values())

    def note_table(self, param: torch.Tensor) -> None:
        """Remember an embedding table: after a graph break the output head is in another graph."""
        self._tables[param] = True

    def note_tables_of(self, model: torch.nn.Module) -> None:
        """Remember all tables of a model: a graph break may hide one from the head's graph."""
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                self.note_table(module.weight)

    def tables(self) -> list[torch.Tensor]:
        """The embedding tables noted so far that are still alive."""
        return list(self._tables.keys())

    def release(self, bundle: Bundle, params: Sequence[Parameter]) -> None:
        """Drop the 16-bit storage of the bundle's Parameters: they read as NaN from now on.

        Not that of embedding tables, which a packed head may share its weight with.
        """
        for position, param in enumerate(params):
            if self.is_released(param) or param in self._tables:
                continue
            before = fingerprint(param)
            param.data = self._tombstone(param)
            bundle.fingerprints[position] = fingerprint(param)
            # other formats and groupings of the same values stay good too
            for other in self._entry(param).values():
                if other.bundle.fingerprints[other.position] == before:
                    other.bundle.fingerprints[other.position] = fingerprint(param)

    def is_released(self, param: torch.Tensor) -> bool:
        """True if the Parameter's storage is the shared NaN buffer."""
        address = param.untyped_storage().data_ptr()
        buffers = self._tombstones.get((param.dtype, param.device), [])
        return any(buffer.untyped_storage().data_ptr() == address for buffer in buffers)

    def _find(self, ref: WeightRef, group_size: GroupSize) -> _Rows | None:
        entry: dict[Format, _Rows] = self._rows.get(ref.param, {})
        found = entry.get(_format(ref, group_size))
        if found is not None:
            self._refresh(found.bundle, found.position, ref)
        return found

    def _refresh(self, bundle: Bundle, position: int, ref: WeightRef) -> None:
        """Bring the rows of one Parameter up to date, in place, if it changed since packing."""
        now = fingerprint(ref.param)
        if now == bundle.fingerprints[position]:
            return
        start, stop = bundle.starts[position], bundle.starts[position + 1]
        fresh = self._quantize(ref, bundle.packed.group_size)
        whole = bundle.stacked()
        parts = [rows(whole, 0, start), fresh, rows(whole, stop, whole.out_features)]
        bundle.overwrite(concat_rows([part for part in parts if part.out_features]))
        bundle.fingerprints[position] = now

    def _quantize(self, ref: WeightRef, group_size: GroupSize) -> PackedWeight:
        if self.is_released(ref.param):
            self._mend(ref.param)
            raise StaleWeights(
                f"{ref.name} has no 16-bit values any more (released after packing), but they are "
                "needed: it was changed afterwards, or asked for in another group size; "
                "load the model again"
            )
        try:
            if ref.eight:
                return quantize_weight8(ref.dense())
            return quantize_weight(ref.dense(), group_size)
        except Unsupported as error:
            raise Unsupported(f"{ref.name}: {error}") from error

    def _remember(self, bundle: Bundle, refs: Sequence[WeightRef]) -> Bundle:
        for position, ref in enumerate(refs):
            key = _format(ref, bundle.packed.group_size)
            self._entry(ref.param)[key] = _Rows(bundle, position)
        return bundle

    def _entry(self, param: Parameter) -> dict[Format, _Rows]:
        entry: dict[Format, _Rows] = self._rows.setdefault(param, {})
        return entry

    def _tombstone(self, param: torch.Tensor) -> torch.Tensor:
        """A NaN view of the parameter's shape, of a buffer that all released weights share.

        Not an empty storage: reading that from eager code would crash the process. A larger
        weight adds a larger buffer; the smaller ones stay for the weights that point at them.
        """
        buffers = self._tombstones.setdefault((param.dtype, param.device), [])
        if not buffers or buffers[-1].numel() < param.numel():
            size = max(param.numel(), 1)
            buffers.append(torch.full((size,), torch.nan, dtype=param.dtype, device=param.device))
        return buffers[-1][: param.numel()].view(param.shape)

    def _mend(self, param: torch.Tensor) -> None:
        """Make released weights NaN again: who wrote to one of them wrote to all."""
        for buffer in self._tombstones.get((param.dtype, param.device), []):
            buffer.fill_(torch.nan)


def _format(ref: WeightRef, group_size: GroupSize) -> Format:
    return "w8" if ref.eight else group_size


def _in_turns(packed: PackedWeight) -> PackedWeight:
    return reordered_rows(packed, interleaved(packed.out_features // 2))


STORE = WeightStore()
"""The process's store: torch.compile calls the backend once per graph and gives it no state."""
