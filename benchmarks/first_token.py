"""Time from the start of a process to a model's first token, with everything cached.

    python benchmarks/first_token.py ARTIFACT [--runs 5] [--prompt TEXT]

A run is `qoqc chat` as a user calls it: once to fill the caches, then with --require-cached, for
one token and for ten. Times are of whole processes, their end included; the least of each is
printed, as a line of JSON: seconds, and processor seconds of the process and of those it started.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

TOKENS = (1, 10)
"""Numbers of them: the first by itself, and with those that the decode graph makes."""


def run(artifact: str, prompt: str, tokens: int, *more: str) -> tuple[float, float]:
    """Wall and processor seconds of a chat. Raises CalledProcessError if it fails."""
    command = ["chat", artifact, "--prompt", prompt, "--max-new-tokens", str(tokens), *more]
    before, start = _processor_seconds(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "qoqc", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, _processor_seconds() - before


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, and give what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args(arguments)
    run(args.artifact, args.prompt, TOKENS[-1])
    found: dict[str, float] = {}
    for tokens in TOKENS:
        more = (args.artifact, args.prompt, tokens, "--require-cached")
        times = [run(*more) for _ in range(args.runs)]
        found[f"seconds, {tokens} tokens"] = round(min(wall for wall, _ in times), 2)
        found[f"processor seconds, {tokens} tokens"] = round(min(used for _, used in times), 2)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
