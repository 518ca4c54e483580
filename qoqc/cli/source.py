"""Loading a Hugging Face model for a command, with every bad input answered in one line."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qoqc.backend import check_torch_version
from qoqc.config import Options
from qoqc.errors import OptionError, Unsupported
from qoqc.ir.spec import OUTPUT_DTYPES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What transformers raises for missing, damaged or foreign files."""


def prepare() -> None:
    """Check the torch version; keep the libraries from writing into the output."""
    problem = check_torch_version()
    if problem is not None:
        raise Unsupported(problem)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\.")


def choose_device(name: str) -> torch.device:
    """The device for `--device`."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise Unsupported("--device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str) -> torch.dtype | str:
    """The dtype for `--dtype`, as from_pretrained takes it."""
    if name not in ("auto", *DTYPES):
        raise OptionError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, "auto")


def changed_options(glue: str, *, require_cached: bool) -> dict[str, Any]:
    """The options of qoqc.compile that a command line changes; an artifact keeps its other ones.

    Raises OptionError for a value they do not have.
    """
    given = Options.parse({"glue": glue, "require_cached": require_cached})
    values = {"glue": given.glue, "require_cached": given.require_cached}
    return {name: value for name, value in values.items() if value != getattr(Options(), name)}


def load_config(name: str) -> Any:
    """The config of a decoder. Raises Unsupported if there is none, or it is no decoder's."""
    if os.path.isfile(name) or (not os.path.isdir(name) and _is_path(name)):
        raise Unsupported(f"{name} is not a directory with a model")
    try:
        config = AutoConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise Unsupported(f"{name}: no readable config.json: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{name} is an encoder-decoder model ({config.model_type}); qoqc compiles decoders only"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise Unsupported(
            f"{name} ({config.model_type}) is not a causal language model that transformers knows"
        )
    return config


def load_model(name: str, device: torch.device, dtype: torch.dtype | str = "auto") -> Any:
    """A decoder in 16 or 32 bit on `device`, from safetensors files only (no pickle)."""
    config = load_config(name)
    if getattr(config, "quantization_config", None):
        raise Unsupported(f"{name} is quantized already; make an artifact of it by qoqc convert")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except _LOADING_ERRORS as error:
        raise Unsupported(f"{name}: the weights cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise Unsupported(
            f"{name}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
        )
    if model.dtype not in OUTPUT_DTYPES:
        given = str(model.dtype).removeprefix("torch.")
        raise Unsupported(f"{name} has dtype {given}; choose --dtype {', '.join(DTYPES)}")
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer, or None if the directory has none; Unsupported if it cannot be read."""
    if os.path.isdir(name) and not any(Path(name).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (*_LOADING_ERRORS, json.JSONDecodeError) as error:
        raise Unsupported(f"{name}: no readable tokenizer: {_first_line(error)}") from error


def _is_path(name: str) -> bool:
    """A Hub name is `name` or `owner/name`; anything else must be a directory."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
