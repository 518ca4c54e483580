"""The options of `qoqc serve`; what it does is in serve.py."""

from __future__ import annotations

from typing import Annotated

import typer

from qoqc.cli.options import AnyArgument, Device, Dtype, RequireCached
from qoqc.importing import without_collector


def serve_command(
    model: AnyArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default: this machine only")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free")] = 8000,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its first line is the key clients must send")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call it; default: as given, or its folder"),
    ] = None,
    max_pending: Annotated[
        int, typer.Option(min=1, help="Open requests; one more is answered by 429")
    ] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: what the context leaves")
    ] = None,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Largest request; beyond: 413")
    ] = 2 * 2**20,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of a request, waiting included; then: 504")
    ] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="For open requests, after SIGTERM")
    ] = 30.0,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests in one step of the engine")
    ] = None,
    max_step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one step; longer prompts are cut")
    ] = None,
    pages: Annotated[
        int | None, typer.Option(min=1, help="Pages of the KV cache; default: what fits")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Of the free memory for the KV cache")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="No sampling: temperature is 0, steps are shorter")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="The model as it is, in 16 bit, by transformers' engine")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    glue: Annotated[str, typer.Option(help="inductor, or eager = no compile time")] = "inductor",
    require_cached: RequireCached = False,
) -> None:
    """Serve a model by OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    Also /health and /metrics. SIGTERM lets open requests finish.
    """
    with without_collector(freeze=True):
        from qoqc.cli.serve import EngineSettings, run  # noqa: PLC0415  slow to import, see app.py

    engine = EngineSettings(max_requests, max_step_tokens, pages, memory, greedy, plain)
    limits = {
        "max_pending": max_pending,
        "max_tokens": max_tokens,
        "max_body": max_body,
        "timeout": timeout,
        "grace": grace,
    }
    run(
        model,
        engine,
        limits,
        host=host,
        port=port,
        api_key_file=api_key_file,
        name=name,
        device=device,
        dtype=dtype,
        glue=glue,
        require_cached=require_cached,
    )
