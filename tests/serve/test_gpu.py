"""What differs on a GPU: decode steps as CUDA graphs, and the order of sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

import qoqc
from qoqc.serve.engine import install

pytestmark = pytest.mark.gpu

STORIES = Path(__file__).resolve().parents[2] / "examples/models/llama-stories-4m"
Requests = list[tuple[list[int], int]]
Answer = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def stories_gpu(host: ModuleType) -> Any:
    """The bundled model with a head of integers too: nothing but attention has sums of floats."""
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.bfloat16)
    return qoqc.compile(model.cuda(), prefill_kv="quantized", lm_head="w8a8")


def test_tiles_answer_together_what_they_answer_alone(
    stories_gpu: Any, some: Any, together: Answer, alone: Answer
) -> None:
    requests = some(30)
    wanted = alone(stories_gpu, requests, num_pages=20, invariant=True)
    sizes = {"num_pages": 60, "max_tokens_per_batch": 100}
    assert together(stories_gpu, requests, invariant=True, **sizes) == wanted


def test_most_answers_are_the_same_together_and_alone(
    stories_gpu: Any, some: Any, together: Answer, alone: Answer
) -> None:
    """Sums are in another order, which shows in close choices of a token: in few answers."""
    requests = [(prompt, 8) for prompt, _ in some(30)]
    wanted = alone(stories_gpu, requests, num_pages=20)
    found = together(stories_gpu, requests, num_pages=200)
    assert sum(map(list.__eq__, found, wanted)) >= 20


def test_graphs_change_no_answer(
    stories_gpu: Any, some: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[Any] = []
    set_graph = ContinuousBatchingIOs.set_graph

    def count(self: Any, graph: Any) -> None:
        captured.append(graph)
        set_graph(self, graph)

    monkeypatch.setattr(ContinuousBatchingIOs, "set_graph", count)
    install(stories_gpu)
    # four at a time: a batch that is not filled up has the same sums with a graph as without
    prompts = [prompt for prompt, _ in some(4)]
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=90)
    answers = []
    for graphs in (False, True):
        config = ContinuousBatchingConfig(use_cuda_graph=graphs, num_blocks=100)
        outputs = stories_gpu.generate_batch(
            prompts, generation_config=greedy, continuous_batching_config=config
        )
        answers.append([output.generated_tokens for output in outputs.values()])
        assert bool(captured) == graphs
    assert answers[0] == answers[1]
    assert all(len(answer) == 90 for answer in answers[0])
