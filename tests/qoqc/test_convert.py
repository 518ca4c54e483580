"""`qoqc convert`: checkpoints of others become artifacts that run, artifacts become QServe's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qoqc.artifact.load import load_model
from qoqc.cli import main
from qoqc.formats import qserve
from qoqc.formats.source import load_source
from qoqc.quant.weight import PackedWeight, dequantize_weight, quantize_weight
from qoqc.runtime.weights import STORE
from qoqc.testing import tiny_model

Tensors = dict[str, torch.Tensor]
MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"


def checkpoint(
    directory: Path,
    write: Callable[[str, torch.Tensor], Tensors],
    family: str = "llama",
    **config: Any,
) -> Path:
    """A tiny model as a checkpoint whose projections `write` quantizes; norms of ones."""
    model = tiny_model(family, torch.float16)
    tensors: Tensors = {}
    for name, value in model.state_dict().items():
        if "_proj.weight" in name:
            tensors.update(write(name.removesuffix(".weight"), value.float()))
        else:
            tensors[name] = torch.ones_like(value) if "norm" in name else value
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16", **config}))
    save_file({name: t.contiguous() for name, t in tensors.items()},
              directory / "model.safetensors")  # fmt: skip
    return directory


def as_qserve(group_size: int) -> Callable[[str, torch.Tensor], Tensors]:
    def write(module: str, weight: torch.Tensor) -> Tensors:
        tensors = qserve.write(module, quantize_weight(weight, group_size))
        return {f"{module}.{suffix}": t for suffix, t in tensors.items()}

    return write


def as_int_quantized(module: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors' int8 form, a group of 128."""
    groups = weight.view(weight.shape[0], -1, 128)
    scale = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    integers = codes.view(weight.shape).to(torch.int8)
    # as AutoGPTQ does to models without biases
    zeros = torch.zeros(weight.shape[0])
    return {f"{module}.weight": integers, f"{module}.weight_scale": scale, f"{module}.bias": zeros}


SCHEME = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128}
INT_QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME}},
}


def packed_of(artifact: Path) -> tuple[Any, dict[str, PackedWeight]]:
    """The artifact's model, and its packed weights by name."""
    model, _ = load_model(artifact)
    found = {name: STORE.packed(param) for name, param in model.named_parameters()}
    return model, {name: packed for name, packed in found.items() if packed is not None}


def equal(a: PackedWeight, b: PackedWeight) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("group_size", [128, -1])
def test_qserve_to_an_artifact_and_back_is_the_same_file(
    group_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", as_qserve(group_size))
    artifact, again = tmp_path / "artifact", tmp_path / "again"
    assert main(["convert", str(source), "-o", str(artifact)]) == 0
    out = capsys.readouterr().out
    assert "14 linears keep their integers" in out
    assert "another grid" not in out
    expected = load_source(source).packed
    model, found = packed_of(artifact)
    assert found.keys() == expected.keys()
    assert all(equal(found[name], expected[name]) for name in expected)
    assert model.qoqc_options.group_size == group_size
    assert main(["convert", str(artifact), "-o", str(again), "--to", "qserve"]) == 0
    before = load_file(source / "model.safetensors")
    after = load_file(again / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype, name


@pytest.mark.slow
def test_what_is_rounded_anew_says_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", as_int_quantized, quantization_config=INT_QUANTIZED)
    artifact = tmp_path / "artifact"
    assert main(["convert", str(source), "-o", str(artifact), "--dtype", "fp32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "14 linears rounded to another grid: relative RMS error 0.0" in out
    config = json.loads((artifact / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") != "compressed-tensors"
    expected = load_source(source)
    model, found = packed_of(artifact)
    assert all(equal(found[name], expected.packed[name]) for name in expected.packed)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # rounding twice must not cost more than the first time
    name = "model.layers.0.mlp.up_proj.weight"
    original = tiny_model("llama", torch.float16).get_parameter(name).float()
    error = (dequantize_weight(found[name]) - original).norm() / original.norm()
    assert error < 0.2
    assert max(change.error for change in expected.report) < 0.15


@pytest.mark.slow
def test_an_imported_model_computes_with_the_imported_weights(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", as_qserve(128))
    artifact = tmp_path / "artifact"
    assert main(["convert", str(source), "-o", str(artifact), "--dtype", "fp32"]) == 0
    reference = tiny_model("llama")
    loaded = load_source(source)
    state = {**loaded.tensors, **{n: dequantize_weight(p) for n, p in loaded.packed.items()}}
    reference.load_state_dict(state)
    model, found = packed_of(artifact)
    with torch.no_grad():
        for name, packed in found.items():
            # what the artifact's linears multiply with, in place of its released weights
            model.get_parameter(name).data = dequantize_weight(packed)
        tokens = torch.arange(12)[None]
        assert torch.equal(model(tokens).logits, reference(tokens).logits)


def missing_embedding(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors")
    return "lacks "


def unknown_tensor(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.act.scales"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors")
    return "holds model.layers.0.mlp.act.scales, for which LlamaForCausalLM has no place"


def other_sizes(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    return "do not fit LlamaForCausalLM"


def cut_file(source: Path) -> str:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors is damaged"


@pytest.mark.parametrize("spoil", [missing_embedding, unknown_tensor, other_sizes, cut_file])
def test_a_bad_source_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", as_qserve(128))
    reason = spoil(source)
    assert main(["convert", str(source), "-o", str(tmp_path / "artifact")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("qoqc: error:")]
    assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_16_bit_model_is_sent_to_compile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(MODEL), "-o", str(tmp_path / "artifact")]) == 2
    assert "a 16-bit model goes to `qoqc compile`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, reason",
    [([], "model.layers.0.input_layernorm.weight is not 1 throughout"),
     (["--exclude", "*layers.1*q_proj"], "q_proj.weight is in 16 bit")],
)  # fmt: skip
def test_what_qserve_would_run_wrongly_is_not_exported(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, artifact, target = (tmp_path / name for name in ("model", "artifact", "target"))
    tiny_model("llama").save_pretrained(model)
    assert main(["compile", str(model), "-o", str(artifact), *options]) == 0
    assert main(["convert", str(artifact), "-o", str(target), "--to", "qserve"]) == 2
    assert reason in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "artifact"}


def test_only_llama_goes_to_qserve_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", as_qserve(128), family="qwen2")
    artifact = tmp_path / "artifact"
    assert main(["convert", str(source), "-o", str(artifact)]) == 0
    assert main(["convert", str(artifact), "-o", str(tmp_path / "x"), "--to", "qserve"]) == 2
    assert "QServe runs Llama models; this is qwen2" in capsys.readouterr().err
    for to in ("qserve", "qoqc"):
        assert main(["convert", str(source), "-o", str(artifact), "--to", to]) == 2
        assert "exists" in capsys.readouterr().err
    assert main(["convert", str(source), "-o", str(artifact), "--to", "gguf"]) == 2
    assert "--to gguf: expected one of qoqc, qserve" in capsys.readouterr().err
