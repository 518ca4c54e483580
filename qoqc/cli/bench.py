"""`qoqc bench`: speed and memory of a whole model, next to the same model in 16 bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import qoqc.generate
from qoqc.artifact.manifest import is_artifact
from qoqc.bench.plan import Plan
from qoqc.bench.random_model import dense_model, packed_model
from qoqc.bench.report import Report
from qoqc.bench.run import Contest
from qoqc.bench.run import run as measure
from qoqc.cli.progress import console as progress_console
from qoqc.cli.progress import steps
from qoqc.cli.source import choose_device, choose_dtype, load_config, load_model, prepare
from qoqc.config import Options
from qoqc.errors import OptionError
from qoqc.shapes import shape

WIDTH = 120
"""Columns of the tables where there is no terminal."""


def run(
    model_name: str | None,
    shape_name: str | None,
    plan: Plan,
    raw_options: dict[str, Any],
    *,
    layers: int | None,
    device: str,
    dtype: str,
    baseline: bool,
    output: str | None,
) -> None:
    """Measure, print the tables, and write bench.json and bench.png to the directory `output`.

    Without matplotlib there is no picture, which is said.

    One of model_name and shape_name must be given. raw_options: of qoqc.compile; for an artifact
    they replace its own.
    """
    contest, longest = make_contest(
        model_name,
        shape_name,
        raw_options,
        layers=layers,
        device=device,
        dtype=dtype,
        baseline=baseline,
    )
    if longest is not None and plan.longest() > longest:
        raise OptionError(f"{plan.longest()} tokens are asked for, the model takes {longest}")
    folder = None if output is None else Path(output)
    settings = {**dataclasses.asdict(plan), "options": raw_options, "layers": layers}
    name = shape_name or str(model_name)
    report = Report(name, settings, None if folder is None else folder / "bench.json")
    torch.manual_seed(0)
    with telling() as tell:
        measure(contest, plan, report, tell)
    report.show(output_console())
    if folder is None or not can_plot("bench.png"):
        return
    from qoqc.bench.plot import plot  # noqa: PLC0415  matplotlib is optional

    plot(report, folder / "bench.png")


def make_contest(
    model_name: str | None,
    shape_name: str | None,
    raw_options: dict[str, Any],
    *,
    layers: int | None,
    device: str,
    dtype: str,
    baseline: bool,
) -> tuple[Contest, int | None]:
    """The models to compare, and the most tokens they take. Arguments are those of `run`."""
    if (model_name is None) == (shape_name is None):
        raise OptionError("bench takes a MODEL or --shape NAME: one of them")
    Options.parse(raw_options)
    where, kind = choose_device(device), choose_dtype(dtype)
    prepare()
    longest: int | None
    if shape_name is not None:
        contest, longest = _of_shape(shape_name, layers, where, raw_options, kind)
    else:
        assert model_name is not None
        if layers is not None:
            raise OptionError("--layers goes with --shape: a checkpoint has its layers")
        contest, longest = _of_model(model_name, where, raw_options, kind)
    if not baseline:
        contest = dataclasses.replace(contest, baseline="the 16-bit model was not asked for")
    return contest, longest


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows what is done now: as a bar, or a line where there is none."""
    with steps() as shown:

        def tell(what: str) -> None:
            shown.start(what)
            if not progress_console.is_terminal:
                progress_console.print(what)

        yield tell
        shown.finish()


def output_console() -> Console:
    """Where tables go: stdout, wide enough for them if it is no terminal."""
    stdout = Console(highlight=False)
    return stdout if stdout.is_terminal else Console(highlight=False, width=WIDTH)


def can_plot(name: str) -> bool:
    """Whether matplotlib is there; without, says that there will be no picture `name`."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print(f"no {name}: it needs matplotlib, pip install 'qoqc[bench]'", file=sys.stderr)
    return False


def _of_shape(
    name: str,
    layers: int | None,
    device: torch.device,
    options: dict[str, Any],
    dtype: torch.dtype | str,
) -> tuple[Contest, int]:
    if dtype not in ("auto", torch.bfloat16):
        raise OptionError("--dtype: a model of random weights is in bf16")
    sizes = shape(name)
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    group_size = options.get("group_size", 128)

    def ours() -> Any:
        return qoqc.generate.compile(
            packed_model(sizes, device, group_size), **{**options, "release": True}
        )

    return Contest(ours, lambda: dense_model(sizes, device)), sizes["max_position_embeddings"]


def _of_model(
    name: str, device: torch.device, options: dict[str, Any], dtype: torch.dtype | str
) -> tuple[Contest, int | None]:
    longest = getattr(
        load_config(name).get_text_config(decoder=True), "max_position_embeddings", None
    )
    if is_artifact(Path(name)):
        reason = f"{name} is an artifact: it has no 16-bit weights to compare with"
        return Contest(lambda: qoqc.generate.load(name, device, **options), reason), longest

    def ours() -> Any:
        model = load_model(name, device, dtype)
        return qoqc.generate.compile(model, **{"release": True, **options})

    return Contest(ours, lambda: load_model(name, device, dtype)), longest
