"""`qoqc serve`: an OpenAI-compatible server for a model or an artifact."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import qoqc.generate
from qoqc.artifact.manifest import is_artifact
from qoqc.cli.progress import console, waiting
from qoqc.cli.source import (
    changed_options,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
)
from qoqc.errors import OptionError, Unsupported
from qoqc.serve.engine import engine as kv4_engine
from qoqc.serve.http.plain import plain_engine

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
"""Packages of the extra `serve`."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The engine's sizes, None = its own choice, and its kind; see qoqc.serve.engine.engine."""

    max_requests: int | None
    max_step_tokens: int | None
    pages: int | None
    memory: float | None
    greedy: bool
    plain: bool

    def __post_init__(self) -> None:
        if self.memory is not None and not 0 < self.memory <= 1:
            raise OptionError(f"--memory {self.memory}: expected a fraction, above 0 and up to 1")

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of both kinds of engine."""
        return {
            "max_requests": self.max_requests,
            "max_tokens_per_batch": self.max_step_tokens,
            "num_pages": self.pages,
            "memory_fraction": self.memory,
        }


def run(
    model_name: str,
    engine: EngineSettings,
    limits: dict[str, Any],
    *,
    host: str,
    port: int,
    api_key_file: str | None,
    name: str | None,
    device: str,
    dtype: str,
    glue: str,
    require_cached: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. limits: fields of Settings."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise Unsupported(f"qoqc serve needs {', '.join(missing)}: pip install 'qoqc[serve]'")
    from qoqc.serve.http.lifecycle import address_of, bind, is_loopback, serve  # noqa: PLC0415  extra
    from qoqc.serve.http.service import Service  # noqa: PLC0415  extra
    from qoqc.serve.http.settings import Settings  # noqa: PLC0415  extra

    where, kind = choose_device(device), choose_dtype(dtype)
    options = changed_options(glue, require_cached=require_cached)
    if engine.plain and require_cached:
        raise OptionError("--require-cached: others compile what --plain runs; leave one out")
    key = None if api_key_file is None else read_key(api_key_file)
    settings = Settings(name or default_name(model_name), key, **limits)
    prepare()
    with bind(host, port) as bound:
        if key is None and not is_loopback(bound):
            console.print(f"{host}: open to the network without a key; see --api-key-file")
        with waiting(f"Loading {model_name}"):
            load_config(model_name)
            tokenizer = load_tokenizer(model_name)
            if tokenizer is None:
                raise Unsupported(f"{model_name} has no tokenizer, and a server needs one")
            model = _load(model_name, engine, where, kind, options)
            driver = _driver(model, engine)
            driver.start()
        try:
            service = Service(driver, model, tokenizer, settings)
            pages = driver.pages().total
            console.print(
                f"{settings.model_name} at {address_of(bound)}/v1, "
                f"{pages} pages of KV cache, requests of up to {service.bounds().context} tokens",
                soft_wrap=True,
            )
            serve(service, bound)
        finally:
            # its thread would keep the process alive
            driver.stop()


def read_key(path: str) -> str:
    """The first line of a file. Raises OptionError if it is empty."""
    lines = Path(path).read_text().splitlines()
    if not lines or not lines[0].strip():
        raise OptionError(f"--api-key-file {path}: the first line is empty, it should hold the key")
    return lines[0].strip()


def default_name(model_name: str) -> str:
    """What clients call a model: a Hub name as it is, a directory by its own name."""
    is_directory = os.path.isdir(model_name)
    return Path(model_name).resolve().name if is_directory else model_name


def _load(
    name: str,
    engine: EngineSettings,
    device: torch.device,
    dtype: torch.dtype | str,
    options: dict[str, Any],
) -> Any:
    if is_artifact(Path(name)):
        if engine.plain:
            raise OptionError(f"--plain: {name} is an artifact, it has no 16-bit weights")
        return qoqc.generate.load(name, device, **options)
    model = load_model(name, device, dtype)
    return model if engine.plain else qoqc.generate.compile(model, release=True, **options)


def _driver(model: Any, engine: EngineSettings) -> Any:
    from qoqc.serve.http.driver import Driver  # noqa: PLC0415  extra

    # every request brings its own sampling, and the argmax of what that makes is taken
    config = GenerationConfig(
        do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0
    )
    if engine.plain:
        manager = plain_engine(model, config, **engine.sizes())
    else:
        manager = kv4_engine(model, generation_config=config, **engine.sizes())
    return Driver(manager, greedy=engine.greedy)
