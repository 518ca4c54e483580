"""Two processes give what one does: logits, tokens, errors; and each reads about half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import Manifest
from qoqc.artifact.save import save
from qoqc.config import Options
from qoqc.runtime.weights import GroupSize
from qoqc.testing import sqnr, tiny_model
from tests.parallel.rank import TOKENS, results

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples" / "models" / "llama-stories-4m"
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 384, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Three groups of 128 in the MLP: the second rank has two of them."""

FAMILIES = ("qwen2", "qwen3")
"""With biases; with norms of heads. The bundled model is a Llama."""

Together = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts in fp32, so that what is not the order of sums shows."""
    folder = tmp_path_factory.mktemp("artifacts")
    for family in FAMILIES:
        save(tiny_model(family, **SIZES), folder / family, max_shard_size=400_000)
    stories = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    save(stories, folder / "stories", AutoTokenizer.from_pretrained(MODEL), max_shard_size=3000000)
    shutil.copytree(folder / "qwen2", folder / "damaged")
    shards = sorted((folder / "damaged").glob("*.safetensors"))
    assert len(shards) > 2
    with shards[-1].open("r+b") as file:  # of a file that only one of the ranks hashes
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return folder


@pytest.fixture(scope="module")
def together(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Runs jobs on two ranks (see rank.py); results by job, of rank 0 and of rank 1."""

    def run(*jobs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("ranks")
        jobs = tuple({**job, "artifact": str(artifacts / job["artifact"])} for job in jobs)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(folder)]
        processes = [
            subprocess.Popen(
                [*command, str(rank)],
                env={**environment, "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=500)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
        names = [job["name"] for job in jobs]
        return {
            name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in names
        }

    return run


def alone(
    artifact: Path, do: list[str], new: int = 8, device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """What one process gives, uncompiled unless there are options."""
    torch._dynamo.reset()
    if options:
        return results(qoqc.load(artifact, device, **options), do, new)
    model, _ = load_model(artifact, device)
    return results(model, do, new)


@pytest.fixture(scope="module")
def quick(artifacts: Path, together: Together) -> dict[str, list[dict[str, Any]]]:
    """What needs no compilation, in one start of two processes."""
    exact: dict[str, Any] = {"eager": True, "tp_exact": True}
    return together(
        *({"name": f, "artifact": f, "do": ["logits", "greedy"], **exact} for f in FAMILIES),
        {"name": "stories", "artifact": "stories", "do": ["logits", "greedy"], **exact},
        {"name": "fast", "artifact": "stories", "do": ["logits", "sampled"], **exact}
        | {"tp_exact": False},
        {"name": "damaged", "artifact": "damaged", "do": [], **exact},
        {"name": "nowhere", "artifact": "nowhere", "do": [], **exact},
    )


@pytest.mark.parametrize("name", [*FAMILIES, "stories"])
def test_the_logits_of_two_ranks_are_those_of_one(
    name: str, artifacts: Path, quick: dict[str, list[dict[str, Any]]]
) -> None:
    expected = alone(artifacts / name, ["logits"])["logits"]
    first, second = (found["logits"] for found in quick[name])
    assert torch.equal(first, second)
    # the integers are equal: what differs is fp32 sums in another order, 2 ** -24 each. One flip
    # of an int8 rounding would be seen: it gives about 40 dB
    assert sqnr(expected, first) > 110


@pytest.mark.parametrize("name", [*FAMILIES, "stories"])
def test_greedy_tokens_are_those_of_one_rank(
    name: str, artifacts: Path, quick: dict[str, list[dict[str, Any]]]
) -> None:
    expected = alone(artifacts / name, ["greedy"])["greedy"]
    for found in quick[name]:
        assert found["greedy"].tolist() == expected.tolist()


def test_scales_of_each_rank_are_no_coarser_than_those_of_one(
    artifacts: Path, quick: dict[str, list[dict[str, Any]]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        exact = model(TOKENS, use_cache=False).logits
    one = alone(artifacts / "stories", ["logits"])["logits"]
    two = quick["fast"][0]["logits"]
    # both differ from the 16-bit model by their rounding; of two ranks each has its own, finer
    # scale. Half a dB is what one sample of 12 tokens leaves to chance
    assert sqnr(exact, two) > sqnr(exact, one) - 0.5
    assert sqnr(one, two) > sqnr(exact, one), "they are nearer to each other than to the original"


def test_ranks_choose_the_same_tokens(quick: dict[str, list[dict[str, Any]]]) -> None:
    first, second = quick["fast"]
    for kind in ("logits", "sampled"):
        assert torch.equal(first[kind], second[kind])
    assert not torch.equal(first["sampled"], quick["stories"][0]["greedy"])


def test_a_rank_reads_and_holds_its_part(
    artifacts: Path, quick: dict[str, list[dict[str, Any]]]
) -> None:
    manifest = Manifest.read(artifacts / "stories")
    table = 4096 * 256 * 4  # the embedding, which is the head too: each rank has all of it
    rest = manifest.bytes_after - table
    for found in quick["fast"]:
        # half of all codes and words; norms, and scales of what is summed, twice; and here k and
        # v, whose two heads lie in one tile of 128 rows
        assert 0.5 * rest < found["bytes"] - table < 0.57 * rest
        assert 0.5 * rest < found["memory"] < 0.57 * rest
        parts = found["parts"]
        assert parts["model.layers.0.self_attn.q_proj.weight"] == (128, 256)
        assert parts["model.layers.0.self_attn.k_proj.weight"] == (64, 256)
        assert parts["model.layers.0.self_attn.o_proj.weight"] == (256, 128)
        assert parts["model.layers.0.mlp.down_proj.weight"] == (256, 256)


def test_damage_that_one_rank_finds_stops_both(quick: dict[str, list[dict[str, Any]]]) -> None:
    errors = [found["error"] for found in quick["damaged"]]
    assert all(error.startswith("ArtifactError: ") for error in errors)
    assert all("is damaged (its SHA-256 is not the recorded one)" in error for error in errors)
    assert sum(error.startswith("ArtifactError: rank ") for error in errors) == 1
    assert all("nowhere is not a directory" in found["error"] for found in quick["nowhere"])


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [128, -1])
def test_other_plans_and_parts_in_16_bit(
    group_size: GroupSize, artifacts: Path, together: Together
) -> None:
    made: dict[str, dict[str, Any]] = {
        "phi3": {},  # fused q, k, v and gate, up: gathered, and cut again
        "olmo2": {},  # norms over all heads: the same
        "qwen2": {"exclude": ("*.layers.0.*",)},  # linears that are not packed
    }
    names = {family: f"{family}{group_size}" for family in made}
    for family, changes in made.items():
        options = Options(group_size=group_size, **changes)
        save(tiny_model(family, **SIZES), artifacts / names[family], options=options)
    job: dict[str, Any] = {"do": ["logits"], "eager": True, "tp_exact": True}
    found = together(*({"name": f, "artifact": name, **job} for f, name in names.items()))
    for family, name in names.items():
        expected = alone(artifacts / name, ["logits"])["logits"]
        first, second = found[family]
        assert torch.equal(first["logits"], second["logits"])
        assert sqnr(expected, first["logits"]) > 110, family


@pytest.mark.slow
def test_steps_on_a_kv4_cache(artifacts: Path, together: Together) -> None:
    save(tiny_model("llama", **SIZES), artifacts / "llama")
    job: dict[str, Any] = {"do": ["steps"], "tp_exact": True, "glue": "eager"}
    names = ("llama", *FAMILIES, "stories")
    found = together(*({"name": name, "artifact": name, **job} for name in names))
    for name, (first, second) in found.items():
        expected = alone(artifacts / name, ["steps"], glue="eager")["steps"]
        assert torch.equal(first["steps"], second["steps"])
        # the prefill reads no cache yet
        assert sqnr(expected[0], first["steps"][0]) > 110
        # a scale that rounds otherwise gives 30 to 40 dB; a head in the wrong place gives none
        assert sqnr(expected, first["steps"]) > 25, name


@pytest.mark.slow
def test_inductor_compiles_parts(artifacts: Path, together: Together) -> None:
    job: dict[str, Any] = {"artifact": "stories", "do": ["greedy", "sampled"], "new": 12}
    found = together(
        {"name": "inductor", **job}, {"name": "exact", "tp_exact": True, "kv_bits": 16, **job}
    )
    for first, second in found.values():
        assert torch.equal(first["greedy"], second["greedy"])
        assert torch.equal(first["sampled"], second["sampled"])
    # with a KV cache in 16 bit: in 4 bit the last bit of an fp32 sum may move a scale
    expected = alone(artifacts / "stories", ["greedy"], new=12, kv_bits=16)["greedy"]
    assert found["exact"][0]["greedy"].tolist() == expected.tolist()


@pytest.mark.slow
def test_the_example_runs_under_torchrun(artifacts: Path) -> None:
    out = _example(artifacts / "stories", "--glue", "eager")
    assert out.startswith("Once upon a time")
    assert out.count("Once upon a time") == 1, "more than one rank printed"
    assert "rank 0 of 2 read 5.1 MB of the artifact's 5.8 MB" in out


def _example(artifact: Path, *arguments: str) -> str:
    """What two processes of the example print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = [str(REPO / "examples" / "tensor_parallel.py"), str(artifact)]
    done = subprocess.run(
        [*launcher, *script, "--max-new-tokens", "16", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_what_one_gives(artifacts: Path, together: Together) -> None:
    """Compiled, and in generate() as CUDA graphs."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    save(model, artifacts / "stories16")
    job: dict[str, Any] = {"artifact": "stories16", "device": "cuda", "new": 24}
    found = together(
        {"name": "fast", "do": ["greedy", "sampled"], **job},
        {"name": "steps", "do": ["steps"], "tp_exact": True, **job},
    )
    for kind in ("greedy", "sampled"):
        assert torch.equal(found["fast"][0][kind], found["fast"][1][kind])
    expected = alone(artifacts / "stories16", ["steps"], device="cuda", glue="inductor")["steps"]
    first, second = (f["steps"] for f in found["steps"])
    assert torch.equal(first, second)
    # where a sum is rounded otherwise in bf16, int8 and KV codes behind it move: 29 dB on a CPU
    assert sqnr(expected, first) > 20


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_example_runs_on_two_gpus(artifacts: Path) -> None:
    """CUDA graphs that hold NCCL's work are dropped before it: the processes end."""
    assert _example(artifacts / "stories").startswith("Once upon a time")
