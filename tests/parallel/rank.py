"""One rank of test_two_ranks.py: python rank.py FOLDER RANK; the jobs are in FOLDER/jobs.json.

Each job is {"name", ...arguments of run()}; its results, or the error, go to FOLDER/NAME.RANK.pt.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import qoqc
from qoqc.errors import QoqcError
from qoqc.parallel.load import load_model
from qoqc.parallel.ranks import join
from qoqc.runtime.weights import STORE

TOKENS = torch.tensor([[1, 3, 56, 207, 302, 263, 14, 300, 263, 216, 18, 4]])


def results(model: Any, wanted: list[str], new: int) -> dict[str, Any]:
    """What a model gives: eager logits; compiled: logits of steps on a KV4 cache, tokens."""
    found: dict[str, Any] = {}
    tokens = TOKENS.to(model.device)
    with torch.no_grad():
        if "logits" in wanted:
            found["logits"] = model.forward(tokens, use_cache=False).logits
        if "steps" in wanted:
            cache = qoqc.KV4Cache(model.config, max_cache_len=64)
            chunks = tokens[:, :-3], *tokens[:, -3:].split(1, dim=1)
            given = [model(chunk, past_key_values=cache).logits[:, -1] for chunk in chunks]
            found["steps"] = torch.stack(given)
    for name in ("greedy", "sampled"):
        if name in wanted:
            found[name] = model.generate(
                tokens, max_new_tokens=new, do_sample=name == "sampled", eos_token_id=None
            )
    return {name: value.cpu() for name, value in found.items()}


def run(
    artifact: str,
    do: list[str],
    new: int = 8,
    eager: bool = False,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Load an artifact as `options` say, compiled or not, and its results."""
    torch._dynamo.reset()
    if eager:
        model, _ = load_model(artifact, join(2, device), exact=options["tp_exact"])
    else:
        model = qoqc.load(artifact, device, tp=2, **options)
    found = results(model, do, new)
    found["bytes"] = model.qoqc_parallel.bytes_read
    packed = [bundle.packed.tensors().values() for bundle in STORE.bundles_of(model)]
    found["memory"] = sum(t.numel() * t.element_size() for tensors in packed for t in tensors)
    found["parts"] = {
        name: tuple(param.shape) for name, param in model.named_parameters() if "layers.0." in name
    }
    return found


def main() -> None:
    """Join the other ranks and do every job."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    jobs = json.loads((folder / "jobs.json").read_text())
    backend = "nccl" if "cuda" in [job.get("device") for job in jobs] else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    for job in jobs:
        name = job.pop("name")
        try:
            found = run(**job)
        except QoqcError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, folder / f"{name}.{rank}.pt")
        dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
