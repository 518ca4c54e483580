"""What the weight step decides is what an artifact holds and runs with, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qoqc
from qoqc.artifact.load import load_model
from qoqc.calibrate.hessian import Hessian
from qoqc.calibrate.weight_step import WeightOptions, quantize_linear
from qoqc.config import Options
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.runtime.weights import STORE, WeightRef
from qoqc.testing import VOCAB, tiny_model


def calibrated(model: Any, options: WeightOptions) -> dict[str, torch.Tensor]:
    """Quantize every linear but the head on random tokens; the values decided, by Parameter."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    seen = {name: Hessian(module.in_features, name) for name, module in linears.items()}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, h=seen[name]: h.add(given[0]))
        for name, module in linears.items()
    ]
    tokens = torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    decided = {}
    for name, module in linears.items():
        found = quantize_linear(module.weight, seen[name].matrix(), options, name)
        STORE.adopt(WeightRef(module.weight, False, f"{name}.weight"), found.packed)
        decided[f"{name}.weight"] = dequantize_weight(found.packed)
    return decided


@pytest.mark.parametrize("group_size", [128, -1])
def test_saved_loaded_and_dequantized_it_is_the_same(tmp_path: Path, group_size: Any) -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    decided = calibrated(model, WeightOptions(group_size))
    options = Options.parse({"group_size": group_size})
    manifest = qoqc.save(model, tmp_path / "artifact", options=options)
    assert set(manifest.weights) == set(decided)
    loaded, _ = load_model(tmp_path / "artifact")
    for name, values in decided.items():
        packed = STORE.packed(loaded.get_parameter(name))
        assert packed is not None
        assert torch.equal(dequantize_weight(packed), values), name
        plain = dequantize_weight(quantize_weight(model.get_parameter(name), group_size))
        assert not torch.equal(values, plain), "and it is not rounding to nearest"
