"""Makes the plug-in known to transformers as soon as both are imported, whichever comes first.

transformers has no entry point for quantizers, and `import qoqc` shall not import it: that takes
seconds. So the plug-in is imported when transformers' loader has been.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

LOADER = "transformers.modeling_utils"
"""The module whose from_pretrained looks quantizers up; all that the plug-in needs of transformers
is imported by then."""

PLUGIN = "qoqc.artifact.huggingface"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds LOADER as the finders behind it do, and has its loader import PLUGIN when done."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every other module, and while the real one is looked for."""
        if name != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        importlib.import_module(PLUGIN)

    def __getattr__(self, name: str) -> object:
        """What else a loader may be asked: source, file name."""
        return getattr(self._real, name)


def register() -> None:
    """Import the plug-in, now if transformers' loader is there, else right after it."""
    if LOADER in sys.modules:
        importlib.import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, _Finder())
