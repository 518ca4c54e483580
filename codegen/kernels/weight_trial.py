"""What trials of linears share: a weight that is never in a cache when a kernel is timed."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from qoqc.codegen.family import TwinTrial

COLD = ("qweight", "channel_scale", "word")
"""The fields of a call that are its weight."""


Call = TypeVar("Call", bound=Any)


class WeightTrial(TwinTrial, Generic[Call]):
    """A trial whose `_calls` are equal but for the memory of their weights."""

    _calls: list[Call]

    @property
    def cold_bytes(self) -> int:
        """Bytes of the weight with its words and scales."""
        call = self._calls[0]
        return sum(getattr(call, name).nbytes for name in COLD)

    def rotate(self, copies: int) -> None:
        """Have `copies` equal weights in different memory."""
        first = self._calls[0]
        while len(self._calls) < copies:
            own = {n: getattr(first, n).clone() for n in COLD}
            self._calls.append(dataclasses.replace(first, **own))
