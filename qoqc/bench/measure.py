"""Times of `model.generate`: a decode step, the prefill, and both as a server sees them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Generate = Callable[..., torch.Tensor]
"""generate(tokens, **more) -> sequences: exactly `tokens` greedy tokens after a random prompt."""

REPEATS = 3
"""Runs of which the best counts: the machine's own interruptions only ever add time."""

LONG = 5.0
"""Seconds from which on one run is enough."""


@dataclasses.dataclass(frozen=True)
class System:
    """A model to be measured: `extra` are arguments of its generate()."""

    name: str
    model: Any
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def generator(self, batch: int, prompt: int) -> Generate:
        """Generation after `batch` random prompts of `prompt` tokens, without early stops."""
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        rng = torch.Generator().manual_seed(0)
        # 0 to 2 are often the special tokens
        ids = torch.randint(3, vocab, (batch, prompt), generator=rng).to(self.device)
        mask = torch.ones_like(ids)

        def generate(tokens: int, **more: Any) -> torch.Tensor:
            # no eos, rather than min_new_tokens: that would add a logits processor
            out: torch.Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **{**self.extra, **more},
            )
            return out

        return generate


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a system does at one batch size.

    step_ms        time per decode step, the mean of those after `prompt` to `prompt + gen` tokens
    decode_tok_s   tokens of all sequences per second of decoding
    prefill_tok_s  prompt tokens per second of the time to the first new token
    first_call_s   the first generation of this batch, compilation included
    peak_gib       most device memory allocated from after the first call on; None on a CPU
    """

    system: str
    batch: int
    prompt: int
    gen: int
    step_ms: float
    decode_tok_s: float
    prefill_tok_s: float
    first_call_s: float
    peak_gib: float | None


def measure_speed(system: System, batch: int, prompt: int, gen: int) -> Speed:
    """Decode and prefill speed.

    Decoding is the difference between generations of `gen` tokens and of one: so prefill and
    set-up cancel. gen must be at least 2.
    """
    generate = system.generator(batch, prompt)
    first = _seconds(partial(generate, gen), system.device)
    generate(1)  # its cache is shorter: that, too, may compile
    _reset_peak(system.device)
    short, long = (best_seconds(partial(generate, n), system.device) for n in (1, gen))
    step = (long - short) / (gen - 1)
    return Speed(
        system=system.name,
        batch=batch,
        prompt=prompt,
        gen=gen,
        step_ms=1e3 * step,
        decode_tok_s=batch / step,
        prefill_tok_s=batch * prompt / short,
        first_call_s=first,
        peak_gib=_peak_gib(system.device),
    )


@dataclasses.dataclass(frozen=True)
class Served:
    """Generated tokens per second, prefill included; `tok_s` None where the batch does not fit."""

    system: str
    batch: int
    prompt: int
    gen: int
    seconds: float | None
    tok_s: float | None
    peak_gib: float | None
    note: str = ""


def measure_served(system: System, batch: int, prompt: int, gen: int) -> Served:
    """One generation of `gen` tokens for `batch` prompts at once, after a warm-up.

    If memory does not suffice it tries three quarters of the batch, down to one, and notes it.
    """
    tried = []
    while True:
        generate = system.generator(batch, prompt)
        try:
            generate(gen)
            _reset_peak(system.device)
            seconds = _seconds(partial(generate, gen), system.device)
        except torch.OutOfMemoryError as error:
            tried.append(batch)
            if batch == 1:
                note = f"out of memory at batch 1: {str(error).splitlines()[0]}"
                return Served(system.name, 1, prompt, gen, None, None, None, note)
            batch = max(3 * batch // 4, 1)
            continue
        note = f"out of memory at batch {', '.join(map(str, tried))}" if tried else ""
        peak = _peak_gib(system.device)
        rate = batch * gen / seconds
        return Served(system.name, batch, prompt, gen, seconds, rate, peak, note)


def best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The best of REPEATS timed calls; of one, if that is long."""
    best = _seconds(call, device)
    if best < LONG:
        best = min(best, *(_seconds(call, device) for _ in range(REPEATS - 1)))
    return best


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
