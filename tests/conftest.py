"""Fixtures of all tests. Without a GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which is after this file
    os.environ.setdefault("TRITON_INTERPRET", "1")


# graphs compiled by earlier sessions are used again: qoqc would keep them in its own cache, which
# is another one in every session
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/qoqc-tests-{getpass.getuser()}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite tests/codegen/golden")
    parser.addoption(
        "--model-dir", help="checkpoint for end-to-end tests instead of the bundled one"
    )


QUICK_FAMILIES = frozenset(
    {"llama", "qwen3", "phi3", "gpt_neox", "gpt2", "falcon", "olmo2", "mixtral"}
)
"""Enough kinds of structure for `make check`."""

FAMILY_TESTS = frozenset(
    {"structure", "folds", "test_fuse_norm.py", "test_fuse_act.py", "test_rotary.py"}
    | {"test_families.py"}
)
"""Folders and files whose tests of the other families have the marker slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")  # type: ignore[attr-defined]
        among = FAMILY_TESTS & set(item.path.parts)
        if among and isinstance(family, str) and family not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Generated kernels and tuning tables of tests stay out of the user's cache."""
    path = tmp_path_factory.mktemp("qoqc-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QOQC_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def model_dir(request: pytest.FixtureRequest) -> Path:
    """A checkpoint with a chat template: the bundled one, or that of --model-dir."""
    given = request.config.getoption("--model-dir")
    return Path(given) if given else Path(__file__).parents[1] / "examples/models/llama-stories-4m"
