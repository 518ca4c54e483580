"""Families whose models make their own masks or inputs for generate() run in the decode loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomForCausalLM,
)

import qoqc
from qoqc import pipeline
from qoqc.decode import loop
from qoqc.runtime.kv_layers import KV4Layer
from qoqc.testing import scramble

WINDOW, PROMPT, NEW = 8, 20, 10

IDS = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"max_position_embeddings": 512, **IDS},
}
ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA4 = {**TEXT, **ALTERNATING, "global_head_dim": 32}
PER_LAYER = {
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384},
    "num_kv_shared_layers": 0,
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "patch_size": 8},
    **{"num_attention_heads": 2, "image_size": 16},
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}


class Family(NamedTuple):
    """A composite config, and the layers whose masks become arguments in its decode graph."""

    kind: str
    config: dict[str, Any]
    windows: int = 2


FAMILIES = {
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {**TEXT, **ALTERNATING},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 383,
        },
    ),
    "gemma4": Family(
        "gemma4",
        {"text_config": {**GEMMA4, **PER_LAYER}, "vision_config": None, "audio_config": None},
    ),
    "gemma4_unified": Family("gemma4_unified", {"text_config": GEMMA4}),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": {**TEXT, "model_type": "gemma"},
            **{"vision_config": SIGLIP, "projection_dim": 128, "image_token_index": 383},
        },
    ),
    "paligemma2": Family(
        "paligemma",
        {
            "text_config": {**TEXT, "model_type": "gemma2", "sliding_window": WINDOW},
            **{"vision_config": SIGLIP, "projection_dim": 128, "image_token_index": 383},
        },
    ),
    "molmo2": Family("molmo2", {"text_config": TEXT}),
    "hrm_text": Family(
        "hrm_text",
        {
            **TEXT,
            **{"num_hidden_layers": 4, "num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 1},
            "prefix_lm": True,
        },
        4,
    ),
    "doge": Family("doge", TEXT, 0),  # its masks depend on the values
    "bloom": Family("bloom", {**IDS, "hidden_size": 128, "n_layer": 2, "n_head": 4}, 0),  # alibi
}


def made(family: str) -> Any:
    """A tiny random model; skips where the installed transformers cannot run it.

    BLOOM fails with any static cache before 5.23, which gave it masks of its own.
    """
    kind, config, _ = FAMILIES[family]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if kind == "bloom" and not hasattr(BloomForCausalLM, "create_masks_for_generate"):
        pytest.skip(f"transformers {transformers.__version__}: BLOOM fails with any static cache")
    parsed = AutoConfig.for_model(kind, **config)
    images = any(name in config for name in ("text_config", "vision_config"))
    loader: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = loader.from_config(parsed).eval()
    scramble(model)
    return model


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    pipeline.reports.clear()
    return qoqc.compile(model, glue="eager")


def generated(model: Any, batch: int, prompt: int, padding: int, **more: Any) -> Any:
    """Greedy tokens and logits behind random prompts, the first with padding in front."""
    ids = torch.randint(3, 380, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    options = {
        **{"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)},
        **{"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW},
        **{"output_logits": True, "return_dict_in_generate": True},
    }
    return model.generate(**{**options, **more})


class Loops:
    """Which loop serves; transformers' own on demand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self.ours = patch, 0
        generate = loop.generate

        def counted(*args: Any) -> Any:
            self.ours += 1
            return generate(*args)

        patch.setattr(loop, "generate", counted)

    def theirs(self, *args: Any, **kwargs: Any) -> Any:
        ours = self.ours
        with self._patch.context() as patch:
            patch.setattr(loop, "refusal", lambda *_: "for comparison")
            result = generated(*args, **kwargs)
        assert self.ours == ours
        return result


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Loops:
    return Loops(monkeypatch)


def assert_same(got: Any, wanted: Any) -> None:
    """Tokens are equal; logits, too, but for the order of sums (masks against windows)."""
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(wanted.logits), rtol=1e-3, atol=1e-3
    )


