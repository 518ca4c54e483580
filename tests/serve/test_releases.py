"""The releases of transformers whose private classes are subclassed, and the others."""

from __future__ import annotations

from types import ModuleType

import pytest
import transformers

from qoqc.errors import Unsupported
from qoqc.serve import releases


def test_a_supported_release_has_a_manager(host: ModuleType) -> None:
    assert host.Manager.__mro__[1].__module__.startswith("transformers.")
    assert releases.host(f"{transformers.__version__}.dev0") is host


@pytest.mark.parametrize("version", ["5.17.0", "6.0.0", "5.230.1"])
def test_other_releases_are_named_with_what_would_do(version: str) -> None:
    expected = rf"transformers {version} is installed.*works with 5\.23; pip install 'transformers"
    with pytest.raises(Unsupported, match=expected):
        releases.host(version)
