"""The command line: what it writes, what it says, and one line with exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qoqc
from qoqc import pipeline
from qoqc.artifact.manifest import Manifest
from qoqc.backend import check_torch_version
from qoqc.cli import app, chat, main, source
from qoqc.errors import StaleWeights
from qoqc.runtime import compile_count
from qoqc.testing import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
ASK = "Tell me a story about a cat."


@pytest.fixture(autouse=True)
def _own_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "stories"
    assert main(["compile", str(MODEL), "-o", str(directory)]) == 0
    return directory


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell would start it."""
    command = [sys.executable, "-m", "qoqc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_is_quick_and_imports_nothing_slow() -> None:
    script = (
        "import sys; from qoqc.cli import main; code = main(['--help']); "
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)), code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for command in ("compile", "chat", "inspect"):
        assert command in result.stdout
    assert result.stdout.splitlines()[-1] == "[] 0"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qoqc {qoqc.__version__}\n"


def test_compile_options_and_closing_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ["--group-size", "-1", "--kv-bits", "8", "--exclude", "*q_proj", "--dtype", "fp32"]
    assert main(["compile", str(MODEL), "-o", str(output), *options]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert line.startswith(f"{output}: 30 linears packed, 6 left in 16 bit (")
    assert "16.0 MB -> " in line, "fp32 doubles the size before"
    assert captured.err == ""
    manifest = Manifest.read(output)
    assert manifest.options["group_size"] == -1
    assert manifest.options["kv_bits"] == 8
    assert manifest.options["exclude"] == ["*q_proj"]
    assert {entry.dtype for entry in manifest.weights.values()} == {"float32"}


def test_compile_replaces_an_artifact_only_when_told(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "mark").touch()
    assert main(["compile", str(MODEL), "-o", str(copy)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (copy / "mark").exists()
    assert main(["compile", str(MODEL), "-o", str(copy), "--force"]) == 0
    assert not (copy / "mark").exists()


def test_chat_answers_and_exits(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", str(artifact), "--prompt", ASK, "--glue", "eager", "--seed", "3"]
    assert main([*arguments, "--max-new-tokens", "12"]) == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert "<|" not in first.out, "special tokens are not shown"
    assert ASK not in first.out, "the prompt is not repeated"
    assert "12 tokens" in first.err
    assert "tok/s" in first.err
    assert main([*arguments, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == first.out, "the same seed gives the same answer"


def test_chat_of_model_and_artifact_agree(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for model in (MODEL, artifact):
        torch._dynamo.reset()
        arguments = ["chat", str(model), "--prompt", ASK, "--glue", "eager"]
        assert main([*arguments, "--temperature", "0", "--max-new-tokens", "16"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_conversation(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    encode = chat.Chat._encode

    def spy(self: chat.Chat, messages: list[dict[str, str]]) -> Any:
        seen.append([message["role"] for message in messages])
        return encode(self, messages)

    monkeypatch.setattr(chat.Chat, "_encode", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    arguments = ["--glue", "eager", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["chat", str(artifact), *arguments]) == 0
    assert seen == [["user"], ["user", "assistant", "user"], ["user"]]
    assert capsys.readouterr().err.count("4 tokens") == 3


def test_end_of_input_ends_the_conversation(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", str(artifact), "--glue", "eager"]) == 0


def test_ctrl_c_stops_an_answer_then_leaves(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def interrupted(self: chat.Chat, text: str) -> str:
        asked.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Chat, "answer", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", str(artifact), "--glue", "eager"]) == 0
    assert asked == ["one", "two"]
    assert main(["chat", str(artifact), "--glue", "eager", "--prompt", "x"]) == 130


def test_a_conversation_that_outgrows_the_context_says_so(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat " * 2000 + "\n"))
    assert main(["chat", str(artifact), "--glue", "eager"]) == 0
    assert "the model's context 1024; /reset it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("source_of", ["artifact", "model"])
def test_a_chat_that_may_compile_nothing(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source_of: str,
) -> None:
    compiled = [0, 0]

    def inductor(gm: Any, *_: Any, **__: Any) -> Any:
        compiled[0] += cold
        return gm.forward

    monkeypatch.setattr(pipeline, "compile_with_inductor", inductor)
    monkeypatch.setattr(compile_count, "graphs_compiled", lambda: tuple(compiled))
    monkeypatch.setattr(compile_count, "_REQUIRED", [])
    path = artifact if source_of == "artifact" else MODEL
    arguments = ["chat", str(path), "--prompt", ASK, "--max-new-tokens", "2"]
    cold = True
    assert main([*arguments, "--require-cached"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "was not in the cache of compiled graphs" in lines[-1]
    assert "require_cached is set" in lines[-1]
    torch._dynamo.reset()
    assert main(arguments) == 0
    torch._dynamo.reset()
    cold = False
    assert main([*arguments, "--require-cached"]) == 0
    assert "2 tokens" in capsys.readouterr().err


def test_a_model_without_chat_template_continues_the_text(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(MODEL, tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--glue", "eager", "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["chat", str(model), "--prompt", "Once upon a", *arguments]) == 0
    assert capsys.readouterr().out.split()[0].startswith("time")


def test_inspect(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODEL)]) == 0
    model = capsys.readouterr().out
    assert main(["inspect", str(artifact)]) == 0
    made = capsys.readouterr().out
    for text in (model, made):
        assert "LlamaForCausalLM" in text
        assert "prefill" in text
        assert "decode" in text
        assert "35 linears in 4 bit, 1 left in 16 bit" in text
        assert "model.embed_tokens: shares its weight with the embedding" in text
        assert "weights: 8.0 MB -> 3.7 MB" in text
    assert "a decode step of one sequence on H100:\n  model.layers.0 to model.layers." in model
    assert "group_size=128" in made
    assert "recipe: rounded to nearest, not judged" in made
    assert "files verified" in made


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def bad_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def encoder_decoder(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 64}))


def quantized(path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    (path / "config.json").write_text(json.dumps(config))


def not_causal(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "vit"}))


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def half_weights(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def other_weights(path: Path) -> None:
    tiny_model("gpt2").save_pretrained(path / "other")
    (path / "other" / "model.safetensors").replace(path / "model.safetensors")


def bad_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def double_precision(path: Path) -> None:
    tiny_model("llama", torch.float64).save_pretrained(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "no readable config.json"),
        (bad_config, "no readable config.json"),
        (encoder_decoder, "is an encoder-decoder model (t5)"),
        (quantized, "is quantized already; make an artifact of it by qoqc convert"),
        (not_causal, "(vit) is not a causal language model"),
        (no_weights, "the weights cannot be loaded"),
        (pickle_only, "the weights cannot be loaded"),
        (half_weights, "the weights cannot be loaded"),
        (other_weights, "the weights lack"),
        (bad_tokenizer, "no readable tokenizer"),
        (double_precision, "has dtype float64; choose --dtype bf16, fp16, fp32"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_models(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    model, output = shutil.copytree(MODEL, tmp_path / "model"), tmp_path / "output"
    spoil(model)
    assert main(["compile", str(model), "-o", str(output)]) == 2
    assert_one_line(capsys, str(model), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "{missing}", "-o", "{out}"], "is not a directory with a model"),
        (["chat", "{missing}"], "is not a directory with a model"),
        (["inspect", "{missing}"], "is not a directory with a model"),
        (["compile", "{model}/config.json", "-o", "{out}"], "is not a directory with a model"),
        (["compile", "{model}", "-o", "{model}/config.json"], "not an artifact"),
        (["compile", "{model}", "-o", "{model}", "--force"], "not an artifact"),
        (["compile", "{model}"], "Missing option"),
        (["compile", "{model}", "-o", "{out}", "--group-size", "64"], "group_size=64"),
        (["compile", "{model}", "-o", "{out}", "--group-size", "x"], "--group-size"),
        (["compile", "{model}", "-o", "{out}", "--kv-bits", "3"], "kv_bits=3"),
        (["compile", "{model}", "-o", "{out}", "--device", "tpu"], "expected auto, cpu or cuda"),
        (["compile", "{model}", "-o", "{out}", "--dtype", "fp64"], "expected auto, bf16"),
        (["compile", "{model}", "-o", "{out}", "--no-such-option"], "--no-such-option"),
        (["chat", "{model}", "--glue", "x", "--prompt", "x"], "option glue='x'"),
        (["chat", "{model}", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["chat", "{model}", "--temperature", "-1"], "--temperature"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"missing": tmp_path / "missing", "out": tmp_path / "out", "model": MODEL}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compile", "chat", "inspect"])
def test_no_cuda(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = ["-o", str(tmp_path / "out")] if command == "compile" else []
    assert main([command, str(MODEL), "--device", "cuda", *output]) == 2
    assert_one_line(capsys, "torch finds no CUDA device here; use --device cpu")
    assert list(tmp_path.iterdir()) == []


def test_an_old_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "check_torch_version", lambda: check_torch_version("2.8.0+cpu"))
    assert main(["compile", str(MODEL), "-o", str(tmp_path / "out")]) == 2
    assert_one_line(capsys, "torch 2.8.0+cpu is outside the supported range", "pip install")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"short")
    for command in (["chat", str(copy), "--prompt", "x"], ["inspect", str(copy)]):
        assert main(command) == 2
        assert_one_line(capsys, "model.safetensors is damaged")


def test_strict_names_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["compile", str(tmp_path / "model"), "-o", str(out), "--strict"]) == 2
    assert_one_line(capsys, "strict: ")
    assert not out.exists()


def test_a_process_of_its_own(tmp_path: Path) -> None:
    result = run("compile", str(tmp_path / "missing"), "-o", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"qoqc: error: {tmp_path / 'missing'} is not a directory with a model\n"
    )


def test_errors_are_found_under_what_dynamo_wraps_them_in() -> None:
    class Wrapper(Exception):
        inner_exception = StaleWeights("up_proj\n  changed")

    assert app.message_of(Wrapper("long")) == "up_proj changed"
    assert app.message_of(ZeroDivisionError("a bug")) is None


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("qoqc: error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in captured.out
