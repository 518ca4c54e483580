"""`qoqc eval`: perplexity and bits per byte on a text, and the distance from a baseline."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import qoqc.generate
from qoqc.artifact.manifest import Manifest, is_artifact
from qoqc.calibrate.perplexity import Comparison, Score, compare, evaluate
from qoqc.calibrate.windows import BOS, Bos, Windows, cut_windows, read_text
from qoqc.cli.progress import steps
from qoqc.cli.record import kv_text, show_artifact
from qoqc.cli.source import (
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from qoqc.config import Options
from qoqc.errors import OptionError, Unsupported


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    text       file
    seq        tokens per window
    tokens     only the first of the text; None = all
    bos        see cut_windows
    plain      the model as it is, in 16 bit
    baseline   model or artifact to compare with; a model is not compiled
    max_ppl_increase  percent above the baseline that make exit code 1
    """

    text: str
    seq: int
    tokens: int | None
    bos: str
    plain: bool
    baseline: str | None
    max_ppl_increase: float | None

    def check(self) -> Bos:
        """The bos setting. Raises OptionError for settings that contradict each other."""
        if self.max_ppl_increase is not None and self.baseline is None:
            raise OptionError("--max-ppl-increase needs --baseline MODEL, the 16-bit model")
        if self.max_ppl_increase is not None and not math.isfinite(self.max_ppl_increase):
            raise OptionError(f"--max-ppl-increase {self.max_ppl_increase}: expected a percentage")
        for known in BOS:
            if self.bos == known:
                return known
        raise OptionError(f"--bos {self.bos}: expected {', '.join(BOS)}")


def run(
    model_name: str, settings: Settings, raw_options: dict[str, Any], *, device: str, dtype: str
) -> int:
    """Print the figures; returns the exit code: 1 if the increase is above the limit, else 0.

    raw_options  options of qoqc.compile; for an artifact they replace its own
    """
    bos = settings.check()
    Options.parse(raw_options)
    where, kind = choose_device(device), choose_dtype(dtype)
    prepare()
    text = read_text(settings.text)
    windows = _windows(model_name, text, settings, bos)
    start = time.perf_counter()
    comparison: Comparison | None = None
    with steps() as shown:
        shown.start(f"Loading {model_name}")
        model = load_any(model_name, where, kind, raw_options, plain=settings.plain)
        if settings.baseline is None:
            shown.start("Evaluating")
            score = evaluate(model, windows, shown.update)
        else:
            shown.start(f"Loading {settings.baseline}")
            artifact = is_artifact(Path(settings.baseline))
            baseline = load_any(settings.baseline, where, kind, raw_options, plain=not artifact)
            shown.start("Evaluating")
            comparison = compare(model, baseline, windows, shown.update)
            score = comparison.model
        shown.finish()
    _show(f"{model_name}: {_describe(model)}", score, windows, time.perf_counter() - start)
    code = 0 if comparison is None else _judge(comparison, settings)
    if is_artifact(Path(model_name)):
        print(f"\nwhen {model_name} was made:")
        show_artifact(Manifest.read(Path(model_name)), model_name)
    return code


def _windows(model_name: str, text: str, settings: Settings, bos: Bos) -> Windows:
    """The windows of the text, cut with the model's tokenizer, before any weights are loaded."""
    config = load_config(model_name).get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.seq > longest:
        raise OptionError(f"--seq {settings.seq}: {model_name} takes {longest} tokens at most")
    tokenizer = load_tokenizer(model_name)
    if tokenizer is None:
        raise Unsupported(f"{model_name} has no tokenizer, and text needs one")
    windows = cut_windows(text, tokenizer, settings.seq, settings.tokens, bos)
    top, size = int(windows.tokens.max()), int(config.vocab_size)
    if top >= size:
        raise Unsupported(
            f"{model_name}: its tokenizer gave token {top}, its vocabulary has {size} entries; "
            "it is another model's tokenizer"
        )
    return windows


def load_any(
    name: str,
    device: torch.device,
    dtype: torch.dtype | str,
    raw_options: dict[str, Any],
    *,
    plain: bool,
) -> Any:
    """An artifact, or a model compiled with `raw_options`; `plain` leaves a model as it is."""
    if is_artifact(Path(name)):
        if plain:
            raise OptionError(f"plain: {name} is an artifact, it has no 16-bit weights")
        return qoqc.generate.load(name, device, **raw_options)
    model = load_model(name, device, dtype)
    return model if plain else qoqc.generate.compile(model, **raw_options)


def _describe(model: Any) -> str:
    """What a model runs in: `W4A8KV4, g128`, or its dtype."""
    options: Options | None = getattr(model, "qoqc_options", None)
    if options is None:
        return str(model.dtype).removeprefix("torch.")
    kind = "per channel" if options.group_size == -1 else f"g{options.group_size}"
    rounded = options.prefill_kv == "quantized" and options.kv_bits != 16
    bits = kv_text(options.kv_bits, options.kv_layers)
    kv = f"W4A8KV{bits}" if rounded else "W4A8, exact keys and values"
    return f"{kv}, {kind}"


def _show(title: str, score: Score, windows: Windows, seconds: float) -> None:
    count, seq = windows.tokens.shape
    print(title)
    print(f"perplexity  {score.perplexity:.4f}")
    print(f"bits/byte   {score.bits_per_byte:.4f}")
    print(f"tokens      {score.tokens} predicted, {count} windows of {seq}; {seconds:.1f} s")


def _judge(found: Comparison, settings: Settings) -> int:
    """Print the comparison; 1 if it is beyond the limit, NaN included."""
    print(f"baseline    {found.baseline.perplexity:.4f} ({settings.baseline})")
    print(f"increase    {found.increase:+.2f} %")
    print(f"KL          {found.kl:.5f} nats per token")
    print(f"same top-1  {100 * found.agreement:.2f} %")
    limit = settings.max_ppl_increase
    if limit is None or found.increase <= limit:
        return 0
    line = f"the perplexity increase of {found.increase:.2f} % is above the limit of {limit:g} %"
    print(f"qoqc: {line}", file=sys.stderr)
    return 1
