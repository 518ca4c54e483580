"""One answer from a model in W4A8KV4, the plain torch.compile way.

    python examples/chat.py examples/models/llama-stories-4m "Tell me a story about a dog."

    Once upon a time, there was a dog named Max. ...
    graph000: 35 linears quantized, 0 attentions; left in 16 bit: model.embed_tokens: shares ...
    graph001: 35 linears quantized, 5 attentions; left in 16 bit: model.embed_tokens: shares ...

graph000 is the prefill, which attends to its own exact keys and values; graph001 is one token.
`--glue eager` skips Inductor: it starts at once and is good for a look at the graphs.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from qoqc import KV4Cache
from qoqc.pipeline import reports


def main() -> None:
    """Load, compile, answer, report."""
    parser = argparse.ArgumentParser(description="One answer in W4A8KV4.")
    parser.add_argument("model", help="directory or Hub name of a decoder")
    parser.add_argument("prompt", nargs="?", default="Tell me a story about a dog.")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--glue", default="inductor", choices=["inductor", "eager"])
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)

    # the two lines that matter; not torch.compile(model).generate(), which torch leaves uncompiled
    model.compile(backend="qoq", options={"group_size": 128, "glue": args.glue})
    cache = KV4Cache(model.config, max_cache_len=512)

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(device)
    with torch.no_grad():
        model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            disable_compile=True,  # generate() would compile once more on top
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    for report in reports:
        print(report)


if __name__ == "__main__":
    main()
