"""`qoqc bench --serve`: a load of requests on an engine, next to the 16-bit model on its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qoqc.bench.serve_plan import ServePlan
from qoqc.bench.serve_report import ServeReport
from qoqc.bench.serve_run import run as measure
from qoqc.cli.bench import can_plot, make_contest, output_console, telling
from qoqc.cli.serve import read_key
from qoqc.errors import OptionError, Unsupported


def run(
    model_name: str | None,
    shape_name: str | None,
    plan: ServePlan,
    raw_options: dict[str, Any],
    *,
    url: str | None,
    api_key_file: str | None,
    layers: int | None,
    device: str,
    dtype: str,
    baseline: bool,
    output: str | None,
) -> None:
    """Measure, print the table, and write serve.json and serve.png to the directory `output`.

    url          a server to load instead of engines in this process; then there is no model
    others       as in bench.run
    """
    path = None if output is None else Path(output) / "serve.json"
    if url is not None:
        if model_name is not None or shape_name is not None:
            raise OptionError("--url names a server with its model: no MODEL, no --shape")
        report = _of_server(url, api_key_file, plan, path)
    else:
        if api_key_file is not None:
            raise OptionError("--api-key-file goes with --url")
        contest, longest = make_contest(
            model_name,
            shape_name,
            raw_options,
            layers=layers,
            device=device,
            dtype=dtype,
            baseline=baseline,
        )
        plan.make(1000, longest)  # an error before any model is loaded
        settings = {"options": raw_options, "layers": layers}
        report = ServeReport(shape_name or str(model_name), plan, settings, path)
        with telling() as tell:
            measure(contest, plan, longest, report, tell)
    report.show(output_console())
    if path is None or not can_plot("serve.png"):
        return
    from qoqc.bench.serve_plot import plot  # noqa: PLC0415  matplotlib is optional

    plot(report, path.with_suffix(".png"))


def _of_server(
    url: str, api_key_file: str | None, plan: ServePlan, path: Path | None
) -> ServeReport:
    if importlib.util.find_spec("openai") is None:
        raise Unsupported("--url needs the package openai: pip install 'qoqc[bench]'")
    from qoqc.bench.serve_client import measure_url  # noqa: PLC0415  openai is optional

    key = None if api_key_file is None else read_key(api_key_file)
    report = ServeReport(url, plan, {"url": url}, path)
    with telling() as tell:
        report.add(measure_url(url, key, plan, tell))
    return report
