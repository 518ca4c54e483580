"""`qoqc eval`: the figures it prints, the exit code of the gate, and one line for bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from qoqc.cli import main

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
STORY = (
    "Once upon a time, there was a little dog named Max. Max liked to play with his red ball. One "
    "day, the ball rolled into the pond. Max was sad. A kind duck saw the ball and pushed it back "
    'with her beak. "Thank you, duck!" said Max. They played together until the sun went down. '
)
SHORT = ["--seq", "64", "--tokens", "192", "--glue", "eager", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("eval") / "stories.txt"
    file.write_text(STORY * 4, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eval") / "stories"
    assert main(["compile", str(MODEL), "-o", str(directory), "--group-size", "-1"]) == 0
    return directory


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """The exit code, and what follows each name of the printed table; "title" is the first line."""
    capsys.readouterr()
    code = main(["eval", *arguments, *SHORT])
    captured = capsys.readouterr()
    title, *lines = captured.out.splitlines()
    table = {"title": title, "stderr": captured.err}
    for line in lines:
        if not line:
            break  # behind it stands what the manifest says
        name, rest = re.split(r"  +", line, maxsplit=1)
        table[name] = rest
    return code, table


def test_the_real_graph_next_to_its_16_bit_model(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(MODEL)
    code, found = evaluated(capsys, model, "--text", str(text), "--baseline", model)
    assert code == 0
    assert found["stderr"] == ""
    assert found["title"] == f"{MODEL}: W4A8KV4, g128"
    assert found["tokens"].startswith("189 predicted, 3 windows of 64; ")
    ours, theirs = float(found["perplexity"]), float(found["baseline"].split()[0])
    increase = float(found["increase"].split()[0])
    assert increase == pytest.approx(100 * (ours / theirs - 1), abs=0.01)
    assert increase > 0
    assert float(found["KL"].split()[0]) > 0.01
    assert 50 < float(found["same top-1"].split()[0]) < 100
    # without a baseline the same perplexity, and the 16-bit one with --plain
    code, alone = evaluated(capsys, model, "--text", str(text))
    assert (code, alone["perplexity"]) == (0, found["perplexity"])
    code, plain = evaluated(capsys, model, "--text", str(text), "--plain")
    assert code == 0
    assert plain["title"] == f"{MODEL}: bfloat16"
    assert plain["perplexity"] == found["baseline"].split()[0]
    bits = {name: float(table["bits/byte"]) for name, table in (("q", alone), ("p", plain))}
    ratio = torch.tensor([ours, theirs]).log()
    assert bits["q"] / bits["p"] == pytest.approx(float(ratio[0] / ratio[1]), rel=1e-3)


@pytest.mark.slow
def test_an_artifact_keeps_its_options_unless_told(
    artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(artifact)
    capsys.readouterr()
    assert main(["eval", name, "--text", str(text), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"when {name} was made:", "recipe: rounded to nearest, not judged"]
    _, own = evaluated(capsys, name, "--text", str(text))
    assert own["title"] == f"{artifact}: W4A8KV4, per channel"
    _, model = evaluated(capsys, str(MODEL), "--text", str(text), "--group-size", "-1")
    assert own["perplexity"] == model["perplexity"], "the artifact is the model, packed"
    _, eight = evaluated(capsys, name, "--text", str(text), "--kv-bits", "8")
    assert eight["title"] == f"{artifact}: W4A8KV8, per channel"
    _, exact = evaluated(capsys, name, "--text", str(text), "--prefill-kv", "exact")
    assert exact["title"] == f"{artifact}: W4A8, exact keys and values, per channel"
    assert len({own["perplexity"], eight["perplexity"], exact["perplexity"]}) == 3
    # 8 bit is nearly exact, 4 bit is not
    figures = [float(table["perplexity"]) for table in (own, eight, exact)]
    assert abs(figures[1] - figures[2]) < abs(figures[0] - figures[2])


def test_the_gate_is_an_exit_code(
    artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(artifact), "--text", str(text), "--baseline", str(MODEL), "--max-ppl-increase"]
    code, table = evaluated(capsys, *given, "0.001")
    assert code == 1
    increase = float(table["increase"].split()[0])
    expected = f"the perplexity increase of {increase:.2f} % is above the limit of 0.001 %"
    assert table["stderr"] == f"qoqc: {expected}\n"
    code, table = evaluated(capsys, *given, str(increase + 1))
    assert (code, table["stderr"]) == (0, "")


def test_windows_begin_as_told(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        bos: evaluated(capsys, str(MODEL), "--text", str(text), "--plain", "--bos", bos)[1]
        for bos in ("tokenizer", "none", "window")
    }
    assert len({table["perplexity"] for table in figures.values()}) == 3


def test_the_text_may_be_longer_than_the_model_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long").write_text(STORY * 60)
    arguments = [str(MODEL), "--text", str(tmp_path / "long"), "--plain"]
    code, table = evaluated(capsys, *arguments)
    assert code == 0
    assert table["stderr"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--text", "{tmp}/missing"], "missing cannot be read: No such file"),
        (["{model}", "--text", "{tmp}"], "cannot be read: Is a directory"),
        (["{model}", "--text", "{tmp}/empty"], "empty is empty"),
        (["{model}", "--text", "{tmp}/binary"], "binary is not UTF-8 text"),
        (["{model}", "--text", "{tmp}/short"], "3 tokens of text are less than one window of 64"),
        (["{tmp}/nothing", "--text", "{text}"], "nothing is not a directory"),
        (["{tmp}/bare", "--text", "{text}"], "bare has no tokenizer, and text needs one"),
        (["{tmp}/foreign", "--text", "{text}"], "it is another model's tokenizer"),
        (["{model}", "--text", "{text}", "--seq", "100000"], "takes 1024 tokens at most"),
        (["{model}", "--text", "{text}", "--seq", "1"], "--seq"),
        (["{model}", "--text", "{text}", "--kv-bits", "5"], "kv_bits=5: expected one of 4, 8, 16"),
        (["{model}", "--text", "{text}", "--prefill-kv", "x"], "prefill_kv='x': expected one of"),
        (["{model}", "--text", "{text}", "--bos", "two"], "--bos two: expected tokenizer, none"),
        (["{model}", "--text", "{text}", "--max-ppl-increase", "5"], "needs --baseline MODEL"),
        (["{model}", "--text", "{text}", "--device", "tpu"], "expected auto, cpu or cuda"),
        (["{model}"], "--text"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text("Hello dog")
    skeleton = shutil.ignore_patterns("*token*", "*.safetensors", "chat_template*")
    shutil.copytree(MODEL, tmp_path / "bare", ignore=skeleton)
    shutil.copytree(MODEL, tmp_path / "foreign")
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    places = {"model": MODEL, "text": text, "tmp": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    # the last of a repeated option counts
    assert main(["eval", *SHORT, *given]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("qoqc: error: ")
    assert message in line
    assert captured.out == ""


def test_an_artifact_has_no_16_bit_weights_and_one_format(
    artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--plain"], "is an artifact, it has no 16-bit weights"),
        (["--group-size", "128"], "was packed with group_size=-1"),
    ):
        assert main(["eval", str(artifact), "--text", str(text), *SHORT, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
