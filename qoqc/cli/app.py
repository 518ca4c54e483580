"""The commands, their options, and what an error looks like: one line on stderr, exit code 2.

Commands import what they need when they run: torch and transformers take seconds to import, and
`qoqc --help` should not. Those that run models do so without the garbage collector, which would
take another second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import qoqc
from qoqc.cli.bench_command import bench_command
from qoqc.cli.options import (
    AnyArgument,
    Device,
    Dtype,
    Exclude,
    GroupSize,
    KvBits,
    LmHead,
    MaxShardSize,
    ModelArgument,
    RequireCached,
    Strict,
)
from qoqc.cli.serve_command import serve_command
from qoqc.errors import own_error
from qoqc.importing import without_collector

app = typer.Typer(
    name="qoqc",
    help="W4A8KV4 for any Hugging Face decoder: pack, chat, inspect, evaluate.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    """W4A8KV4 for any Hugging Face decoder: pack, chat, inspect, evaluate."""
    if version:
        typer.echo(f"qoqc {qoqc.__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("compile")
def compile_command(
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory to write")],
    group_size: GroupSize = 128,
    kv_bits: KvBits = 4,
    exclude: Exclude = [],  # noqa: B006  typer copies it
    strict: Strict = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact")] = False,
    calibrate: Annotated[
        str | None, typer.Option(metavar="TEXT", help="UTF-8 file, or default = a text of qoqc's")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="rtn, or qoq; default: qoq if there is calibration text")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows to calibrate on")] = 128,
    seq: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window; default: 1024, less of short text")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows and the rotation")] = 0,
    eval_text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Judge on it; default: text held out")
    ] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Exit code 1 if it rises by more")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    arch: Annotated[
        str, typer.Option(metavar="LIST", help="Compile kernels for GPUs: sm_80,sm_89,sm_90")
    ] = "",
) -> None:
    """Pack MODEL to 4 bit and write an artifact that loads without the original weights.

    With --calibrate by the QoQ algorithm, and judged next to the 16-bit model; else rounded.
    """
    with without_collector(freeze=True):
        from qoqc.cli.calibration import Settings  # noqa: PLC0415  slow to import, see above
        from qoqc.cli.compile import Files, run  # noqa: PLC0415  slow to import, see above

    raw = {"group_size": group_size, "kv_bits": kv_bits, "exclude": exclude, "strict": strict}
    settings = Settings(calibrate, recipe, samples, seq, seed, eval_text, max_ppl_increase)
    files = Files(force, max_shard_size, arch)
    code = run(model, output, raw, device=device, dtype=dtype, files=files, settings=settings)
    if code:
        raise typer.Exit(code)


@app.command("chat")
def chat_command(
    model: AnyArgument,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer")] = 400,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 = greedy; default: the model's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable")] = None,
    device: Device = "auto",
    glue: Annotated[str, typer.Option(help="inductor, or eager = no compile time")] = "inductor",
    require_cached: RequireCached = False,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit (or Ctrl-D) leaves."""
    with without_collector(freeze=True):
        from qoqc.cli.chat import Settings, run  # noqa: PLC0415  slow to import, see above

    settings = Settings(max_new_tokens, temperature, seed)
    run(model, prompt, settings, device=device, glue=glue, require_cached=require_cached)


@app.command("inspect")
def inspect_command(
    model: AnyArgument,
    group_size: GroupSize = 128,
    kv_bits: KvBits = 4,
    exclude: Exclude = [],  # noqa: B006  typer copies it
    device: Device = "auto",
    dtype: Dtype = "auto",
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a page about an artifact")
    ] = None,
) -> None:
    """What qoqc makes of a model: structure, counts by pass, what stays in 16 bit, sizes."""
    with without_collector(freeze=True):
        from qoqc.cli.inspect import run  # noqa: PLC0415  slow to import, see above

    raw = {"group_size": group_size, "kv_bits": kv_bits, "exclude": exclude}
    run(model, raw, device=device, dtype=dtype, html=html)


