"""from_pretrained, save_pretrained and push_to_hub of artifacts, by transformers' own code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.artifact import huggingface
from qoqc.artifact.folder import checksum
from qoqc.artifact.manifest import CARD, INDEX, KERNELS, PATH, WEIGHTS, Manifest
from qoqc.artifact.save import save
from qoqc.config import Options
from qoqc.errors import ArtifactError, Unsupported
from qoqc.runtime import attention_interface
from qoqc.runtime.packed_linear import PackedLinear
from qoqc.testing import sqnr, tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
TOKENS = torch.tensor([[1, 3, 56, 207, 302, 263, 14, 300, 263, 216, 18, 4]])

FRESH = {
    "qoqc first": "import qoqc\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport qoqc",
    "loader first": "import transformers.modeling_utils\nimport qoqc\n"
    "from transformers import AutoModelForCausalLM",
}
BODY = """
import json, sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor([[1, 3, 56, 507]])
print(json.dumps(model.generate(tokens, max_new_tokens=6, do_sample=False)[0].tolist()))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the bundled model in two weight files."""
    directory = tmp_path_factory.mktemp("artifact") / "stories"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    save(model, directory, AutoTokenizer.from_pretrained(MODEL), max_shard_size=2_000_000)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.forward(tokens, use_cache=False).logits
    return found


def compiled_logits(model: Any) -> torch.Tensor:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="qoq", options={"glue": "eager"})
    with torch.no_grad():
        found: torch.Tensor = compiled(TOKENS, use_cache=False).logits
    return found


def contents(directory: Path, *but: str) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name not in but}


@pytest.mark.parametrize(
    "order",
    ["qoqc first", *(pytest.param(o, marks=pytest.mark.slow) for o in FRESH if o != "qoqc first")],
)
def test_a_fresh_process_needs_only_the_import(saved: Path, order: str) -> None:
    program = FRESH[order] + BODY
    result = subprocess.run(
        [sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True
    )
    expected = qoqc.load(saved, glue="eager", kv_bits=16)
    torch._dynamo.reset()
    tokens = expected.generate(torch.tensor([[1, 3, 56, 507]]), max_new_tokens=6, do_sample=False)
    assert json.loads(result.stdout) == tokens[0].tolist()


def test_importing_qoqc_imports_no_torch() -> None:
    program = "import qoqc, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2",
        "phi3",
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neox", "mixtral", "gemma2")),
    ],
)
def test_round_trip_of_families(family: str, tmp_path: Path) -> None:
    """Biases (qwen2), fused linears (phi3), Conv1D (gpt2): eager, compiled, saved again."""
    model = tiny_model(family, torch.bfloat16)
    manifest = save(model, tmp_path / "first")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    packed = [name for name, m in first.named_modules() if isinstance(m, PackedLinear)]
    assert len(packed) == len(manifest.weights) > 0
    # what qoqc.load does with soft caps; the eager attention of transformers rounds elsewhere
    attention_interface.adopt(first)
    eager, compiled = logits(first), compiled_logits(first)
    own = qoqc.load(tmp_path / "first", glue="eager")
    assert torch.equal(logits(own), eager), "the two loaders disagree"
    assert torch.equal(compiled_logits(own), compiled)
    # the same integers; norms and activations that the passes fuse round in another order
    assert sqnr(compiled, eager) > 30
    # and they are the model's: 4-bit weights of a random model, 8-bit activations
    assert sqnr(logits(model), eager) > 8
    first.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    attention_interface.adopt(again)
    assert torch.equal(logits(again), eager)


def test_shards_are_saved_as_they_were(saved: Path, tmp_path: Path) -> None:
    assert len(Manifest.read(saved).shards) == 2
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again", max_shard_size=2_000_000)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.save_pretrained(tmp_path / "again")
    # transformers adds a count of parameters to the index
    assert contents(tmp_path / "again", PATH, INDEX) == contents(saved, PATH, INDEX)
    model.save_pretrained(tmp_path / "again")
    assert list(Manifest.read(tmp_path / "again").shards) == [WEIGHTS], "old files are in the way"
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model)
    )


def test_a_model_may_be_saved_where_it_came_from(copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy)
    before = logits(model)
    model.save_pretrained(copy)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(copy)), before)
    assert list((copy / KERNELS).iterdir())


class _Allocations(TorchDispatchMode):
    """Notes the shapes of floating-point tensors with storage for every element."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
                whole = value.untyped_storage().nbytes() >= value.numel() * value.element_size()
                if whole and value.numel() > 1:
                    self.found.append(tuple(value.shape))
        return result


def test_16_bit_linears_never_exist(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in this thread, where the mode sees it
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with _Allocations() as allocations:
        model = AutoModelForCausalLM.from_pretrained(saved)
    manifest = Manifest.read(saved)
    shapes = {entry.shape for entry in manifest.weights.values()}
    sizes = [n * k for n, k in shapes]
    # the only one is what all released weights read from: as large as the largest, and flat
    linears = [shape for shape in allocations.found if shape in shapes]
    largest = [shape for shape in allocations.found if shape == (max(sizes),)]
    assert (4096, 256) in allocations.found, "the embedding was not seen: nothing was watched"
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.isnan().all()}
    assert len(storages) == 1
    # views of that buffer have the weights' shapes; each weight makes one
    assert len(largest) <= len(manifest.weights) + 1
    assert len(linears) <= 3 * len(manifest.weights), linears[:3]


