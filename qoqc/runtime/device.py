"""What a GPU is, as far as kernels care: the key under which tile choices are remembered."""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class DeviceKey:
    """A GPU model: compute capability (90 = sm_90), SM count, shared memory per block in bytes."""

    name: str
    arch: int
    sm_count: int
    shared_bytes: int


def device_key(device: torch.device) -> DeviceKey:
    """The key of a CUDA device; a stand-in for an sm_80 part where kernels are interpreted."""
    if device.type != "cuda":
        return DeviceKey("interpreter", 80, 1, 163 * 1024)
    props = torch.cuda.get_device_properties(device)
    return DeviceKey(
        props.name,
        props.major * 10 + props.minor,
        props.multi_processor_count,
        int(getattr(props, "shared_memory_per_block_optin")),  # noqa: B009 (not in torch's stubs)
    )


@functools.cache
def sm_count(device: torch.device) -> int:
    """The SMs of a device, looked up once: launches ask."""
    return device_key(device).sm_count


def may_start_early(device: torch.device) -> bool:
    """Whether weights may be read before the kernel before has ended: while a graph is captured.

    A graph replays long after its weights were written; outside of one, the kernel that packed
    them may be the one before.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