@app.command("eval")
def eval_command(
    model: AnyArgument,
    text: Annotated[str, typer.Option(metavar="FILE", help="UTF-8 text to predict")],
    seq: Annotated[int, typer.Option(min=2, help="Tokens per window")] = 1024,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Only the text's first tokens; default: all")
    ] = None,
    bos: Annotated[
        str, typer.Option(help="tokenizer (once, as the paper), none, or window (in each)")
    ] = "tokenizer",
    plain: Annotated[bool, typer.Option("--plain", help="The model as it is, in 16 bit")] = False,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The 16-bit model to compare with")
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Exit code 1 if it is above the baseline by more"),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="128 or -1 = per channel; default: the artifact's, or 128")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="4, 8 or 16; default: the artifact's, or 4")
    ] = None,
    lm_head: LmHead = None,
    prefill_kv: Annotated[
        str, typer.Option(help="quantized, or exact = windows see 16-bit keys and values")
    ] = "quantized",
    device: Device = "auto",
    dtype: Dtype = "auto",
    glue: Annotated[str, typer.Option(help="inductor, or eager = no compile time")] = "inductor",
) -> None:
    """Perplexity and bits per byte on a text; with a baseline its increase and the logit KL.

    A model that is not an artifact is quantized first, by rounding to nearest; --plain leaves it.
    """
    with without_collector(freeze=True):
        from qoqc.cli.eval import Settings, run  # noqa: PLC0415  slow to import, see above

    settings = Settings(text, seq, tokens, bos, plain, baseline, max_ppl_increase)
    given = {"group_size": group_size, "kv_bits": kv_bits, "lm_head": lm_head}
    chosen = {name: value for name, value in given.items() if value is not None}
    raw = {**chosen, "prefill_kv": prefill_kv, "glue": glue}
    code = run(model, settings, raw, device=device, dtype=dtype)
    if code:
        raise typer.Exit(code)


app.command("serve")(serve_command)
app.command("bench")(bench_command)


@app.command("convert")
def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A directory: QServe, AWQ, GPTQ, compressed-tensors; with --to, an artifact",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory to write")],
    to: Annotated[str, typer.Option(help="qoqc = an artifact, or qserve")] = "qoqc",
    group_size: Annotated[
        int, typer.Option(help="128 or -1, for weights that are rounded anew")
    ] = 128,
    kv_bits: KvBits = 4,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact")] = False,
) -> None:
    """Make an artifact of a checkpoint that others quantized, or QServe's of an artifact."""
    from qoqc.cli.convert import run  # noqa: PLC0415  slow to import, see above

    raw = {"group_size": group_size, "kv_bits": kv_bits}
    run(source, output, raw, to=to, dtype=dtype, force=force)


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Check versions, GPUs, compilers and the cache, and say what will run where and why.

    Exit code 1 if something qoqc needs is missing or out of its range.
    """
    from qoqc.cli.doctor import run  # noqa: PLC0415  slow to import, see above

    code = run(as_json=as_json)
    if code:
        raise typer.Exit(code)


cache_app = typer.Typer()
app.add_typer(cache_app, name="cache")


@cache_app.callback(invoke_without_command=True)
def cache_root(ctx: typer.Context) -> None:
    """The generated kernels and the tuning table: list, check, remove."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@cache_app.command("ls")
def cache_ls_command() -> None:
    """What the cache directory holds, with sizes and ages."""
    from qoqc.cli.cache import list_entries  # noqa: PLC0415  slow to import, see above

    list_entries()


@cache_app.command("verify")
def cache_verify_command() -> None:
    """Check every file; exit code 1 if one is damaged."""
    from qoqc.cli.cache import verify  # noqa: PLC0415  slow to import, see above

    code = verify()
    if code:
        raise typer.Exit(code)


@cache_app.command("seed")
def cache_seed_command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Made with --arch")],
) -> None:
    """Take over an artifact's machine code, which will run on the GPU: only if you trust it."""
    from qoqc.cli.cache_seed import run  # noqa: PLC0415  slow to import, see above

    run(artifact)


@cache_app.command("prune")
def cache_prune_command(
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the oldest kernels beyond: 500MB")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove older kernels: 90m, 12h, 30d, 8w")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all kernels and the tuning table")
    ] = False,
) -> None:
    """Remove kernels beyond a size or an age; only files that qoqc wrote."""
    from qoqc.cli.cache import Limits, parse_age, parse_size, prune  # noqa: PLC0415  as above

    most = None if max_size is None else parse_size(max_size)
    oldest = None if older_than is None else parse_age(older_than)
    prune(Limits(everything, most, oldest))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: sys.argv) and return the exit code."""
    argv = None if arguments is None else list(arguments)
    try:
        code = app(args=argv, prog_name="qoqc", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # the reader went away (qoqc ... | head): nothing to say, and Python must not say it either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = message_of(error)
        if line is None:
            raise
        print(f"qoqc: error: {line}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def message_of(error: BaseException) -> str | None:
    """The line a user should read for `error`; None if it is a bug and needs its traceback."""
    own = own_error(error)
    if own is not None:
        return " ".join(str(own).split())
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    # usage errors: newer typers carry a copy of click, so there is no one class to name
    describe = getattr(error, "format_message", None)
    return " ".join(describe().split()) if describe is not None else None
