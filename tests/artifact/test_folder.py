"""A published directory is whole, or not there; nothing foreign is ever replaced."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qoqc.artifact import folder
from qoqc.artifact.folder import checksum, files_below, locked, publish
from qoqc.errors import ArtifactError

KILLED = """
import os, signal, sys
from pathlib import Path
from qoqc.artifact.folder import publish
with publish(Path(sys.argv[1]), overwrite=True, is_ours=lambda path: True) as draft:
    (draft / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(target: Path, text: str, *, overwrite: bool = False, ours: bool = True) -> None:
    with publish(target, overwrite=overwrite, is_ours=lambda _: ours) as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").write_text(text)


def contents(directory: Path) -> list[str]:
    return [path.read_text() for path in directory.rglob("*") if path.is_file()]


def test_publish(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "target", "one")
    assert contents(tmp_path / "deep" / "target") == ["one"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def test_an_empty_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    write(tmp_path / "target", "one")
    assert contents(tmp_path) == ["one"]


def test_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "target", "one")
    with pytest.raises(ArtifactError, match="exists; choose another name, or overwrite"):
        write(tmp_path / "target", "two")
    assert contents(tmp_path) == ["one"]
    write(tmp_path / "target", "two", overwrite=True)
    assert contents(tmp_path) == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_foreign_directories_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artifact"):
        write(tmp_path / "target", "two", overwrite=True, ours=False)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ArtifactError, match="not an artifact"):
        write(tmp_path / "file", "two", overwrite=True)
    assert sorted(contents(tmp_path)) == ["a file", "years of work"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with publish(tmp_path / "target", overwrite=False, is_ours=lambda _: True) as draft:
            (draft / "half").write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_process_leaves_the_target_as_it_was(tmp_path: Path, before: str | None) -> None:
    target = tmp_path / "target"
    if before is not None:
        write(target, before)
    result = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert result.returncode == -9
    assert target.exists() == (before is not None)
    assert contents(target) == ([before] if before is not None else [])


def test_checksum_and_listing(tmp_path: Path) -> None:
    write(tmp_path / "target", "abc")
    files = files_below(tmp_path / "target")
    assert list(files) == ["inner/file"]
    # SHA-256 of "abc", from FIPS 180-2
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(files["inner/file"]) == expected


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000])
def test_a_checksum_is_that_of_the_whole_file(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PIECE", 4096)
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    assert folder.checksum(tmp_path / "a") == hashlib.sha256(content).hexdigest()


HOLDER = """
import sys, time
from pathlib import Path
from qoqc.artifact.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_do_not_write_the_same_directory(tmp_path: Path) -> None:
    target = tmp_path / "target"
    arguments = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match="another process is writing .*target"):
            with locked(tmp_path / "." / "target", timeout=0.1):
                pass
        with locked(tmp_path / "other", timeout=0.1):
            pass
        holder.kill()
    with locked(target, timeout=5):  # the dead hold nothing
        assert list(tmp_path.iterdir()) == []
