"""The backend as torch.compile users meet it: by name, with options, errors, changing weights."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import qoqc
from qoqc import pipeline
from qoqc.backend import MAX_GRAPHS
from qoqc.errors import StaleWeights
from qoqc.runtime.weights import STORE
from qoqc.testing import VOCAB, sqnr, tiny_model

EAGER = {"glue": "eager"}


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()
    pipeline.reports.clear()


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids() if tokens is None else tokens, use_cache=False).logits
    return out


def test_found_by_name() -> None:
    assert "qoq" in torch._dynamo.list_backends()
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="qoq", options=EAGER)
    assert 5 < sqnr(logits(model), logits(compiled)) < 40
    assert pipeline.reports[-1].counts["linear"] == 14


def test_options_reach_the_backend() -> None:
    model = tiny_model("llama")
    options = {**EAGER, "exclude": ["*.mlp.*"], "group_size": -1}
    per_channel = logits(torch.compile(model, backend="qoq", options=options))
    report = pipeline.reports[-1]
    assert report.counts["linear"] == 8
    assert sum(refusal.reason == "excluded" for refusal in report.refusals) == 6
    torch._dynamo.reset()
    options["group_size"] = 128
    grouped = logits(torch.compile(model, backend="qoq", options=options))
    assert not torch.equal(per_channel, grouped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groupsize": 128}, "unknown option 'groupsize'; qoqc knows artifact, dump"),
        ({"group_size": 64}, "option group_size=64: expected one of 128, -1"),
        ({"glue": "eager", "strict": "yes"}, "option strict='yes': expected True or False"),
    ],
)
def test_bad_options_surface(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(tiny_model("llama"), backend="qoq", options=options)
    with pytest.raises(BackendCompilerFailed, match="OptionError") as error:
        logits(compiled)
    assert message in str(error.value)


def test_gradients_are_refused() -> None:
    compiled = torch.compile(tiny_model("llama"), backend="qoq", options=EAGER)
    with pytest.raises(BackendCompilerFailed, match="inference only") as error:
        compiled(ids(), use_cache=False)
    assert "torch.no_grad() or torch.inference_mode()" in str(error.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(mode: Callable[[], Any]) -> None:
    compiled = torch.compile(tiny_model("llama"), backend="qoq", options=EAGER)
    expected = logits(compiled)
    with mode():
        got = compiled(ids(), use_cache=False).logits
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_frozen_parameters_need_no_context() -> None:
    model = tiny_model("llama").requires_grad_(False)
    compiled = torch.compile(model, backend="qoq", options=EAGER)
    assert not compiled(ids(), use_cache=False).logits.requires_grad


def test_strict_surfaces() -> None:
    compiled = torch.compile(
        tiny_model("mixtral"), backend="qoq", options={**EAGER, "strict": True}
    )
    with pytest.raises(BackendCompilerFailed, match="strict: .*experts are one 3-D parameter"):
        logits(compiled)


def test_generate_on_the_wrapper_warns() -> None:
    compiled: Any = torch.compile(tiny_model("llama"), backend="qoq", options=EAGER)
    with pytest.warns(UserWarning, match=r"runs the uncompiled model.*qoqc\.compile\(model\)"):
        compiled.generate(ids(), max_new_tokens=2)
    assert not pipeline.reports


def test_generate_of_other_backends_does_not_warn() -> None:
    compiled: Any = torch.compile(tiny_model("llama"), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled.generate is not None


def scaled(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def loaded(model: Any) -> None:
    other = {k: v.flip(0) if k.endswith("up_proj.weight") else v for k, v in state(model).items()}
    model.load_state_dict(other)


def assigned(model: Any) -> None:
    other = {k: v * 2 if k.endswith("v_proj.weight") else v for k, v in state(model).items()}
    model.load_state_dict(other, assign=True)


def repointed(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.flip(1)


def replaced(model: Any) -> None:
    linear = model.model.layers[1].self_attn.q_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().flip(0))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("change", [scaled, loaded, assigned, repointed, replaced])
def test_changed_weights_are_never_stale(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="qoq", options=EAGER)
    before = logits(compiled)
    change(model)
    after = logits(compiled)
    twin = tiny_model("llama")
    change(twin)
    torch._dynamo.reset()
    expected = logits(torch.compile(twin, backend="qoq", options=EAGER))
    assert torch.equal(after, expected)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_layers_behind_a_graph_break_keep_their_weights() -> None:
    """A break inside a layer makes Dynamo run one graph with the weights of every layer."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            out: torch.Tensor = x + self.down(self.up(x).relu())
            return out

    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*(Block() for _ in range(3))).requires_grad_(False)
    x = torch.randn(4, 64)
    expected = x
    for block in blocks:
        torch._dynamo.reset()
        fresh = torch.compile(block, backend="qoq", options=EAGER)
        expected = fresh(expected)
    torch._dynamo.reset()
    pipeline.reports.clear()
    compiled = torch.compile(blocks, backend="qoq", options=EAGER)
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
    assert sum(report.counts["linear"] for report in pipeline.reports) < 6


