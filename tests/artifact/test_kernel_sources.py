"""An artifact names every kernel that its model will ask for, on a GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

import qoqc
from qoqc import pipeline
from qoqc.artifact.kernel_sources import NOMINAL, Wanted, choices
from qoqc.artifact.survey import survey
from qoqc.codegen import dispatch
from qoqc.codegen.aot import Recorder
from qoqc.codegen.build import runs
from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.pair import pair
from qoqc.codegen.tuning import choose
from qoqc.config import Options
from qoqc.ir.spec import AttentionSpec
from qoqc.ir.windowed import window_attention
from qoqc.testing import tiny_model

H100 = NOMINAL[-1]


class NoKernel(Recorder):
    """What dispatch gets to launch: writes nothing, so that all outputs are arbitrary."""

    def __init__(self, family: Family, tile: Tile) -> None:
        super().__init__(tile)
        self.family = family


class Asked:
    """Runs compiled graphs through dispatch as on an H100 and notes the kernels it asks for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: set[tuple[str, Any]] = set()
        patch.setattr(dispatch, "kernel_for", self._kernel_for)
        patch.setattr(dispatch, "_runs", lambda name, spec, _: runs(name, spec, H100))
        patch.setattr(pipeline, "lower", self._lower)

    def _kernel_for(self, op: Op, spec: Any, size: int, device: torch.device) -> NoKernel:
        family, tile = choose.known(op, spec, size, H100)
        self.kernels.add((family.name, spec))
        return NoKernel(family, tile)

    @staticmethod
    def _lower(gm: GraphModule, bound: dict[Node, torch.Tensor], *_: Any) -> int:
        """As for a GPU, where the functions of dispatch stand behind the ops."""
        count = pair(gm)
        for node in gm.graph.nodes:
            op = getattr(node.target, "_schema", None)
            # torch's flash attention stands behind that one everywhere
            if node.target is not window_attention and op and op.name.startswith("qoqc::"):
                node.target = dispatch.IMPLEMENTATIONS[op.name.removeprefix("qoqc::")]
        gm.recompile()
        return count


def asked(model: Any, patch: pytest.MonkeyPatch, **options: Any) -> set[tuple[str, Any]]:
    """What three generations ask for: prompts within and beyond windows and pages, padding."""
    found = Asked(patch)
    torch._dynamo.reset()
    qoqc.compile(model, glue="eager", release=False, **options)
    for count, padding in ((5, 0), (70, 0), (12, 4)):
        ids = torch.randint(3, 300, (1 + bool(padding), count))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
    return found.kernels


@pytest.mark.parametrize(
    ("family", "sizes", "options"),
    [
        ("gemma2", {}, {"kv_layers": (8, 4)}),
        pytest.param("gemma3_text", {}, {}, marks=pytest.mark.slow),
        ("gpt_oss", {"head_dim": 64}, {}),
        pytest.param(
            "gpt_oss", {}, {"kv_layers": (16, 4), "prefill_kv": "quantized"}, marks=pytest.mark.slow
        ),
        ("mistral", {}, {"kv_bits": 8}),
        pytest.param("qwen3", {}, {}, marks=pytest.mark.slow),
    ],
)
def test_all_that_dispatch_asks_for(
    family: str, sizes: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, torch.bfloat16, **sizes)
    kernels = survey(model, Options.parse(options)).kernels
    named = {(each.family.name, each.wanted.spec) for each in choices(kernels, (H100,))}
    found = asked(model, monkeypatch, **options)
    assert {"step_attend", "kv_rotate_append", "few_linear"} <= {name for name, _ in found}
    assert found - named == set()
    specials = {spec.has_softcap or spec.has_sinks for n, spec in found if n == "step_attend"}
    assert specials == {family in ("gemma2", "gpt_oss")}
    windows = {spec.has_window for name, spec in found if name == "step_attend"}
    # what is made of a 16-bit layer's length stays a mask
    assert (True in windows) == (family != "qwen3" and 16 not in options.get("kv_layers", ()))


def test_a_prompt_with_sinks_is_read_by_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for sm_90 takes neither windows, for prompts longer than them, nor masks."""
    found = asked(tiny_model("gpt_oss", torch.bfloat16, head_dim=64), monkeypatch)
    specs = [(name, spec) for name, spec in found if isinstance(spec, AttentionSpec)]
    prompts = {(name, spec.has_window, spec.has_mask) for name, spec in specs}
    assert prompts == {
        ("attention_unpack", False, False),
        ("attention_hopper", False, False),
        ("attention_prefill", True, False),
        ("attention_prefill", False, True),
        ("attention_prefill", True, True),
    }


def test_a_survey_leaves_a_model_the_attention_it_had() -> None:
    model = tiny_model("gemma2", torch.bfloat16)
    before = model.config._attn_implementation
    ids = torch.randint(3, 300, (1, 9))
    with torch.no_grad():
        wanted = model(ids).logits
        kernels = survey(model, Options()).kernels
        assert torch.equal(model(ids).logits, wanted)
    assert model.config._attn_implementation == before
    assert any(_is_capped(kernel) for kernel in kernels)
    assert not any(map(_is_capped, survey(model, Options(kv_bits=16)).kernels))


def _is_capped(kernel: Wanted) -> bool:
    return bool(getattr(kernel.spec, "has_softcap", False))
