"""What a benchmark is asked to measure."""

from __future__ import annotations

import dataclasses

from qoqc.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Plan:
    """The measurements of one run.

    batches           batch sizes whose decoding and prefill are measured, `gen` tokens after
                      `prompt`
    baseline_batches  the same for the 16-bit model
    prefill           (batch, tokens) of further prefills
    breakdown         batch sizes whose decode step is taken apart, around prompt + gen / 2 tokens
    served            (prompt, gen) of the run that counts prefill and decoding, or None
    served_batch      its batch; None = the largest that is expected to fit
    served_baseline   measure it for the 16-bit model too
    """

    batches: tuple[int, ...] = (1, 64)
    baseline_batches: tuple[int, ...] = (1, 64)
    prompt: int = 1024
    gen: int = 128
    prefill: tuple[tuple[int, int], ...] = ()
    breakdown: tuple[int, ...] = ()
    served: tuple[int, int] | None = None
    served_batch: int | None = None
    served_baseline: bool = False

    def __post_init__(self) -> None:
        if self.gen < 2:
            raise OptionError(f"--gen {self.gen}: decoding is timed by the tokens after the first")

    def longest(self) -> int:
        """The most tokens a sequence will have."""
        lengths = [self.prompt + self.gen] if self.batches or self.breakdown else [0]
        lengths += [tokens + 1 for _, tokens in self.prefill]
        return max(lengths + ([sum(self.served)] if self.served else []))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,16,64` as numbers; empty or `none` as none. Raises OptionError for anything else."""
    if text in ("", "none"):
        return ()
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise OptionError(f"{option} {text}: expected numbers like 1,16,64, or none")
    return tuple(map(int, words))


def pairs(option: str, text: str) -> tuple[tuple[int, int], ...]:
    """`8x1024,1x512` as pairs; empty or `none` as none. Raises OptionError for anything else."""
    if text in ("", "none"):
        return ()
    found = []
    for word in text.split(","):
        sizes = word.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise OptionError(f"{option} {text}: expected sizes like 8x1024, or none")
        found.append((int(sizes[0]), int(sizes[1])))
    return tuple(found)
