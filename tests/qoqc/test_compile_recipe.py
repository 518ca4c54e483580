"""`qoqc compile --calibrate`: the artifact, the gate, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import qoqc
from qoqc.artifact.folder import files_below
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import Manifest
from qoqc.calibrate import driver
from qoqc.calibrate.checkpoint import Checkpoints, Finished
from qoqc.cli import main
from qoqc.quant.weight import dequantize_weight
from qoqc.runtime.weights import STORE

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
QUICK = ["--calibrate", "default", "--samples", "2", "--seq", "64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    directory = tmp_path_factory.mktemp("recipe") / "stories"
    assert main(["compile", str(MODEL), "-o", str(directory), *QUICK]) == 0
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_below(directory).items()}


@pytest.mark.slow
def test_the_artifact_says_how_it_was_made(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert len(manifest.weights) == 35
    recipe, gate = manifest.recipe, manifest.gate
    assert recipe is not None
    assert gate is not None
    assert (recipe["samples"], recipe["seq"], recipe["recipe"]["seed"]) == (2, 64, 0)
    assert [layer["name"] for layer in recipe["layers"]] == [f"model.layers.{i}" for i in range(5)]
    for layer in recipe["layers"]:
        assert len(layer["errors"]) == 7
        assert layer["sqnr"] > 10
        assert layer["kv"]["bits"] == 4
        assert 0 < layer["kv"]["errors"]["4"] < 0.4
        assert set(layer["strengths"]) >= {"attention", "values"}
    assert gate["text"] == "held out"
    increase = 100 * (gate["perplexity"] / gate["baseline"] - 1)
    assert gate["increase"] == pytest.approx(increase)
    assert 0 < gate["kl"] < 0.35, "128 tokens of calibration must not make it worse"
    assert not artifact.with_name("stories.partial").exists()


@pytest.mark.slow
def test_it_loads_and_tells_a_story(artifact: Path) -> None:
    model = qoqc.load(artifact, glue="eager")
    prompt = torch.tensor([[1, 3, 56, 507, 602, 263, 914, 600, 263, 716, 18, 4]])
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert tokens.shape == (1, 24)
    assert len(set(tokens[0, 12:].tolist())) > 5


@pytest.mark.slow
def test_what_was_decided_is_what_is_stored(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again: every byte the same, and the weights those the weight step gave back."""
    decided: dict[str, torch.Tensor] = {}
    real = driver._calibrate_layer

    def watching(*args: Any) -> Finished:
        found = real(*args)
        decided.update({name: dequantize_weight(p) for name, p in found.packed.items()})
        return found

    monkeypatch.setattr(driver, "_calibrate_layer", watching)
    assert main(["compile", str(MODEL), "-o", str(tmp_path / "again"), *QUICK]) == 0
    assert contents(tmp_path / "again") == contents(artifact)
    model, _ = load_model(tmp_path / "again")
    assert len(decided) == 35
    for name, values in decided.items():
        packed = STORE.packed(model.get_parameter(name))
        assert packed is not None
        assert torch.equal(dequantize_weight(packed), values), name


