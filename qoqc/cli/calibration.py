"""Calibration for `qoqc compile`: its settings, its text, the run, and the gate behind it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

import qoqc.generate
from qoqc.artifact.save import versions
from qoqc.artifact.survey import survey
from qoqc.calibrate.checkpoint import Checkpoints, key_of
from qoqc.calibrate.driver import calibrate
from qoqc.calibrate.perplexity import Comparison, compare
from qoqc.calibrate.recipe import Recipe, Record
from qoqc.calibrate.text import Corpus, corpus, load_text, require_vocabulary
from qoqc.calibrate.windows import read_text
from qoqc.cli.progress import Steps
from qoqc.cli.source import load_model
from qoqc.config import Options
from qoqc.errors import OptionError, Unsupported

RECIPES = ("rtn", "qoq")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the options of `qoqc compile` say about calibration.

    calibrate         file, "default", or None
    recipe            "rtn", "qoq", or None: qoq if there is calibration text
    samples, seq      windows to calibrate on, and their tokens; seq None chooses
    seed              of the choice of windows and the rotation
    eval_text         file to judge on; None: the end of the calibration text, which is held out
    max_ppl_increase  percent that make exit code 1
    """

    calibrate: str | None = None
    recipe: str | None = None
    samples: int = 128
    seq: int | None = None
    seed: int = 0
    eval_text: str | None = None
    max_ppl_increase: float | None = None

    def calibrates(self) -> bool:
        """Is the recipe qoq? Raises OptionError for settings that contradict each other."""
        recipe = self.recipe or ("rtn" if self.calibrate is None else "qoq")
        if recipe not in RECIPES:
            raise OptionError(f"--recipe {recipe}: expected {' or '.join(RECIPES)}")
        if recipe == "qoq" and self.calibrate is None:
            raise OptionError(
                "--recipe qoq needs --calibrate TEXT; `--calibrate default` is a text of qoqc's own"
            )
        if recipe == "rtn":
            for name, value in (
                ("--calibrate", self.calibrate),
                ("--eval-text", self.eval_text),
                ("--max-ppl-increase", self.max_ppl_increase),
            ):
                if value is not None:
                    raise OptionError(
                        f"{name} belongs to --recipe qoq (--calibrate TEXT); `qoqc eval` judges "
                        "an artifact that was rounded to nearest"
                    )
        limit = self.max_ppl_increase
        if limit is not None and not math.isfinite(limit):
            raise OptionError(f"--max-ppl-increase {limit}: expected a percentage")
        return recipe == "qoq"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A calibrated model, the options it is to be saved with, and what is known about it."""

    model: Any
    options: Options
    record: Record
    gate: dict[str, Any]


def read_corpus(model_name: str, config: Any, tokenizer: Any, settings: Settings) -> Corpus:
    """The text as windows. Raises before any weights are loaded."""
    assert settings.calibrate is not None, "calibrates() checks"
    if tokenizer is None:
        raise Unsupported(f"{model_name} has no tokenizer, and calibration text needs one")
    own = config.get_text_config(decoder=True)
    found = corpus(
        load_text(settings.calibrate),
        tokenizer,
        samples=settings.samples,
        seq=settings.seq,
        seed=settings.seed,
        longest=getattr(own, "max_position_embeddings", None),
        eval_text=None if settings.eval_text is None else read_text(settings.eval_text),
    )
    for windows in (found.windows, found.held_out.tokens):
        require_vocabulary(windows, int(own.vocab_size), model_name)
    return found


def run_recipe(
    model: Any,
    model_name: str,
    text: Corpus,
    settings: Settings,
    options: Options,
    partial: Path,
    shown: Steps,
) -> Outcome:
    """Calibrate `model` in place, then compare it with the 16-bit model of that name.

    partial  directory of the finished layers, for the next run if this one is killed
    """
    recipe = Recipe(options.group_size, options.kv_bits, seed=settings.seed)
    shown.start("Reading the model's structure")
    weights = survey(model, options).weights
    key = key_of(model, text.windows, recipe, [ref.name for ref in weights], versions())
    shown.start("Calibrating")
    record = calibrate(
        model,
        text.windows,
        weights,
        recipe,
        checkpoints=Checkpoints(partial, key),
        progress=shown.update,
    )
    options = dataclasses.replace(options, kv_layers=record.kv_layers())
    shown.start("Comparing with the 16-bit model")
    baseline = load_model(model_name, model.device, model.dtype)
    judged = dataclasses.replace(options, prefill_kv="quantized", glue="eager")
    qoqc.generate.compile(model, **dataclasses.asdict(judged))
    found = compare(model, baseline, text.held_out, shown.update)
    torch._dynamo.reset()  # what was compiled for judging is not what will run
    return Outcome(model, options, record, _gate(found, text, settings))


def _gate(found: Comparison, text: Corpus, settings: Settings) -> dict[str, Any]:
    """The comparison as the manifest holds it; no seconds, which are never the same."""
    windows, seq = text.held_out.tokens.shape
    return {
        "text": "held out" if settings.eval_text is None else Path(settings.eval_text).name,
        "windows": windows,
        "seq": seq,
        "perplexity": found.model.perplexity,
        "baseline": found.baseline.perplexity,
        "increase": found.increase,
        "kl": found.kl,
        "agreement": found.agreement,
    }
