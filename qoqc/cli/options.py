"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory or a name on the Hugging Face Hub")
]
AnyArgument = Annotated[
    str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A model, or what `qoqc compile` wrote")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto = cuda if there is one")]
GroupSize = Annotated[int, typer.Option(help="Weights per group: 128, or -1 = per channel")]
KvBits = Annotated[int, typer.Option(help="Bits of the KV cache: 4, 8 or 16")]
LmHead = Annotated[
    str | None, typer.Option(help="16, w8a8 or w4a8; default: the artifact's, or 16")
]
Exclude = Annotated[
    list[str], typer.Option(metavar="PATTERN", help="Linears left in 16 bit; may be repeated")
]
Strict = Annotated[bool, typer.Option("--strict", help="A node left in 16 bit is an error")]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Of a weight file: 5GB, 500MB")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bf16, fp16 or fp32")]
RequireCached = Annotated[
    bool, typer.Option("--require-cached", help="Having to compile anything is an error")
]