@pytest.mark.slow
def test_killed_and_taken_up_again(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = ["compile", str(MODEL), "-o", str(output), *QUICK]
    real_save, real_layer = Checkpoints.save, driver._calibrate_layer

    def save(self: Checkpoints, index: int, finished: Finished) -> None:
        real_save(self, index, finished)
        if index == 3:
            raise KeyboardInterrupt

    done: list[str] = []

    def counting(work: Any, *args: Any) -> Finished:
        done.append(work.record.name)
        return real_layer(work, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert main(command) == 130
    assert not output.exists()
    assert len(list((tmp_path / "out.partial").iterdir())) == 4
    monkeypatch.setattr(driver, "_calibrate_layer", counting)
    assert main(command) == 0
    assert done == ["model.layers.4"]
    assert contents(output) == contents(artifact)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_kill_9_and_taken_up_again(artifact: Path, tmp_path: Path) -> None:
    """Nothing is cleaned up and nothing is told: the files alone must do."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    command = ["compile", str(MODEL), "-o", str(output), *QUICK]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "qoqc", *command], stdout=log, stderr=log)
        while len(list(partial.glob("layer-*.safetensors"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not output.exists()
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("layer-*.safetensors")}
    assert 2 <= len(before) < 5
    after: dict[str, int] = {}
    rmtree = shutil.rmtree

    def looking(path: Path, *args: Any, **kwargs: Any) -> None:
        found = {x.name: x.stat().st_mtime_ns for x in Path(path).glob("layer-*.safetensors")}
        after.update(found)
        rmtree(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", looking)
        assert main(command) == 0
    assert len(after) == 5
    assert {name: after[name] for name in before} == before, "finished layers are not done again"
    assert contents(output) == contents(artifact)
    assert not partial.exists()


@pytest.mark.slow
def test_the_artifact_shows_it(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`inspect` and `eval` say what `compile` said: a row per layer, and the gate."""
    manifest = Manifest.read(artifact)
    assert manifest.recipe is not None
    assert manifest.gate is not None
    assert main(["inspect", str(artifact)]) == 0
    shown = [capsys.readouterr().out]
    (tmp_path / "text").write_text("Once upon a time, there was a little dog. " * 20)
    given = ["--text", str(tmp_path / "text"), "--seq", "64", "--glue", "eager", "--device", "cpu"]
    assert main(["eval", str(artifact), *given]) == 0
    shown.append(capsys.readouterr().out)
    for text in shown:
        for layer in manifest.recipe["layers"]:
            (row,) = [line for line in text.splitlines() if f"{layer['name']} " in line]
            assert f" {layer['sqnr']:.1f} " in row
        assert f"perplexity {manifest.gate['perplexity']:.4f}, " in text
        assert "4.00 bits per key and value on average" in text


@pytest.mark.slow
def test_the_gate_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifact is there all the same: the figures are in it."""
    output = tmp_path / "out"
    short = ["--samples", "1", "--seq", "64", "--max-ppl-increase", "-50", "--device", "cpu"]
    command = ["compile", str(MODEL), "-o", str(output), "--calibrate", "default", *short]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qoqc: the perplexity increase of ")
    assert captured.err.endswith("above the limit of -50 %\n")
    assert "trials for alpha and beta; 4.00 bits per key and value on average" in captured.out
    assert Manifest.read(output).gate is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "qoq"], "--recipe qoq needs --calibrate TEXT"),
        (["--recipe", "gptq"], "--recipe gptq: expected rtn or qoq"),
        (["--recipe", "rtn", "--calibrate", "default"], "--calibrate belongs to --recipe qoq"),
        (["--max-ppl-increase", "3"], "--max-ppl-increase belongs to --recipe qoq"),
        (["--eval-text", "x"], "--eval-text belongs to --recipe qoq"),
        (["--calibrate", "default", "--max-ppl-increase", "nan"], "expected a percentage"),
        (["--calibrate", "{tmp}/missing"], "missing cannot be read: No such file"),
        (["--calibrate", "{tmp}/empty"], "empty is empty; give it some text"),
        (["--calibrate", "{tmp}/short"], "are less than one window of 64; use more text"),
        (["--calibrate", "{tmp}/short", "--seq", "8"], "one window of 8 tokens, and at least two"),
        (["--calibrate", "default", "--seq", "4096"], "the model takes 1024 tokens at most"),
        (["--calibrate", "default", "--eval-text", "{tmp}/empty"], "empty is empty"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("One upon a time, a cat sat.")
    output = tmp_path / "out"
    given = [option.format(tmp=tmp_path) for option in options]
    assert main(["compile", str(MODEL), "-o", str(output), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qoqc: error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "short"]


def test_the_tokenizer_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert main(["compile", str(model), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "it is another model's tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    assert main(["compile", str(model), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "has no tokenizer, and calibration text needs one" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["compile", str(MODEL), "-o", str(tmp_path / "file" / "out"), *QUICK]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qoqc: error: ")
