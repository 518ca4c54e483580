"""Where the parts of ranks begin, and the models that are not split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qoqc.errors import Unsupported
from qoqc.parallel.plan import cuts
from qoqc.parallel.ranks import Ranks
from qoqc.shapes import SHAPES
from qoqc.testing import tiny_config

SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 384, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1},
}


def skeleton(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **{**SIZES, **changes}))


def found(model: Any, size: int, leaf: str) -> list[tuple[str, int, int]]:
    """The parts of the first linear of that name, by rank."""
    parts: list[tuple[str, int, int]] = []
    for rank in range(size):
        of_rank = cuts(model, Ranks(rank, size, torch.device("cpu")))
        (cut,) = [cut for path, cut in of_rank.items() if path.endswith(leaf)][:1]
        parts.append((cut.axis, cut.start, cut.stop))
    return parts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "cohere", "phi", "starcoder2"])
def test_heads_and_groups_stay_whole(family: str) -> None:
    model = skeleton(family)
    assert found(model, 2, "q_proj") == [("rows", 0, 128), ("rows", 128, 256)]
    assert found(model, 2, "k_proj") == [("rows", 0, 64), ("rows", 64, 128)]
    down = {"phi": "fc2", "starcoder2": "c_proj"}.get(family, "down_proj")
    up = {"phi": "fc1", "starcoder2": "c_fc"}.get(family, "up_proj")
    # 384 channels are three groups of 128: one for the first rank, two for the second
    assert found(model, 2, down) == [("columns", 0, 128), ("columns", 128, 384)]
    assert found(model, 2, up) == [("rows", 0, 128), ("rows", 128, 384)]


def test_a_fused_projection_is_cut_between_heads() -> None:
    model = skeleton("gpt_neox", head_dim=None)
    assert found(model, 2, "query_key_value") == [("rows", 0, 384), ("rows", 384, 768)]
    assert found(model, 2, "attention.dense") == [("columns", 0, 128), ("columns", 128, 256)]


def test_plans_that_gather_and_split_again() -> None:
    model = skeleton("phi3")
    parts = cuts(model, Ranks(1, 2, torch.device("cpu")))
    qkv = parts["model.layers.0.self_attn.qkv_proj"]
    down = parts["model.layers.0.mlp.down_proj"]
    assert (qkv.axis, qkv.start, qkv.stop, qkv.whole_outside) == ("rows", 256, 512, True)
    assert (down.axis, down.start, down.stop, down.whole_outside) == ("columns", 128, 384, True)


def test_shapes_of_real_models_are_split_completely() -> None:
    for name, sizes in SHAPES.items():
        with torch.device("meta"):
            config = AutoConfig.for_model(**{**sizes, "num_hidden_layers": 1})
            model = AutoModelForCausalLM.from_config(config)
        for size in (2, 4):
            for path, module in model.named_modules():
                if isinstance(module, torch.nn.Linear):
                    parts = found(model, size, path)
                    ends = [stop for _, _, stop in parts]
                    assert [start for _, start, _ in parts] == [0, *ends[:-1]], (name, path)
                    whole = module.weight.shape[0 if parts[0][0] == "rows" else 1]
                    assert ends[-1] == whole
                    # no rank has more than one group of 128 more than another
                    widths = [stop - start for _, start, stop in parts]
                    assert max(widths) - min(widths) <= 128


def test_the_head_is_split_unless_it_is_the_table() -> None:
    two = Ranks(1, 2, torch.device("cpu"))
    head = cuts(skeleton("llama"), two)["lm_head"]
    assert (head.axis, head.start, head.stop, head.whole_outside) == ("rows", 192, 384, True)
    assert "lm_head" not in cuts(skeleton("llama", tie_word_embeddings=True), two)
    assert "lm_head" not in cuts(skeleton("llama", vocab_size=383), two)


def test_one_rank_has_everything() -> None:
    assert cuts(skeleton("llama"), Ranks(0, 1, torch.device("cpu"))) == {}


@pytest.mark.parametrize(
    ("family", "changes", "size", "message"),
    [
        # heads
        ("llama", {}, 4, r"o_proj: 2 KV heads cannot be divided among 4 ranks"),
        ("llama", {"num_key_value_heads": 1}, 2, r"o_proj: 1 KV heads cannot be divided among 2"),
        # groups of input channels
        (
            "llama",
            {"head_dim": 32},
            2,
            r"o_proj: 128 input channels in 2 parts of 64, which is not a multiple of 128",
        ),
        (
            "llama",
            {"intermediate_size": 128},
            2,
            r"down_proj: 128 input channels are 1 groups of 128, fewer than 2 ranks",
        ),
        ("phi3", {"num_attention_heads": 6}, 3, r"qkv_proj: 640 output channels cannot be divided"),
        # models
        ("gpt2", {}, 2, r"GPT2LMHeadModel: transformers has no tensor-parallel plan"),
        ("mixtral", {}, 2, r"experts.*'packed_colwise', which qoqc does not know"),
    ],
)
def test_refusals_name_the_layer_and_the_sizes(
    family: str, changes: dict[str, Any], size: int, message: str
) -> None:
    model = skeleton(family, **changes) if family != "gpt2" else _gpt2()
    with pytest.raises(Unsupported, match=message):
        cuts(model, Ranks(0, size, torch.device("cpu")))


def _gpt2() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("gpt2"))
