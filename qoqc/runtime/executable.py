"""What Dynamo gets back: checks that weights are still the packed ones, then runs the graph."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from qoqc.runtime.weights import Bundle, WeightRef, WeightStore, version

_version_of = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_address_of = torch.Tensor.data_ptr


_RECORD: list[Any] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """The Executables that run inside the block: who captures them as a CUDA graph keeps them."""
    global _RECORD
    outer, _RECORD = _RECORD, []
    try:
        yield _RECORD
    finally:
        _RECORD = outer


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one bundle of a graph comes from and goes to.

    positions  of its Parameters among the arguments Dynamo passes
    fields     index among the bound tensors -> name of the bundle's tensor (Bundle.tensors)
    """

    bundle: Bundle
    positions: tuple[int, ...]
    fields: Mapping[int, str]


class Executable:
    """A compiled graph with its packed weights.

    run      the compiled callable; takes the kept arguments, then the bound tensors
    kept     positions, among the arguments Dynamo passes, of those the graph still reads
    bound    packed tensors, passed last
    slots    the bundles those come from
    release  drop the 16-bit storage of weights that are packed later than the graph
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kept: Sequence[int],
        bound: Sequence[torch.Tensor],
        slots: Sequence[Slot],
        store: WeightStore,
        *,
        release: bool = False,
    ) -> None:
        self._run = run
        self._kept = tuple(kept)
        self._bound = list(bound)
        self._slots = tuple(slots)
        self._positions = tuple(place for slot in slots for place in slot.positions)
        self._store = store
        self._release = release
        self._params: list[weakref.ref[torch.Tensor]] = []
        self._seen: tuple[Any, ...] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run on Dynamo's arguments; packs changed weights first or raises StaleWeights.

        Dynamo guards only the metadata of parameters. So a weight written in place causes no
        recompile, and after a graph break inside a layer all layers share one graph. Three
        C-level loops see every kind of change: another Parameter, written, re-pointed.
        """
        if _RECORD is not None:
            _RECORD.append(self)
        params = [args[position] for position in self._positions]
        now = (_versions(params), tuple(map(_address_of, params)))
        # weak references, not ids: those are used again when a Parameter is replaced
        known = [param() for param in self._params]
        if now != self._seen or not all(map(operator.is_, known, params)):
            self._bind(args)
            now = (_versions(params), tuple(map(_address_of, params)))
            self._params, self._seen = [weakref.ref(param) for param in params], now
        with torch.no_grad():
            return self._run(*[args[position] for position in self._kept], *self._bound)

    def _bind(self, args: Sequence[Any]) -> None:
        """Point the bound tensors at the packed form of the Parameters in `args`."""
        for slot in self._slots:
            params = [args[position] for position in slot.positions]
            like = slot.bundle
            parts = zip(params, like.transposed, like.names, strict=True)
            bundle = self._store.bundle(
                [WeightRef(*part, eight=like.eight) for part in parts],
                like.packed.group_size,
                glu=like.glu,
            )
            for index, field in slot.fields.items():
                self._bound[index] = bundle.int8() if field == "int8" else bundle.tensors()[field]
            if self._release:
                self._store.release(bundle, params)


def _versions(params: Sequence[torch.Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(_version_of, params))
    except RuntimeError:  # parameters made under inference_mode have no version
        return tuple(map(version, params))
