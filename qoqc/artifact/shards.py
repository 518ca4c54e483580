"""Weight files: safetensors of limited size with an index, as the Hugging Face Hub has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from qoqc.artifact.checked import Shard
from qoqc.artifact.manifest import INDEX, WEIGHTS
from qoqc.errors import OptionError

MAX_SHARD = "5GB"
"""What the Hub recommends: a file of that size is downloaded and cached well."""


def write_shards(
    tensors: dict[str, torch.Tensor], directory: Path, max_shard_size: int | str = MAX_SHARD
) -> dict[str, Shard]:
    """Write `tensors`, no two of which share storage, below `directory`; returns the files.

    One file if they fit; a single tensor larger than the limit gets a file of its own.
    Raises OptionError for a limit that is neither bytes nor a size such as "5GB".
    """
    require_size(max_shard_size)
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    shards = {}
    mode = (directory / "config.json").stat().st_mode
    for name, keys in split.filename_to_tensors.items():
        path = directory / name
        save_file({key: tensors[key] for key in keys}, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes it readable for the owner only
        shards[name] = Shard.hashed(path)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return shards


def require_size(limit: int | str) -> None:
    """Raise OptionError unless `limit` is what write_shards takes."""
    if not re.fullmatch(r"[1-9][0-9]*([KMGT]B)?", str(limit)):
        raise OptionError(f"max_shard_size {limit!r}: expected bytes or a size such as 5GB")


def shards_in(directory: Path) -> dict[str, Shard]:
    """The weight files that are in a directory."""
    stem = WEIGHTS.removesuffix(".safetensors")
    found = sorted([*directory.glob(WEIGHTS), *directory.glob(f"{stem}-*-of-*.safetensors")])
    return {path.name: Shard.hashed(path) for path in found}
