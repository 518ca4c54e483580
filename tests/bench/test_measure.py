"""What is timed, what is reported, and what happens when memory does not suffice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qoqc.bench import fitting, measure
from qoqc.bench.breakdown import Breakdown, Launches
from qoqc.bench.measure import Served, Speed, System, measure_served, measure_speed
from qoqc.bench.plan import Plan, numbers, pairs
from qoqc.bench.report import Report
from qoqc.bench.run import Contest, run
from qoqc.errors import OptionError
from qoqc.testing import VOCAB, tiny_config


class Sleeper:
    """A model whose prefill takes 20 ms and each further token 5 ms; it may lack memory."""

    def __init__(self, fits: int = 1000) -> None:
        self.config, self.device, self.dtype = tiny_config("llama"), torch.device("cpu"), None
        self.fits = fits
        self.asked: list[tuple[int, int]] = []

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        self.asked.append((input_ids.shape[0], max_new_tokens))
        if input_ids.shape[0] > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        assert int(input_ids.max()) < VOCAB
        time.sleep(0.02 + 0.005 * (max_new_tokens - 1))
        return torch.cat([input_ids, input_ids.new_zeros(len(input_ids), max_new_tokens)], 1)


def test_prefill_cancels_in_the_step() -> None:
    speed = measure_speed(System("s", Sleeper()), batch=4, prompt=10, gen=9)
    assert 4.9 < speed.step_ms < 8
    assert speed.decode_tok_s == pytest.approx(4e3 / speed.step_ms)
    assert 4 * 10 / 0.04 < speed.prefill_tok_s < 4 * 10 / 0.0199
    assert speed.first_call_s > 0.059
    assert speed.peak_gib is None


def test_long_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONG", 0.01)
    model = Sleeper()
    measure_speed(System("s", model), batch=1, prompt=4, gen=3)
    assert [tokens for _, tokens in model.asked] == [3, 1, 1, 3]


def test_served_takes_fewer_when_memory_ends() -> None:
    served = measure_served(System("s", Sleeper(fits=40)), batch=96, prompt=8, gen=3)
    assert served.batch == 40
    assert served.note == "out of memory at batch 96, 72, 54"
    assert served.tok_s is not None and served.seconds is not None
    assert served.tok_s == pytest.approx(40 * 3 / served.seconds)
    nothing = measure_served(System("s", Sleeper(fits=0)), batch=2, prompt=8, gen=3)
    assert nothing.tok_s is None
    assert "out of memory at batch 1: CUDA out of memory. Tried to allocate" in nothing.note


def test_on_a_cpu_the_largest_batch_is_what_is_asked_for() -> None:
    assert fitting.largest_batch(System("s", Sleeper()), 8, 8, fallback=3) == 3


@pytest.mark.parametrize(
    ("room", "at_once", "batch"),
    [
        (1000, None, 20),  # 40 + 10 bytes each
        (10_000, None, 192),  # 200, in steps of 32
        (1000, 8, 68 // 32 * 32),  # 320 for eight prompts, then 10 each
        (10_000, 64, 736),  # 2,560, then 744 sequences
        (300, 8, 6),  # fewer than run at once: all of them do
        (1, 8, 1),
    ],
)
def test_the_largest_batch(room: int, at_once: int | None, batch: int) -> None:
    assert fitting.fitting(room, 40, 10, at_once=at_once) == batch


def test_plan_of_text() -> None:
    assert numbers("--batch", "1,16") == (1, 16)
    assert numbers("--batch", "none") == ()
    assert pairs("--prefill", "8x1024,1x5") == ((8, 1024), (1, 5))
    for bad in ("1,,2", "x", "0", "-1", "1.5"):
        with pytest.raises(OptionError, match=f"--batch {bad}: expected numbers like"):
            numbers("--batch", bad)
    for bad in ("8", "8x", "0x4", "8x4x2"):
        with pytest.raises(OptionError, match=f"--prefill {bad}: expected sizes like"):
            pairs("--prefill", bad)
    with pytest.raises(OptionError, match="--gen 1"):
        Plan(gen=1)
    assert Plan(prompt=10, gen=6, prefill=((1, 20),), served=(30, 5)).longest() == 35
    assert Plan(batches=(), breakdown=()).longest() == 0


def test_a_run_goes_on_where_something_does_not_fit(tmp_path: Path) -> None:
    """The 16-bit model first, then ours; every part is on disk as soon as it is done."""
    path = tmp_path / "bench.json"
    report = Report("m", {}, path)
    told: list[str] = []
    dense = Sleeper(fits=3)
    dense.dtype = torch.bfloat16  # type: ignore[assignment]
    plan = Plan(
        batches=(1, 8), baseline_batches=(1, 8), prompt=6, gen=3, prefill=((2, 9),), served=(6, 3),
        served_batch=4, served_baseline=True,
    )  # fmt: skip
    run(Contest(Sleeper, lambda: dense), plan, report, told.append)
    found = json.loads(path.read_text())
    assert [(s["system"], s["batch"], s["prompt"]) for s in found["speeds"]] == [
        ("bfloat16", 1, 6),
        ("bfloat16", 2, 9),
        ("qoqc", 1, 6),
        ("qoqc", 8, 6),
        ("qoqc", 2, 9),
    ]
    assert [(s["system"], s["batch"]) for s in found["served"]] == [("bfloat16", 3), ("qoqc", 4)]
    assert found["notes"] == [
        "bfloat16: batch 8, 6 tokens in, 3 out: CUDA out of memory. Tried to allocate"
    ]
    assert told[0] == "Loading the 16-bit model"
    assert found["environment"]["torch"] == torch.__version__


def test_why_there_is_no_baseline() -> None:
    report = Report("m", {}, None)
    run(Contest(Sleeper, "an artifact has none"), Plan((1,), prompt=4, gen=2), report, print)
    assert report.notes == ["an artifact has none"]
    assert [speed.system for speed in report.speeds] == ["qoqc"]

    def too_large() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    report = Report("m", {}, None)
    run(Contest(Sleeper, too_large), Plan((1,), (1,), prompt=4, gen=2), report, print)
    assert report.notes == ["the 16-bit model does not fit: CUDA out of memory"]
    assert [speed.system for speed in report.speeds] == ["qoqc"]


def full_report() -> Report:
    report = Report("llama-3-8b", {"gen": 128}, None)
    report.loaded("qoqc", 3.25, 5.5)
    report.add(Speed("qoqc", 64, 1024, 128, 4.0, 16000.0, 85000.0, 61.5, 9.75))
    report.add(Speed("qoqc", 8, 1024, 2, 9.9, 808.0, 85123.0, 1.0, 9.75))
    report.add(Served("qoqc", 256, 1024, 512, 7.5, 17476.0, 60.0, "out of memory at batch 288"))
    kernels = (
        Launches("gemm_hopper_kernel", "w4a8_linear", 128, 1800.0),
        Launches("nvjet", "16-bit matmul", 1, 240.0),
    )
    report.add((Breakdown("qoqc", 64, 1088, 3800.0, kernels), {"w4a8_linear": 900.0}))
    report.note("something [was] left out")
    return report


def test_tables() -> None:
    console = Console(width=120, record=True, highlight=False)
    full_report().show(console)
    text = console.export_text()
    for wanted in (
        "16,000.0", "85,123", "61.5", "17,476", "out of memory at batch 288", "something [was]",
        "busy for 3,800 us, idle for 5.0 % of the step", "made in 3.2 s, 5.50 GiB on the device",
    ):  # fmt: skip
        assert wanted in text, wanted
    # a prefill's two tokens are no measurement of decoding
    assert "808" not in text


def test_json_holds_all() -> None:
    found = full_report().json()
    (part,) = found["breakdowns"]
    assert part["limit_us"] == {"w4a8_linear": 900.0}
    assert part["idle_percent"] == pytest.approx(5.0)
    assert [group["name"] for group in part["groups"]] == ["w4a8_linear", "16-bit matmul"]
    assert json.loads(json.dumps(found)) == found


def test_idle_time_needs_the_step_time() -> None:
    report = Report("m", {}, None)
    assert report.idle_percent(Breakdown("qoqc", 1, 10, 20.0, ())) is None


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from qoqc.bench.plot import plot  # noqa: PLC0415  matplotlib is optional

    plot(full_report(), tmp_path / "new" / "bench.png")
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