KINDS = [(1, PROMPT, 0), (1, PROMPT, 4), (3, PROMPT, 0), (3, PROMPT, 4)]
LATER = [(1, PROMPT + 9, 0), (5, PROMPT + 3, 0), (1, PROMPT - 4, 2), (2, PROMPT + 40, 11)]


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILIES][1:])]
)
def test_tokens_are_those_of_transformers_loop(
    family: str, loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 1 and 3, padded and not; then other lengths and batches compile nothing more."""
    model = compiled(made(family))
    results = [generated(model, *kind) for kind in KINDS]
    decode = pipeline.reports[1]
    assert decode.counts.get("windows", 0) == FAMILIES[family].windows
    graphs = counters["stats"]["unique_graphs"]
    # a prompt and a step of each kind
    assert graphs == 2 * len(KINDS)
    for kind in LATER:
        generated(model, *kind)
        assert counters["stats"]["unique_graphs"] == graphs, kind
    assert loops.ours == len(KINDS + LATER)
    if family == "paligemma2":
        # its forward takes no masks that generate() made for several kinds of layers: none are
        monkeypatch.setattr(KV4Layer, "is_compileable", False)
    for kind, got in zip(KINDS, results, strict=True):
        assert_same(got, loops.theirs(model, *kind))


TYPES = {
    "an image": ("gemma3", slice(5, 9), 1),
    "an image at the end": ("gemma3", slice(PROMPT - 4, PROMPT), 1),
    "a prefix": ("paligemma", slice(12, PROMPT), 1),
    "a prefix and windows": ("paligemma2", slice(0, 0), 1),
    "a block": ("hrm_text", slice(2, 14), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tokens", "kind"), TYPES.values(), ids=list(TYPES))
def test_kinds_of_tokens_change_the_masks_of_the_prompt(
    family: str, tokens: slice, kind: int, loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some see each other both ways, in the first prompt; the steps behind it are as ever."""
    model = compiled(made(family))
    types = torch.zeros(3, PROMPT, dtype=torch.long)
    types[:, tokens] = kind
    plain = generated(model, 3, PROMPT, 2)
    got = generated(model, 3, PROMPT, 2, token_type_ids=types)
    assert loops.ours == 2
    assert (got.logits[0] - plain.logits[0]).abs().max() > 1e-2
    if family != "paligemma2":
        assert_same(got, loops.theirs(model, 3, PROMPT, 2, token_type_ids=types))
    # every mask made by the forward, from the mask of the tokens
    monkeypatch.setattr(KV4Layer, "is_compileable", False)
    assert_same(got, loops.theirs(model, 3, PROMPT, 2, token_type_ids=types))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_images_are_the_prompts_alone(family: str, loops: Loops) -> None:
    """What a processor gives for images goes into the prompt; the steps behind it are text."""
    model = compiled(made(family))
    for batch, padding in [(1, 0), (3, 4)]:
        ids = torch.full((batch, PROMPT), 7)
        ids[:, 6:10] = 383
        types = (ids == 383).long()
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        given = {"attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}
        got = generated(model, batch, PROMPT, 0, input_ids=ids, **given)
        assert_same(got, loops.theirs(model, batch, PROMPT, 0, input_ids=ids, **given))
        given["pixel_values"] = pixels.flip(-1)
        other = loops.theirs(model, batch, PROMPT, 0, input_ids=ids, **given)
        assert not torch.equal(got.logits[0], other.logits[0])
    assert loops.ours == 2


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_running_the_steps(loops: Loops) -> None:
    torch._dynamo.reset()
    plain = qoqc.compile(made("gemma3").to("cuda", torch.bfloat16), graphs=False)
    model = qoqc.compile(made("gemma3").to("cuda", torch.bfloat16))
    kinds = [(1, PROMPT, 0), (3, PROMPT, 4), (1, PROMPT + 90, 0)]
    for kind in kinds:
        tokens = [
            generated(each, *kind, output_logits=False).sequences for each in (plain, model, model)
        ]
        assert torch.equal(tokens[0], tokens[1]), kind
        assert torch.equal(tokens[0], tokens[2]), kind
    assert loops.ours == 3 * len(kinds)
    steps = model.qoqc_steps._by_cache.values()
    assert all(each.captured for some in steps for each in some._forwards.values())
