from __future__ import annotations

import json

import torch

from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.tuning.table import look_up, shipped
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey


def test_every_shipped_entry_is_one_that_is_taken() -> None:
    # a form whose candidates change would otherwise lose its entries without a word
    entries = {key: value for key, value in shipped().items() if json.loads(key)["op"] == GEMM.name}
    assert len(entries) > 100
    for key, (form, tile) in entries.items():
        parts = json.loads(key)
        spec = LinearSpec(**parts["spec"], dtype=torch.bfloat16)
        found = look_up(GEMM, spec, parts["size"], DeviceKey(**parts["device"]))
        assert found is not None, key
        assert (found[0].name, found[1]) == (form, tile), key
