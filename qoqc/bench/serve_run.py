"""A load on the 16-bit model in transformers' engine, then on qoqc's, in one process and report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from qoqc.bench.run import Contest
from qoqc.bench.serve_load import measure
from qoqc.bench.serve_plan import ServePlan
from qoqc.bench.serve_report import ServeReport
from qoqc.errors import QoqcError
from qoqc.ir.spec import PAGE
from qoqc.serve.engine import engine
from qoqc.serve.http.plain import PAGE_TOKENS, plain_engine

Tell = Callable[[str], Any]


def run(
    contest: Contest, plan: ServePlan, longest: int | None, report: ServeReport, tell: Tell
) -> None:
    """Measure both systems into the report; what a baseline lacks is noted, not raised.

    longest  tokens that a request may have, by the model's config
    """
    if isinstance(contest.baseline, str):
        report.note(contest.baseline)
    else:
        tell("Loading the 16-bit model")
        try:
            with _without_cudnn_attention():
                _baseline(contest.baseline, plan, longest, report, tell)
        except (torch.OutOfMemoryError, QoqcError) as error:
            report.note(f"the 16-bit model: {str(error).splitlines()[0]}")
        _free()
    tell("Loading the packed model")
    model = contest.ours()
    pages = _pages(model, plan, longest, PAGE)
    manager = engine(model, num_pages=pages, generation_config=_greedy())
    _measure("qoqc", manager, plan, longest, report, tell)


def _baseline(
    build: Callable[[], Any], plan: ServePlan, longest: int | None, report: ServeReport, tell: Tell
) -> None:
    model = build()
    name = str(model.dtype).removeprefix("torch.")
    pages = _pages(model, plan, longest, PAGE_TOKENS)
    manager = plain_engine(model, _greedy(), num_pages=pages)
    _measure(name, manager, plan, longest, report, tell)


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """SDPA's other kernels: cuDNN's failed a third of this engine's requests on an H200."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _pages(model: Any, plan: ServePlan, longest: int | None, page: int) -> int | None:
    """Pages for an engine: what fits on a GPU, on a CPU what the load takes all at once.

    A CPU's memory is others', too, and transformers' engine makes masks as wide as all pages.
    """
    if model.device.type == "cuda":
        return None
    requests = plan.make(_vocabulary(model), longest)
    return sum(-(-(len(one.prompt) + one.gen) // page) for one in requests) + 1


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _measure(
    name: str, manager: Any, plan: ServePlan, longest: int | None, report: ServeReport, tell: Tell
) -> None:
    vocabulary = _vocabulary(manager.model)
    warm_up = plan.make_warm_up(vocabulary, longest)
    requests = plan.make(vocabulary, longest)
    report.add(measure(name, manager, warm_up, requests, plan.goals, tell))


def _greedy() -> GenerationConfig:
    return GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
