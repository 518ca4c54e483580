"""Which releases of transformers have a continuous batching that qoqc can put its pages into.

Its KV store, its batches and its manager have no public place for other ones: they are subclassed,
one package per release that does, and nothing else of qoqc's touches them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import transformers

from qoqc.errors import Unsupported

HOSTS = {"5.23": "qoqc.serve.transformers_5_23.manager"}
"""Release, major and minor, and the module that subclasses its manager."""


def host(version: str = transformers.__version__) -> ModuleType:
    """The module for the installed transformers.

    Raises Unsupported, with what is installed and what would do, for other releases.
    """
    release = ".".join(version.split(".")[:2])
    if release not in HOSTS:
        newest = max(HOSTS, key=lambda name: [int(part) for part in name.split(".")])
        raise Unsupported(
            f"transformers {version} is installed, and continuous batching over a 4-bit cache "
            f"works with {', '.join(HOSTS)}; pip install 'transformers=={newest}.*'"
        )
    return importlib.import_module(HOSTS[release])
