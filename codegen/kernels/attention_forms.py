"""Attention of many queries over pages as the tuner sees it: its forms, the heuristic's choice."""

from __future__ import annotations

from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER
from qoqc.codegen.kernels.attention_prefill import ATTENTION_PREFILL
from qoqc.ir.spec import AttentionSpec, to_json
from qoqc.runtime.device import DeviceKey

FORMS = (ATTENTION_HOPPER, ATTENTION_PREFILL)


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> tuple[Family, Tile]:
    """The hopper form where it runs: the plain one takes two to four times as long (H200)."""
    form = ATTENTION_HOPPER if faster_than_flash(spec, device) else ATTENTION_PREFILL
    return form, form.heuristic(spec, size, device)


def faster_than_flash(spec: AttentionSpec, device: DeviceKey) -> bool:
    """Whether reading a prompt from pages takes less time than torch's flash attention over it.

    1 x 8,192 tokens, 32 query and 8 KV heads of 128 channels on an H200: the hopper form takes
    886 us, flash attention 1,730 and the plain form 2,620.
    """
    return ATTENTION_HOPPER.refuses(spec, device) is None


ATTENTION = Op("attention_prefill", FORMS, heuristic, to_json)