def test_options_come_with_the_model(tmp_path: Path) -> None:
    options = Options.parse({"group_size": -1, "kv_bits": 8})
    save(tiny_model("llama"), tmp_path / "a", options=options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.qoqc_options == options
    # without options: weights can be used only as they were packed
    assert sqnr(compiled_logits(model), logits(model)) > 30
    config = AutoConfig.from_pretrained(tmp_path / "a").quantization_config
    assert (config["quant_method"], config["group_size"], config["kv_bits"]) == ("qoq", -1, 8)


def test_another_dtype_may_be_asked_for(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = logits(AutoModelForCausalLM.from_pretrained(saved))
    assert logits(model).dtype == torch.float32
    # what bf16 rounds away flips some roundings to int8
    assert sqnr(logits(model), expected) > 20


def test_a_device_map(saved: Path) -> None:
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("device_map needs accelerate, which is not installed")
    model = AutoModelForCausalLM.from_pretrained(saved, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(saved)))
    with pytest.raises(Unsupported, match="are not offloaded"):
        AutoModelForCausalLM.from_pretrained(
            saved, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="offload"
        )


@pytest.mark.parametrize("device_map", [{"a": 0, "b": "disk"}, {"a": "cuda:0", "b": "cpu"}])
def test_offloading_is_refused(device_map: dict[str, Any]) -> None:
    quantizer = huggingface.QoqQuantizer(huggingface.QoqConfig())
    with pytest.raises(Unsupported, match="packed weights are not offloaded"):
        quantizer.validate_environment(device_map=device_map)
    quantizer.validate_environment(device_map={"a": 0, "b": 1})
    quantizer.validate_environment(device_map={"": "cpu"})
    quantizer.validate_environment(device_map=None)


def test_what_is_damaged_is_an_error(copy: Path) -> None:
    path = copy / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{path.name} is damaged"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_without_manifest_it_is_no_artifact(copy: Path) -> None:
    (copy / PATH).unlink()
    with pytest.raises(ArtifactError, match=r"has no qoqc/manifest\.json"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_config_of_another_model_is_an_error(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for change in ({"num_hidden_layers": 6}, {"num_hidden_layers": 4}, {"intermediate_size": 640}):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
            AutoModelForCausalLM.from_pretrained(copy)
        manifest = Manifest.read(copy)
        files = {**manifest.files, "config.json": checksum(copy / "config.json")}
        Manifest(**{**vars(manifest), "files": files}).write(copy)
        with pytest.raises(ArtifactError, match=r"no values for|does not have|has shape"):
            AutoModelForCausalLM.from_pretrained(copy)


def test_linears_with_a_forward_of_their_own_are_refused(tmp_path: Path) -> None:
    save(tiny_model("falcon"), tmp_path / "a")
    with pytest.raises(Unsupported, match="a forward of its own, which runs compiled only"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    qoqc.load(tmp_path / "a")


def test_weights_in_the_cache_of_the_hub(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """from_pretrained downloads what it knows; the manifest is asked for at the same revision."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", INDEX, *Manifest.read(saved).shards):
        shutil.copy(saved / name, snapshot / name)
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, name: str, *, revision: str, cache_dir: Path) -> str:
        asked.append((name, revision, cache_dir))
        (snapshot / name).parent.mkdir(exist_ok=True)
        return str(shutil.copy(saved / name, snapshot / name))

    monkeypatch.setattr(huggingface, "cached_file", download)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    assert asked == [(PATH, "0" * 40, tmp_path / "hub")]
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(saved)))

    def nothing(repo: str, name: str, **kwargs: Any) -> str:
        raise OSError("404")

    (snapshot / PATH).unlink()
    monkeypatch.setattr(huggingface, "cached_file", nothing)
    with pytest.raises(ArtifactError, match="was not made by qoqc, or not uploaded whole"):
        AutoModelForCausalLM.from_pretrained(snapshot)


class _Hub:
    """HfApi over a folder: what was uploaded lies there."""

    folder: Path
    calls: list[tuple[str, Any]]

    def __init__(self, token: Any = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("create", (repo_id, private, self.token)))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
        self.calls.append(("upload", (repo_id, kwargs["revision"])))
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return "url"


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_pushing_uploads_the_same_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(_Hub, "folder", tmp_path / "hub", raising=False)
    monkeypatch.setattr(_Hub, "calls", [], raising=False)
    monkeypatch.setattr(huggingface, "HfApi", _Hub)
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "local")
    if way == "push_to_hub":
        model.push_to_hub("owner/name", private=True, token="t", revision="dev")
        assert _Hub.calls == [
            ("create", ("owner/name", True, "t")),
            ("upload", ("owner/name", "dev")),
        ]
    else:
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="owner/name")
        assert _Hub.calls == [
            ("create", ("owner/name", None, None)),
            ("upload", ("owner/name", None)),
        ]
    assert contents(tmp_path / "hub") == contents(tmp_path / "local")
    assert CARD in contents(tmp_path / "hub")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert torch.equal(logits(again), logits(model))


def test_compile_starts_from_the_options_of_the_artifact(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    save(model, tmp_path / "eight", options=Options(kv_bits=8, group_size=-1))
    read = qoqc.compile(AutoModelForCausalLM.from_pretrained(tmp_path / "eight"))
    assert (read.qoqc_options.kv_bits, read.qoqc_options.group_size) == (8, -1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "eight")
    assert qoqc.compile(again, kv_bits=4).qoqc_options.kv_bits == 4
    with pytest.raises(ArtifactError, match="packed with group_size=-1, asked for is 128"):
        qoqc.compile(AutoModelForCausalLM.from_pretrained(tmp_path / "eight"), group_size=128)
