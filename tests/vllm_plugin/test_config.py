"""The quantization method "qoq", against a stub of vLLM (conftest.py)."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qoqc.artifact.manifest import PATH
from qoqc.errors import ArtifactError, Unsupported
from tests.vllm_plugin.loading import ATTENTION, MAPPING, MLP, config_of, fill, saved

REPO = Path(__file__).resolve().parents[2]


class Mapper:
    """What WeightsMapper.get_rename_mapper() returns."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self.rename(name): value for name, value in values.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vllm") / "llama")


def test_the_entry_point_registers_the_method(vllm: SimpleNamespace) -> None:
    pyproject = (REPO / "pyproject.toml").read_text()
    match = re.search(r'entry-points."(vllm.general_plugins)"\].*\n(\w+) = "(.*)"', pyproject)
    assert match is not None
    group, name, value = match.groups()
    vllm.methods.clear()
    for module in ("config", "linear"):
        sys.modules.pop(f"qoqc.vllm_plugin.{module}")
    register = EntryPoint(name, value, group).load()
    register()
    register()
    (config,) = vllm.methods.values()
    assert list(vllm.methods) == ["qoq"]
    assert config.from_config({"format": 2}).get_name() == "qoq"
    assert config.get_supported_act_dtypes(config()) == [torch.bfloat16, torch.float16]
    assert config.get_min_capability() == 80
    assert config.get_config_filenames() == []


def test_qoqc_imports_no_vllm() -> None:
    code = (
        "import sys, qoqc, qoqc.generate, qoqc.vllm_plugin.register; print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_is_not_packed_is_left_to_vllm(vllm: SimpleNamespace, tmp_path: Path) -> None:
    directory = saved(tmp_path / "mixed", exclude=["model.layers.0.mlp.*", "*.1.self_attn.k_proj"])
    config = config_of(vllm, directory, MAPPING)
    layer = vllm.LinearBase(config, "model.layers.0.mlp.gate_up_proj", 128, [256, 256])
    assert type(layer.quant_method) is vllm.UnquantizedLinearMethod
    assert config.get_quant_method(vllm.VocabParallelEmbedding(), "lm_head") is None
    assert config.get_quant_method(vllm.VocabParallelEmbedding(), "") is None
    assert config.get_quant_method(torch.nn.Identity(), f"{ATTENTION}.attn") is None
    with pytest.raises(Unsupported, match=r"q_proj.weight, which is packed, and .*k_proj.weight"):
        vllm.LinearBase(config, f"{ATTENTION}.qkv_proj", 128, [128, 64, 64])


def test_a_packed_output_head_is_refused(vllm: SimpleNamespace, llama: Path) -> None:
    # qoqc.save leaves it in 16 bit, whatever lm_head says: other makers of artifacts may not
    config = config_of(vllm, llama, MAPPING)
    head = f"{MLP}.down_proj.weight"
    config.apply_vllm_mapper(Mapper(lambda name: "lm_head.weight" if name == head else name))
    with pytest.raises(Unsupported, match="compile the model with lm_head=16"):
        config.get_quant_method(vllm.VocabParallelEmbedding(), "lm_head")


def test_experts_are_refused(vllm: SimpleNamespace, llama: Path) -> None:
    config = config_of(vllm, llama, MAPPING)
    with pytest.raises(Unsupported, match="mixture of experts"):
        config.get_quant_method(vllm.RoutedExperts(), f"{MLP}.experts")


def test_another_format_version_is_refused(vllm: SimpleNamespace, tmp_path: Path) -> None:
    for config in ({"format": 1}, {}):
        with pytest.raises(ArtifactError, match="this qoqc reads 2; compile the model again"):
            vllm.Config.from_config(config)


def test_a_damaged_or_foreign_model_is_refused(vllm: SimpleNamespace, tmp_path: Path) -> None:
    directory = saved(tmp_path / "damaged")
    config = vllm.Config.from_config({"format": 2})
    with pytest.raises(Unsupported, match="did not say which model"):
        config.get_quant_method(vllm.VocabParallelEmbedding(), "lm_head")
    weights = directory / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(bytes(body))
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        config.maybe_update_config(str(directory))
    (directory / PATH).unlink()
    with pytest.raises(ArtifactError, match="is no artifact"):
        config.maybe_update_config(str(directory))


def test_a_repository_without_a_manifest_is_refused(
    vllm: SimpleNamespace, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["qoqc.vllm_plugin.config"]
    asked = []

    def cached_file(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        if name == "someone/plain":
            raise OSError("404")
        return str(llama / file)

    monkeypatch.setattr(module, "cached_file", cached_file)
    config = vllm.Config.from_config({"format": 2})
    config.maybe_update_config("someone/llama", hf_config=None, revision="v1")
    assert asked == [("someone/llama", PATH, "v1")]
    vllm.LinearBase(config, f"{MLP}.down_proj", 256, [128])
    with pytest.raises(ArtifactError, match="someone/plain is no directory and has no"):
        config.maybe_update_config("someone/plain")


def test_names_follow_vllms_and_survive_the_way_to_another_process(
    vllm: SimpleNamespace, llama: Path
) -> None:
    config = config_of(vllm, llama, MAPPING)
    config.apply_vllm_mapper(Mapper(lambda name: f"language_model.{name}"))
    config = pickle.loads(pickle.dumps(config))
    layer = vllm.LinearBase(config, f"language_model.{MLP}.down_proj", 256, [128])
    fill(layer, llama, MLP, ["down_proj"])
    with pytest.raises(ArtifactError, match="has no model"):
        vllm.LinearBase(config, f"{MLP}.down_proj", 256, [128])
