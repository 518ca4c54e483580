"""The options of `qoqc bench`; what it does is in bench.py."""

from __future__ import annotations

from typing import Annotated

import typer

from qoqc.cli.options import Device, Dtype, LmHead
from qoqc.errors import OptionError


def bench_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="Instead of --shape")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights: llama-3-8b, llama-2-7b, qwen2.5-72b or qwen3-8b"),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer than the shape has")] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Batches, or none")] = "1,64",
    baseline_batch: Annotated[
        str | None, typer.Option(metavar="N,N", help="Those of the 16-bit model; default: --batch")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in")] = 1024,
    gen: Annotated[int, typer.Option(min=2, help="Tokens out")] = 128,
    prefill: Annotated[
        str, typer.Option(metavar="BxN", help="More prefills, batch x tokens, or none")
    ] = "none",
    breakdown: Annotated[
        str, typer.Option(metavar="N,N", help="Batches whose step is shown by kernel, or none")
    ] = "none",
    served: Annotated[
        str, typer.Option(metavar="INxOUT", help="Tokens in and out of a served batch, or none")
    ] = "none",
    served_batch: Annotated[
        int | None, typer.Option(min=1, help="Its size; default: the largest that fits")
    ] = None,
    served_baseline: Annotated[
        bool, typer.Option("--served-baseline", help="Serve by the 16-bit model too")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="A load of requests on an engine instead")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Of the load")] = 256,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, Poisson; default: all at once")
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(help="Of log-normal --prompt and --gen; default: 0.5 with --rate, else 0"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the load")] = 0,
    warm_up: Annotated[int, typer.Option(min=1, help="Requests before those of the load")] = 32,
    slo_ttft: Annotated[
        float, typer.Option(metavar="MS", help="Goodput: time to the first token, at most")
    ] = 2000.0,
    slo_itl: Annotated[
        float, typer.Option(metavar="MS", help="Goodput: mean time per token after it, at most")
    ] = 100.0,
    url: Annotated[str | None, typer.Option(help="Load a server, not an engine in here")] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its first line is the server's key")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure the 16-bit model")
    ] = True,
    group_size: Annotated[
        int | None, typer.Option(help="128 or -1 = per channel; default: the artifact's, or 128")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="4, 8 or 16; default: the artifact's, or 4")
    ] = None,
    lm_head: LmHead = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    glue: Annotated[str, typer.Option(help="inductor, or eager = no compile time")] = "inductor",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory for bench.json, bench.png")
    ] = None,
) -> None:
    """Decode, prefill and served speed, memory, and a decode step kernel by kernel.

    In the same run for the model in 16 bit, by transformers with a static cache and Inductor. With
    --serve: throughput and latencies under a load of requests, next to transformers' engine.
    """
    given = {"group_size": group_size, "kv_bits": kv_bits, "lm_head": lm_head}
    raw = {**{name: value for name, value in given.items() if value is not None}, "glue": glue}
    if serve:
        from qoqc.bench.serve_plan import Goals, ServePlan  # noqa: PLC0415  as above
        from qoqc.cli.bench_serve import run as run_serve  # noqa: PLC0415  as above

        if spread is None:
            spread = 0.0 if rate is None else 0.5
        goals = Goals(slo_ttft / 1e3, slo_itl / 1e3)
        run_serve(
            model,
            shape,
            ServePlan(requests, rate, prompt, gen, spread, seed, warm_up, goals),
            raw,
            url=url,
            api_key_file=api_key_file,
            layers=layers,
            device=device,
            dtype=dtype,
            baseline=baseline,
            output=output,
        )
        return
    if url is not None or rate is not None or spread is not None:
        raise OptionError("--url, --rate and --spread describe a load: add --serve")
    from qoqc.bench.plan import Plan, numbers, pairs  # noqa: PLC0415  slow to import, see app.py
    from qoqc.cli.bench import run  # noqa: PLC0415  slow to import, see app.py

    served_sizes = pairs("--served", served)
    plan = Plan(
        batches=numbers("--batch", batch),
        baseline_batches=numbers("--baseline-batch", baseline_batch or batch),
        prompt=prompt,
        gen=gen,
        prefill=pairs("--prefill", prefill),
        breakdown=numbers("--breakdown", breakdown),
        served=served_sizes[0] if served_sizes else None,
        served_batch=served_batch,
        served_baseline=served_baseline,
    )
    run(
        model,
        shape,
        plan,
        raw,
        layers=layers,
        device=device,
        dtype=dtype,
        baseline=baseline,
        output=output,
    )
