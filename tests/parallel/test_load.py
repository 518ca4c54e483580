"""A split model in one process: its graphs, what it refuses (results: test_two_ranks.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import qoqc
from qoqc.artifact.save import save
from qoqc.bench.random_model import packed_model
from qoqc.errors import OptionError, Unsupported
from qoqc.parallel.load import load_model, split
from qoqc.parallel.ranks import Ranks, join
from qoqc.passes import manager
from qoqc.runtime.weights import STORE
from qoqc.testing import capture, context, targets, tiny_model

SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
TOKENS = torch.tensor([[1, 5, 9, 7]])


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """The second of two ranks, whose exchanges are torch's fake ones: they change nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield join(2, "cpu")
    dist.destroy_process_group()


def passed(model: Any, **options: Any) -> Counter[str]:
    """What the graph of a forward consists of after all passes."""
    gm, inputs = capture(model, TOKENS, use_cache=False)
    ctx = context(gm, inputs, **options)
    ctx.store = STORE  # where packed weights of artifacts are
    manager.run(gm, ctx)
    return targets(gm)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "qwen3"))]
)
def test_the_passes_find_in_a_part_what_they_find_in_the_whole(family: str, ranks: Ranks) -> None:
    whole = passed(tiny_model(family, torch.bfloat16, **SIZES))
    model = split(tiny_model(family, torch.bfloat16, **SIZES), ranks)
    part = passed(model, exclude=list(model.qoqc_parallel.exclude("16")))
    # two sums per layer, one head
    assert part["all_reduce"] == 4
    assert part["all_gather_into_tensor"] == 1
    assert part["wait_tensor"] == 5
    kinds = ("norm_quant", "w4a8_glu", "w4a8_linear", "quantize_act", "act_quant")
    assert {kind: part[kind] for kind in kinds} == {kind: whole[kind] for kind in kinds}
    assert whole["norm_quant"] == 4, "the norms behind sums are not fused"


def test_a_part_of_the_head_stays_in_16_bit(ranks: Ranks) -> None:
    model = split(tiny_model("llama", torch.bfloat16, **SIZES), ranks)
    assert model.lm_head.weight.shape == (192, 256)
    with pytest.raises(Unsupported, match="lm_head='w8a8': lm_head is split among ranks already"):
        qoqc.compile(model, lm_head="w8a8")
    compiled = qoqc.compile(model, glue="eager")
    assert compiled.qoqc_options.exclude == ("lm_head",)


def test_a_head_that_is_quantized_stays_whole(ranks: Ranks, tmp_path: Path) -> None:
    save(tiny_model("llama", torch.bfloat16, **SIZES), tmp_path / "artifact")
    for option, rows in (("16", 192), ("w4a8", 384), ("w8a8", 384)):
        model, _ = load_model(tmp_path / "artifact", ranks, lm_head=option)
        assert model.lm_head.weight.shape == (rows, 256)
        found = passed(model, lm_head=option, exclude=list(model.qoqc_parallel.exclude(option)))
        # the head's, by which all ranks have one rank's logits, or those of them all
        assert found["all_gather_into_tensor"] == 1
        assert found["w4a8_linear"] == (6 if option == "16" else 7)


def test_a_random_part_never_was_a_whole(ranks: Ranks) -> None:
    sizes = {"model_type": "qwen2", "vocab_size": 512, "num_hidden_layers": 1, **SIZES}
    model = packed_model(sizes, torch.device("cpu"), ranks=ranks)
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.weight.shape == (256, 128)
    assert layer.mlp.down_proj.weight.shape == (256, 256)
    torch._dynamo.reset()
    out = qoqc.compile(model, glue="eager").generate(TOKENS, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 6)
    (cache,) = model.qoqc_caches._caches.values()
    assert [kv.k_pages.shape[1] for kv in cache.layers] == [1], "KV heads of a rank"


def test_a_part_is_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    model = split(tiny_model("llama", **SIZES), ranks)
    for call in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(Unsupported, match="part 1 of 2 and makes no whole artifact"):
            call(tmp_path / "new")


def test_ranks_do_not_stop_by_the_clock(ranks: Ranks) -> None:
    model = split(tiny_model("llama", **SIZES), ranks)
    with pytest.raises(Unsupported, match="max_time: each rank has a clock of its own"):
        model.generate(TOKENS, max_time=1.0)
    model.generation_config.max_time = 1.0
    with pytest.raises(Unsupported, match="max_time"):
        model.generate(TOKENS)


def test_transformers_own_splitting_is_refused(tmp_path: Path) -> None:
    save(tiny_model("llama", **SIZES), tmp_path / "artifact")
    config = AutoConfig.from_pretrained(tmp_path / "artifact")
    # what from_pretrained(distributed_config=...) writes into the config under torchrun
    config.distributed_config = DistributedConfig(tp_size=2)
    message = r"transformers cannot split packed weights \(tp_size=2\); use qoqc.load\('.*', tp=2\)"
    with pytest.raises(Unsupported, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", config=config)
    config.distributed_config = DistributedConfig(tp_size=1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", config=config).is_quantized


def test_one_rank_is_the_whole_model(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    save(model, tmp_path / "artifact")
    alone = join(1, "cpu")
    assert (alone.rank, alone.size) == (0, 1)
    part, _ = load_model(tmp_path / "artifact", alone)
    with torch.no_grad():
        whole = qoqc.load(tmp_path / "artifact", glue="eager")
        assert torch.equal(part(TOKENS).logits, whole.forward(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (2, r"tp=2: this process was started alone \(RANK is not set\); start it with torchrun"),
        (0, r"tp=0: expected a number of ranks, or 'auto'"),
        ("all", r"tp='all': expected a number of ranks, or 'auto'"),
    ],
)
def test_a_process_alone_is_not_one_of_several(
    count: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptionError, match=message):
        qoqc.load(tmp_path, tp=count)


def test_the_number_of_ranks_is_that_of_the_processes(ranks: Ranks) -> None:
    with pytest.raises(OptionError, match="tp=4: 2 processes were started"):
        join(4, "cpu")
    assert join("auto", "cpu") == ranks


def test_shares_differ_by_one_unit_at_most() -> None:
    for size in (1, 2, 3, 8):
        for total in (8, 231, 1000):
            shares = [Ranks(r, size, torch.device("cpu")).share(total) for r in range(size)]
            assert [unit for share in shares for unit in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
