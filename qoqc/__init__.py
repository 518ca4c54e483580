"""qoqc: W4A8KV4 for any Hugging Face decoder, as the torch.compile backend "qoq"."""

from __future__ import annotations

import importlib
from typing import Any

from qoqc.importing import without_collector
from qoqc.registration import register

__version__ = "0.1.0"

_LAZY = {
    "compile": "qoqc.generate",
    "load": "qoqc.generate",
    "save": "qoqc.artifact.save",
    "KV4Cache": "qoqc.runtime.kv_cache",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import qoqc` alone stays cheap and free of circles."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qoqc' has no attribute {name!r}")
    with without_collector():
        module = importlib.import_module(_LAZY[name])
    return getattr(module, name)


register()
