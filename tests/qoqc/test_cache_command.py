"""`qoqc cache`: what it lists, what it finds wrong, what it removes, and what it never touches."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from rich.filesize import decimal

from qoqc.cli import cache, main
from qoqc.cli.cache_files import FIRST_LINE
from qoqc.codegen.build import OPS, build
from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.tuning import choose, table
from qoqc.errors import OptionError
from qoqc.runtime.device import DeviceKey

KEY = DeviceKey("interpreter", 80, 1, 163 * 1024)
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kernel(width: int, days: float = 0) -> Path:
    """A kernel as the compiler writes it, made so long ago."""
    spec = QuantizeSpec(width, torch.float32)
    family, tile = choose.known(OPS["quantize"], spec, 1, KEY)
    path = build(family, spec, tile).path
    stamp = time.time() - days * DAY
    os.utime(path, (stamp, stamp))
    return path


def tune() -> Path:
    spec = QuantizeSpec(256, torch.float32)
    key = table.entry_key(OPS["quantize"], spec, 1, KEY)
    table.record(key, OPS["quantize"].forms[0], Tile((("BLOCK", 256),), 4, 1))
    return table.table_path()


def foreign(folder: Path) -> list[Path]:
    """Files that someone else put there, with names as near to ours as can be."""
    paths = [
        folder / "notes.txt",
        folder / "other.json",
        folder / "kernels" / "mine.py",
        folder / "kernels" / "mine-0123abcd.py",
        folder / "kernels" / "deep" / "quantize-0123abcd.py",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    outside = folder.parent / "outside.py"
    outside.write_bytes(FIRST_LINE + b'"""\n')
    link = folder / "kernels" / "quantize-89abcdef.py"
    link.symlink_to(outside)
    return [*paths, outside, link]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_without_a_command_it_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    out = said(capsys)
    assert all(command in out for command in ("ls", "verify", "prune"))


def test_an_empty_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ls"], ["verify"], ["prune", "--all"]):
        assert main(["cache", *command]) == 0
        assert "0 kernels" in said(capsys)
    assert not folder.exists(), "looking makes nothing"


def test_ls_shows_what_the_compiler_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [kernel(256), kernel(512, days=3), tune()]
    foreign(folder)
    assert main(["cache", "ls"]) == 0
    out = said(capsys)
    total = sum(path.stat().st_size for path in paths)
    assert f"2 kernels, 1 tuning table ({decimal(total)})" in out
    for path in paths:
        assert path.name in out
    assert "3 d" in out
    assert "mine" not in out


def test_verify_finds_the_compiler_s_files_sound(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel(256)
    tune()
    assert main(["cache", "verify"]) == 0
    assert "0 not sound" in said(capsys)


@pytest.mark.parametrize("damage", ["end", "beginning", "empty"])
def test_verify_names_a_damaged_kernel(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = kernel(256), kernel(512)
    text = bad.read_bytes()
    bad.write_bytes({"end": text + b"\n", "beginning": b"#" + text, "empty": b""}[damage])
    assert main(["cache", "verify"]) == 1
    out = said(capsys)
    assert bad.name in out
    assert good.name not in out
    assert "1 not sound" in out


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"version": -1, "entries": []}), "version -1"),
        (json.dumps({"version": table.VERSION, "entries": [{"op": "x"}]}), "damaged"),
    ],
)
def test_verify_names_an_unreadable_table(
    text: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune().write_text(text)
    assert main(["cache", "verify"]) == 1
    assert reason in said(capsys)


def test_prune_by_age_and_by_size_takes_the_oldest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, middle, old = kernel(256), kernel(512, days=2), kernel(1024, days=9)
    best = tune()
    assert main(["cache", "prune", "--older-than", "8d"]) == 0
    assert "removed 1 kernel " in said(capsys)
    assert [path.exists() for path in (new, middle, old)] == [True, True, False]
    assert main(["cache", "prune", "--max-size", str(new.stat().st_size)]) == 0
    assert [path.exists() for path in (new, middle, best)] == [True, False, True]
    assert main(["cache", "prune", "--max-size", "1GB", "--older-than", "1w"]) == 0
    assert new.exists()


def test_prune_all_leaves_foreign_files_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = foreign(folder)
    kernel(256)
    tune()
    assert main(["cache", "prune", "--all"]) == 0
    assert "removed 1 kernel, 1 tuning table" in said(capsys)
    kept = {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    # the lock stays: a process that waits for it must meet the others there
    assert kept == {*others, folder / "tuning.json.lock"} - {folder.parent / "outside.py"}
    assert all(path.exists() for path in others)


def test_a_temporary_file_goes_when_nobody_can_be_writing_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kernel(256)
    fresh = path.with_name(f"{path.stem}abcd1234.tmp")
    stale = folder / "tuningabcd_234.tmp"
    for file in (fresh, stale):
        file.touch()
    os.utime(stale, (time.time() - DAY,) * 2)
    assert main(["cache", "verify"]) == 1
    assert stale.name in said(capsys)
    assert main(["cache", "prune", "--max-size", "1GB"]) == 0
    assert [file.exists() for file in (path, fresh, stale)] == [True, True, False]


@pytest.mark.parametrize(
    "options",
    [[], ["--max-size", "big"], ["--max-size", "3XB"], ["--older-than", "3"],
     ["--older-than", "-3d"]],
)  # fmt: skip
def test_prune_wants_a_limit_it_understands(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kernel(256)
    assert main(["cache", "prune", *options]) == 2
    assert "qoqc: error: " in capsys.readouterr().err
    assert path.exists()


def test_sizes_and_ages() -> None:
    assert [cache.parse_size(text) for text in ("0", "1.5kB", "2 GB".replace(" ", ""))] == [
        0,
        1500,
        2 * 10**9,
    ]
    assert [cache.parse_age(text) for text in ("90m", "12H", "2w")] == [5400, 43200, 14 * DAY]
    assert [cache.age(seconds) for seconds in (-3, 59, 61, 7300, 3 * DAY)] == [
        "0 s",
        "59 s",
        "1 min",
        "2 h",
        "3 d",
    ]
    with pytest.raises(OptionError, match="--max-size"):
        cache.parse_size("1e9")
