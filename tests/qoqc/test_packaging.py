"""The package list equals the tree, and no module has two names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qoqc.ir.ops

REPO = Path(__file__).resolve().parents[2]
PYPROJECT = (REPO / "pyproject.toml").read_text()
LINKED = ("passes", "codegen")


def folders_with_python() -> set[str]:
    """Every folder of the project that holds modules, by its import name."""
    found = set()
    for top, name in (("qoqc", "qoqc"), *((link, f"qoqc.{link}") for link in LINKED)):
        for file in (REPO / top).rglob("*.py"):
            inside = file.parent.relative_to(REPO / top).parts
            if top == "qoqc" and inside[:1] in {(link,) for link in LINKED}:
                continue  # the same files through a link (rglob follows links before 3.13)
            found.add(".".join((name, *inside)))
    return found


def listed(section: str, key: str) -> list[str]:
    """The strings of `key = [...]` in `[section]` of pyproject.toml (tomllib needs Python 3.11)."""
    body = PYPROJECT.split(f"[{section}]", 1)[1].split("\n[", 1)[0]
    match = re.search(rf"^{key} = \[(.*?)\]", body, re.MULTILINE | re.DOTALL)
    assert match is not None, f"no {key} in [{section}]"
    return re.findall(r'"([^"]+)"', match[1])


CENSUS = """
import importlib, json, pkgutil, sys
import torch
import qoqc.ir.ops

numerics = sorted({name.split(".")[0] for name in sys.modules})
cuda = torch.cuda.is_initialized()
for link in ("passes", "codegen"):
    folder = importlib.import_module(f"qoqc.{link}")
    for module in pkgutil.walk_packages(folder.__path__, f"qoqc.{link}."):
        importlib.import_module(module.name)
names = {
    name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", "")
}
print(json.dumps({"numerics": numerics, "cuda": cuda, "files": names}))
"""


@pytest.fixture(scope="module")
def census() -> dict[str, Any]:
    """What a fresh interpreter at the repository root holds once all of passes, codegen is in."""
    done = subprocess.run(
        [sys.executable, "-c", CENSUS], cwd=REPO, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_package_list_is_the_tree() -> None:
    packages = listed("tool.setuptools", "packages")
    assert len(packages) == len(set(packages))
    assert set(packages) == folders_with_python()


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_is_a_relative_link_and_mapped_for_the_build(name: str) -> None:
    link = REPO / "qoqc" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (REPO / name).resolve()
    assert not (REPO / name).is_symlink()
    mapping = PYPROJECT.split("[tool.setuptools.package-dir]", 1)[1].split("\n[", 1)[0]
    assert f'"qoqc.{name}" = "{name}"' in mapping


def test_modules_are_loaded_from_this_tree() -> None:
    assert Path(qoqc.ir.ops.__file__).resolve() == REPO / "qoqc" / "ir" / "ops.py"


@pytest.mark.parametrize("name", LINKED)
def test_no_module_is_loaded_under_a_second_name(name: str, census: dict[str, Any]) -> None:
    # from the root, `import passes` would find the folder: nothing of qoqc may do so
    files = census["files"]
    assert f"qoqc.{name}" in files
    assert [key for key in files if key.split(".")[0] == name] == []
    real = [str(Path(file).resolve()) for key, file in files.items() if key.startswith("qoqc")]
    assert len(real) == len(set(real))


def test_no_source_imports_a_folder_by_its_short_name() -> None:
    pattern = re.compile(rf"^\s*(from|import)\s+({'|'.join(LINKED)})\b", re.MULTILINE)
    sources = [
        file
        for top in ("qoqc", *LINKED, "tests", "examples", "benchmarks")
        for file in (REPO / top).rglob("*.py")
    ]
    assert len(sources) > 10
    assert [str(file) for file in sources if pattern.search(file.read_text())] == []


def test_the_numerics_need_neither_transformers_nor_a_gpu(census: dict[str, Any]) -> None:
    assert "qoqc" in census["numerics"]
    assert "transformers" not in census["numerics"]
    assert census["cuda"] is False


def test_typed_marker_is_shipped() -> None:
    assert (REPO / "qoqc" / "py.typed").is_file()
    assert listed("tool.setuptools.package-data", '"qoqc"') == ["py.typed"]
