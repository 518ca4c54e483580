"""Attention of many queries over pages as the tuner sees it: its forms, the heuristic's choice."""

from __future__ import annotations

from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER
from qoqc.codegen.kernels.attention_prefill import ATTENTION_PREFILL
from qoqc.ir.spec import AttentionSpec, to_json
from qoqc.runtime.device import DeviceKey

FORMS = (ATTENTION_HOPPER, ATTENTION_PREFILL)


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> tuple[Family, Tile]:
    """The plain form. The hopper form has not been timed: a search may choose it.

    Of its tests for a GPU (test_attention_hopper.py) all that ran passed, in a run cut short.
    """
    return ATTENTION_PREFILL, ATTENTION_PREFILL.heuristic(spec, size, device)


ATTENTION = Op("attention_prefill", FORMS, heuristic, to_json)
