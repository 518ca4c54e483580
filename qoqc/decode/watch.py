"""What the host learns of a generation, one step late so that the device never waits for it."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import torch

from qoqc.decode.buffers import Buffers


@dataclasses.dataclass
class _Look:
    """Copies on the host of a step's end, complete once `event` is."""

    length: int
    any_going: torch.Tensor
    token: torch.Tensor | None
    event: Any


class Watch:
    """Follows the ends of steps in order: hands tokens to the streamer, sees when all is finished.

    lag  steps that may be under way while the host looks at an earlier one
    """

    def __init__(self, buffers: Buffers, streamer: Any, lag: int) -> None:
        self._buffers = buffers
        self._streamer = streamer
        self._cuda = buffers.ids.device.type == "cuda"
        self._lag = lag if self._cuda else 0
        self._looks: deque[_Look] = deque()
        self.finished_at: int | None = None

    def step_done(self, length: int) -> bool:
        """A step has been issued that makes the sequences `length` long; is all finished?"""
        self._looks.append(self._look(length))
        while len(self._looks) > self._lag and self.finished_at is None:
            self._see(self._looks.popleft())
        return self.finished_at is not None

    def all_done(self, length: int) -> int:
        """After the last step: the length of the sequences, `length` or less."""
        while self._looks and self.finished_at is None:
            self._see(self._looks.popleft())
        if self._streamer is not None:
            self._streamer.end()
        return length if self.finished_at is None else self.finished_at

    def _look(self, length: int) -> _Look:
        token = None if self._streamer is None else self._host(self._buffers.token[:, 0])
        going = self._host(self._buffers.any_going)
        event = torch.cuda.Event() if self._cuda else None
        if event is not None:
            event.record()
        return _Look(length, going, token, event)

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._cuda:
            return tensor.clone()
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return target.copy_(tensor, non_blocking=True)

    def _see(self, look: _Look) -> None:
        if look.event is not None:
            look.event.synchronize()
        if self._streamer is not None:
            self._streamer.put(look.token)
        if not look.any_going.item():
            self.finished_at = look.length
