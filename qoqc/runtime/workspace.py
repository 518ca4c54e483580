"""Zeroed counters for kernels whose blocks meet: never shared by launches that may overlap."""

from __future__ import annotations

import threading

import torch

RESERVE = 1 << 20
"""Counters kept ready per device for CUDA graphs: 4 MiB, thousands of launches."""

ALIGNED = 4
"""Counters in 16 bytes: Triton compiles a kernel anew for a pointer that is not aligned to them,
maybe in the middle of a capture."""

_BY_STREAM: dict[tuple[torch.device, int], torch.Tensor] = {}
_RESERVES: dict[torch.device, tuple[torch.Tensor, int]] = {}
_LOCK = threading.Lock()


def zeroed_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros on `device`, aligned to 16 bytes; the kernel leaves them zeros.

    Launches on one stream follow one another and share theirs. A launch that is being captured
    gets counters of its own, because graphs may be replayed side by side on any stream; they come
    from a reserve, since zeroing them in the graph would be one more node to replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _LOCK:
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, count)
        if device not in _RESERVES:
            _RESERVES[device] = (torch.zeros(RESERVE, dtype=torch.int32, device=device), 0)
            # a graph may be captured and replayed on another stream at once
            torch.cuda.current_stream(device).synchronize()
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        found = _BY_STREAM.get(key)
        if found is None or found.numel() < count:
            found = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            _BY_STREAM[key] = found
        return found


def _captured(device: torch.device, count: int) -> torch.Tensor:
    count = -(-count // ALIGNED) * ALIGNED
    reserve, used = _RESERVES.get(device, (None, 0))
    if reserve is None or used + count > reserve.numel():
        return torch.zeros(count, dtype=torch.int32, device=device)
    _RESERVES[device] = (reserve, used + count)
    return reserve[used : used + count]
