"""`qoqc serve` from the command line: what it refuses, and what clients are told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qoqc.generate
from qoqc.cli import main, serve
from qoqc.errors import OptionError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [str(MODEL), "--plain", "--require-cached"],
            "others compile what --plain runs",
        ),
        (["/nowhere"], "/nowhere is not a directory with a model"),
        ([str(MODEL), "--glue", "no"], "option glue='no': expected one of"),
        ([str(MODEL), "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
        ([str(MODEL), "--host", "256.0.0.1"], "--host 256.0.0.1: "),
        ([str(MODEL), "--timeout", "0"], "--timeout 0.0: expected a number above 0"),
        ([str(MODEL), "--grace", "-1"], "--grace -1.0: expected seconds, 0 or more"),
        ([str(MODEL), "--memory", "2"], "--memory 2.0: expected a fraction"),
        ([str(MODEL), "--api-key-file", "/no/key"], "No such file or directory: '/no/key'"),
        ([str(MODEL), "--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_port_in_use_is_known_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(serve, "_load", load)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(MODEL), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_options_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def compile_model(model: Any, **options: Any) -> None:
        raise Asked(options)

    monkeypatch.setattr(qoqc.generate, "compile", compile_model)
    for arguments, expected in (
        ([], {"release": True}),
        (["--require-cached"], {"release": True, "require_cached": True}),
        (["--glue", "eager"], {"release": True, "glue": "eager"}),
    ):
        with pytest.raises(Asked) as found:
            main(["serve", str(MODEL), "--port", "0", "--device", "cpu", *arguments])
        assert found.value.args == (expected,)


def test_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "has no tokenizer, and a server needs one" in capsys.readouterr().err


def test_without_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "uvicorn" else find(name, package),
    )
    assert main(["serve", str(MODEL)]) == 2
    assert "qoqc serve needs uvicorn: pip install 'qoqc[serve]'" in capsys.readouterr().err


def test_key_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("  sesame \nnot this\n")
    assert serve.read_key(str(file)) == "sesame"
    file.write_text("\n sesame")
    with pytest.raises(OptionError, match="the first line is empty"):
        serve.read_key(str(file))


def test_names_for_clients(tmp_path: Path) -> None:
    assert serve.default_name(str(MODEL)) == serve.default_name(f"{MODEL}/") == MODEL.name
    assert serve.default_name("owner/model") == "owner/model"


@pytest.mark.slow
def test_what_is_not_cached_ends_the_start(tmp_path: Path) -> None:
    """transformers logs what fails in a warm-up, and goes on with what that left in the cache."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = ["serve", str(MODEL), "--port", "0", "--require-cached", "--pages", "8"]
    result = subprocess.run(
        [sys.executable, "-m", "qoqc", *command],
        capture_output=True,
        text=True,
        env={**environment, "QOQC_CACHE": str(tmp_path)},
        timeout=500,
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("qoqc: error: graph000 was not in the cache of compiled graphs")
    assert " at http://" not in result.stdout + result.stderr
