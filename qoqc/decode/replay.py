"""Functions of fixed tensors that are captured as CUDA graphs and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from qoqc.log import get_logger
from qoqc.runtime.executable import recorded

log = get_logger("decode")


class Pool:
    """The device memory that captured graphs share; they never run at the same time.

    A graph of its own keeps it alive: torch gives the memory up with the last graph that uses it,
    and cannot capture into it again.
    """

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with (
            warnings.catch_warnings(),
            torch.cuda.graph(self._anchor, pool=self.handle, capture_error_mode="thread_local"),
        ):
            warnings.simplefilter("ignore")  # that it is empty
        self.usable = True

    def abandon(self) -> None:
        """After a capture that could not be ended: no graph of this pool is captured or replayed.

        torch leaves its allocator and its random generator as they are during a capture, and
        would refuse every random number from here on. The generator gets a new state of the same
        seed and offset; graphs captured before would draw from the old one.
        """
        self.usable = False
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, self.handle)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


class Replayed:
    """`run` as a CUDA graph: the first call runs it, the second captures it, the others replay.

    `run` takes its inputs from tensors whose addresses do not change, and what it returns is
    overwritten by the next call. The first call is what compiles, allocates and tunes; a capture
    runs nothing, so it is replayed at once. Where it cannot be captured (the forward waits for
    the device) it runs as it is, which is slower and is said in a warning. Without `pool`
    nothing is captured.
    """

    def __init__(self, name: str, run: Callable[[], Any], pool: Pool | None) -> None:
        self._name = name
        self._run = run
        self._pool = pool
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None
        self._kept: list[Any] = []

    @property
    def captured(self) -> bool:
        """True once calls replay a graph."""
        return self._graph is not None

    def __call__(self) -> Any:
        """What `run` returns; once captured always the same tensors."""
        if self._pool is None or not self._pool.usable or not self._warm:
            self._warm = True
            self._graph = None
            return self._run()
        if self._graph is None and not self._capture():
            return self._run()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self) -> bool:
        assert self._pool is not None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        cause: RuntimeError | None = None
        try:
            # thread_local: other threads, a server's, may use the device meanwhile
            with (
                recorded() as used,
                torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = self._run()
                except RuntimeError as error:
                    cause = error
                    raise
        except RuntimeError as error:
            if error is not cause:  # the capture could not even be ended
                torch.cuda.set_stream(stream)
                self._pool.abandon()
            self._pool = None
            reason = str(cause or error).splitlines()[0]
            log.warning("%s cannot be captured and runs without a graph: %s", self._name, reason)
            return False
        # compiled code owns constants that the graph reads: it must outlive torch._dynamo.reset()
        self._kept = used
        self._graph = graph
        return True
