"""Attention of many queries over pages as the tuner sees it: its forms, the heuristic's choice."""

from __future__ import annotations

from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER
from qoqc.codegen.kernels.attention_prefill import ATTENTION_PREFILL
from qoqc.ir.spec import AttentionSpec, to_json
from qoqc.runtime.device import DeviceKey

FORMS = (ATTENTION_HOPPER, ATTENTION_PREFILL)


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> tuple[Family, Tile]:
    """The hopper form where it does not refuse, but for exact tokens behind the pages.

    Those it has not been timed with: its tests for a GPU (test_attention_hopper.py) hold it to the
    definition, and a search may choose it.
    """
    taken = ATTENTION_HOPPER.refuses(spec, device) is None and not spec.has_chunk
    form = ATTENTION_HOPPER if taken else ATTENTION_PREFILL
    return form, form.heuristic(spec, size, device)


ATTENTION = Op("attention_prefill", FORMS, heuristic, to_json)
