"""The pipeline as a whole on one decoder: counts, strict, dumps, verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from qoqc.errors import Unsupported, VerifyError
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.testing import VOCAB, capture, context, run_graph, targets, tiny_model

IDS = torch.arange(3, 9)[None]


def run(family: str, **options: Any) -> tuple[GraphModule, Context]:
    gm, inputs = capture(tiny_model(family), IDS, use_cache=False)
    ctx = context(gm, inputs, **options)
    manager.run(gm, ctx)
    return gm, ctx


def test_llama() -> None:
    gm, ctx = run("llama")
    after = targets(gm)
    # per layer: q, k, v in one; o; gate and up in one; down
    assert ctx.counts["linear"] == 14
    assert (after["w4a8_linear"], after["w4a8_glu"]) == (6, 2)
    # of the inputs of a layer's four, two are norms, one silu(gate) * up, one attention's output
    assert (after["norm_quant"], after["act_quant"], after["quantize_act"]) == (4, 0, 4)
    assert after["linear"] == 1
    assert run_graph(gm, ctx)[0].shape == (1, 6, VOCAB)
    assert list(ctx.counts) == [step.__name__ for step in manager.PIPELINE]


def test_siblings_of_gpt_neox_differ_in_input() -> None:
    """Attention and MLP run in parallel behind different norms: nothing to merge or share."""
    gm, ctx = run("gpt_neox")
    assert ctx.counts["merge"] == ctx.counts["share_quant"] == 0
    assert targets(gm)["w4a8_linear"] == 8


def test_strict_names_every_refusal_and_how_to_go_on() -> None:
    with pytest.raises(Unsupported) as error:
        run("mixtral", strict=True)
    text = str(error.value)
    assert "model.layers.0.mlp.experts.gate_up_proj: experts are one 3-D parameter" in text
    assert "model.layers.1.mlp.experts.down_proj" in text
    assert "router" not in text and "lm_head" not in text
    assert "Exclude them, or compile without strict" in text


def test_strict_accepts_what_rules_keep() -> None:
    assert run("llama", strict=True, exclude=["*.o_proj"])[1].counts["linear"] == 12


def test_dumps_are_numbered_pairs(tmp_path: Path) -> None:
    run("gpt_neox", dump=str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "graph").iterdir())
    assert names[:2] == ["00-normalize.after.py", "00-normalize.before.py"]
    assert len(names) == 2 * len(manager.PIPELINE)
    number = [step.__name__ for step in manager.PIPELINE].index("linear")
    stem = tmp_path / "graph" / f"{number:02d}-linear"
    assert "w4a8_linear" in stem.with_suffix(".after.py").read_text()
    assert "w4a8_linear" not in stem.with_suffix(".before.py").read_text()


def test_a_pass_that_loses_a_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(gm: GraphModule, ctx: Context) -> int:
        gm.graph.eliminate_dead_code()
        return 0

    def count(counter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x * 2

    gm, inputs = capture(count, torch.zeros(1), torch.ones(2))
    monkeypatch.setattr(manager, "PIPELINE", (careless,))
    with pytest.raises(VerifyError, match="in-place operations changed"):
        manager.run(gm, context(gm, inputs))