def test_release() -> None:
    """Storage goes, eager reads are NaN, both graphs run on, saving the values is too late."""
    kept = qoqc.compile(tiny_model("llama"), **EAGER)
    expected = kept.generate(ids(), max_new_tokens=4, do_sample=False)
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama"), release=True, **EAGER)
    pipeline.reports.clear()
    for _ in range(2):
        assert torch.equal(model.generate(ids(), max_new_tokens=4, do_sample=False), expected)
    assert len(pipeline.reports) == 2
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.isnan().all()
    assert STORE.is_released(weight)
    assert not STORE.is_released(model.lm_head.weight)
    assert not model.model.embed_tokens.weight.isnan().any()
    # another batch size needs a third graph, made from the packed weights alone
    assert model.generate(ids().repeat(2, 1), max_new_tokens=2).shape == (2, 9)


def test_released_then_changed_is_an_error() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="qoq", options={**EAGER, "release": True})
    logits(compiled)
    scaled(model)
    with pytest.raises(StaleWeights, match=r"layers\.0\.self_attn\.k_proj\.weight has no 16-bit"):
        logits(compiled)


def test_released_then_assigned_works() -> None:
    model, saved = tiny_model("llama"), state(tiny_model("llama"))
    compiled = torch.compile(model, backend="qoq", options={**EAGER, "release": True})
    before = logits(compiled)
    model.load_state_dict(saved, assign=True)
    assert torch.equal(logits(compiled), before)
    assert model.model.layers[0].mlp.up_proj.weight.isnan().all()


def test_released_mla_decodes() -> None:
    """kv_b_proj is read in 16 bit at every step, so no graph may have packed it."""
    model = qoqc.compile(tiny_model("deepseek_v3"), release=True, **EAGER)
    out = model.generate(ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 10)
    assert not model.model.layers[0].self_attn.kv_b_proj.weight.isnan().any()


def test_inductor() -> None:
    """The rest of the graph through Inductor: prefill and decode give eager glue's logits."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    expected = step_logits(qoqc.compile(tiny_model("llama", **sizes), **EAGER))
    torch._dynamo.reset()
    got = step_logits(qoqc.compile(tiny_model("llama", **sizes)))
    for step, (want, have) in enumerate(zip(expected, got, strict=True)):
        assert sqnr(want, have) > 30, f"step {step}"


def step_logits(model: Any) -> tuple[torch.Tensor, ...]:
    """The logits of six greedy steps: one prefill, five decode."""
    out = model.generate(
        ids(),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits: tuple[torch.Tensor, ...] = out.logits
    return logits


def test_threads_see_the_limits_of_the_backend() -> None:
    torch.compile(torch.nn.Linear(8, 8).requires_grad_(False), backend="qoq")(torch.randn(2, 8))
    seen: list[tuple[int, bool]] = []

    def look() -> None:
        config: Any = torch._dynamo.config
        seen.append((config.recompile_limit, config.specialize_float))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(MAX_GRAPHS, True)]
