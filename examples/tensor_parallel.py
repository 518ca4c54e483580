"""One answer from an artifact that several processes hold together.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py ARTIFACT "Tell me a story about a dog."

    Once upon a time, there was a dog named Max. ...
    rank 0 of 2 read 3.0 MB of the artifact's 3.7 MB

ARTIFACT is a directory of `qoqc compile`, here of examples/models/llama-stories-4m, of which the
embedding is more than half: that all ranks hold. Each process uses a GPU of its own, or all of them
the CPU. Every process makes the same calls; the first one prints.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, TextStreamer

import qoqc


def main() -> None:
    """Load this rank's part, answer, report."""
    parser = argparse.ArgumentParser(description="One answer, on several GPUs.")
    parser.add_argument("artifact", help="directory of a compiled model")
    parser.add_argument("prompt", nargs="?", default="Tell me a story about a dog.")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--glue", default="inductor", choices=["inductor", "eager"])
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    # the line that matters; "auto" = as many ranks as torchrun started
    model = qoqc.load(args.artifact, device, tp="auto", glue=args.glue)
    part = model.qoqc_parallel

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    first = part.ranks.rank == 0
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        streamer=streamer if first else None,
    )
    if first:
        read, total = part.bytes_read / 1e6, part.bytes_total / 1e6
        print(f"rank 0 of {part.ranks.size} read {read:.1f} MB of the artifact's {total:.1f} MB")

    if dist.is_initialized():
        del model
        gc.collect()  # CUDA graphs hold what belongs to the process group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
