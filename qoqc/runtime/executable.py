"""What Dynamo gets back: checks that weights are still the packed ones, then runs the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qoqc.runtime.weights import Bundle, WeightStore

_version_of = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_address_of = torch.Tensor.data_ptr


class Executable:
    """A compiled graph with its packed weights.

    run      the compiled callable; takes the kept arguments, then the bound tensors
    kept     positions, among the arguments Dynamo passes, of those the graph still reads
    bound    packed tensors, passed last
    watched  (position of a weight's Parameter, its bundle, its place in the bundle)
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kept: Sequence[int],
        bound: Sequence[torch.Tensor],
        watched: Sequence[tuple[int, Bundle, int]],
        store: WeightStore,
    ) -> None:
        self._run = run
        self._kept = tuple(kept)
        self._bound = tuple(bound)
        self._watched = tuple(watched)
        self._positions = tuple(position for position, _, _ in watched)
        self._store = store
        self._seen: tuple[Any, ...] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run on Dynamo's arguments; repacks changed weights first or raises StaleWeights.

        Dynamo guards only the metadata of parameters, so a weight written in place never causes a
        recompile. Three C-level maps see every kind of change: replaced, written, or re-pointed.
        """
        params = [args[position] for position in self._positions]
        now = (
            tuple(map(id, params)),
            tuple(map(_version_of, params)),
            tuple(map(_address_of, params)),
        )
        if now != self._seen:
            for param, (_, bundle, place) in zip(params, self._watched, strict=True):
                self._store.refresh(bundle, place, param)
            self._seen = now
        with torch.no_grad():
            return self._run(*[args[position] for position in self._kept], *self._bound)
