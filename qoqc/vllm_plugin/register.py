"""What the entry point names: vLLM calls it in each of its processes."""

from __future__ import annotations

import importlib

CONFIG = "qoqc.vllm_plugin.config"
"""The module that imports vLLM, so it is imported by its name and not before vLLM asks."""


def register() -> None:
    """Make "qoq" a quantization method of vLLM; again and again is as good as once.

    vLLM logs the error of a plug-in that it cannot import, and goes on without it; one raised
    here ends it.
    """
    importlib.import_module(CONFIG)
