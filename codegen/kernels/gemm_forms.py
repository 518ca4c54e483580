"""The W4A8 GEMM as the tuner sees it: every form of its kernel, and the heuristic's choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.kernels.gemm_hopper_tiles import GEMM_HOPPER
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.kernels.gemm_ways import GEMM_WAYS
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey

FORMS = (GEMM_HOPPER, GEMM_PLAIN, GEMM_WAYS)

FEW_TOKENS = 16
"""Up to here the split of K inside a block is taken without a search: 6.1 us against 8.2 of the
plain form at M=1, N=K=4096 on an H200."""


def heuristic(spec: LinearSpec, size: int, device: DeviceKey) -> tuple[Family, Tile]:
    """On sm_90 the hopper form, elsewhere the ways form for a few tokens, else the plain one."""
    if GEMM_HOPPER.refuses(spec, device) is None:
        form = GEMM_HOPPER
    else:
        form = GEMM_WAYS if size <= FEW_TOKENS else GEMM_PLAIN
    return form, form.heuristic(spec, size, device)


def table_spec(spec: LinearSpec) -> dict[str, Any]:
    """What a choice depends on: the epilogue's variants and dtypes share an entry."""
    return {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "group_size": spec.group_size,
    }


def timed(spec: LinearSpec) -> LinearSpec:
    """The one whose results equal the reference bit for bit: without SiLU, whose exp may not."""
    return dataclasses.replace(spec, glu=False)


GEMM = Op("w4a8_linear", FORMS, heuristic, table_spec, timed)
