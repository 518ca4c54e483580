"""Artifacts: what is saved is what is loaded, and nothing damaged is ever used."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.artifact import save as saving
from qoqc.artifact import shards
from qoqc.artifact.checked import Shard
from qoqc.artifact.folder import checksum
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import CARD, FORMAT, KERNELS, PATH, WEIGHTS, Manifest
from qoqc.artifact.packed_file import PackedFile
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.config import Options
from qoqc.errors import ArtifactError, Unsupported
from qoqc.runtime.weights import STORE
from qoqc.testing import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
PROMPT = torch.tensor([[1, 3, 56, 507, 602, 263, 914, 600, 263, 716, 18, 4]])
TOKENS = 24

FRESH = """
import json, sys, torch, qoqc
model = qoqc.load(sys.argv[1], glue="eager")
tokens = model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=int(sys.argv[3]),
                        do_sample=False)
print(json.dumps(tokens[0].tolist()))
"""


def stories() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)


def generated(model: Any) -> list[int]:
    """Greedy tokens. Compiled code of another model of the class must not be met by this one."""
    torch._dynamo.reset()
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    return tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """An artifact of the bundled model, and the tokens the saved model gives itself."""
    directory = tmp_path_factory.mktemp("artifact") / "stories"
    model = qoqc.compile(stories(), glue="eager")
    saving.save(model, directory, AutoTokenizer.from_pretrained(MODEL))
    return directory, generated(model)


@pytest.fixture
def copy(saved: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_a_fresh_process_gives_the_same_tokens(saved: tuple[Path, list[int]]) -> None:
    directory, expected = saved
    arguments = [str(directory), json.dumps(PROMPT.tolist()), str(TOKENS)]
    result = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == expected
    assert len(expected) > PROMPT.shape[1] + 8, "the story ended at once: nothing was compared"


def test_loading_brings_no_16_bit_copies(saved: tuple[Path, list[int]]) -> None:
    model, options = load_model(saved[0])
    original = stories()
    manifest = Manifest.read(saved[0])
    assert len(manifest.weights) == 35
    assert options == Options()
    for name in manifest.weights:
        assert model.get_parameter(name).isnan().all(), name
    for name in manifest.tensors:
        assert torch.equal(model.state_dict()[name], original.state_dict()[name]), name
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    largest = max(original.get_parameter(name).numel() for name in manifest.weights)
    plain = sum(original.state_dict()[n].numel() for n in manifest.tensors)
    assert sum(s.nbytes() for s in storages.values()) <= 2 * (plain + largest)


def test_what_is_not_in_the_file_is_computed_again(saved: tuple[Path, list[int]]) -> None:
    model, _ = load_model(saved[0])
    original = stories()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    frequencies = original.model.rotary_emb.inv_freq
    assert "model.rotary_emb.inv_freq" not in Manifest.read(saved[0]).tensors
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.generation_config.to_dict() == original.generation_config.to_dict()


def test_contents(saved: tuple[Path, list[int]]) -> None:
    directory, _ = saved
    manifest = Manifest.read(directory)
    tensors = load_file(directory / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    module = name.removesuffix("weight")
    stored = {key.removeprefix(module) for key in tensors if key.startswith(module)}
    assert stored == {"qweight", "channel_scale", "group_word"}
    assert name not in tensors
    assert "lm_head.weight" not in tensors, "tied weights are stored once"
    assert manifest.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    sizes = sum(t.numel() * t.element_size() for t in tensors.values())
    assert manifest.bytes_after == sizes < manifest.bytes_before / 2
    assert [graph["graph"] for graph in manifest.graphs] == ["prefill", "decode"]
    assert all(graph["counts"]["linear"] == 35 for graph in manifest.graphs)
    reasons = {(r["name"], r["kept"]) for graph in manifest.graphs for r in graph["refusals"]}
    assert reasons == {("model.embed_tokens", True)}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS} <= set(manifest.files)
    suffixes = {path.suffix for path in directory.rglob("*") if path.is_file()}
    texts = {".json", ".jinja", ".md", ".py", ".txt"}
    assert suffixes == texts | {".safetensors"}, "no pickle, no binaries"


def test_kernels_are_there_for_every_shape(saved: tuple[Path, list[int]]) -> None:
    files = sorted((saved[0] / KERNELS).glob("*.py"))
    shapes = set()
    for file in files:
        assigned = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if node.targets[0].id in ("SPEC", "TILE")
        }
        if file.name.startswith("gemm_"):
            spec = assigned["SPEC"]
            shapes.add((spec["in_features"], spec["out_features"]))
    # q+k+v, o, gate+up, down
    assert shapes == {(256, 512), (256, 256), (256, 1024), (512, 256)}
    families = {file.name.rsplit("-", 1)[0] for file in files}
    # the prefill of an empty cache attends to its own keys: no kernel of ours
    attention = {"kv_rotate_append", "step_attend", "step_combine"}
    gemms = {form.name for form in GEMM.forms} & families
    assert gemms
    others = {"quantize", "norm_quantize", "few_linear", "sample_scores"}
    assert families == gemms | others | attention


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", PATH])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_an_error(copy: Path, name: str, damage: str) -> None:
    path = copy / name
    content = path.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:-100])
    else:
        path.unlink()
    with pytest.raises(ArtifactError) as caught:
        load_model(copy)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message


def test_an_edited_kernel_is_an_error_and_a_removed_one_is_not(copy: Path) -> None:
    first = next((copy / KERNELS).iterdir())
    first.write_text(first.read_text() + "\nraise SystemExit('foreign code')\n")
    with pytest.raises(ArtifactError, match=f"{first.name} is damaged"):
        load_model(copy)
    first.unlink()
    load_model(copy)  # kernels are generated from qoqc's own templates


def test_the_card_may_be_edited(copy: Path) -> None:
    (copy / CARD).write_text("# My model\n")
    load_model(copy)


def test_foreign_version(copy: Path) -> None:
    body = json.loads((copy / PATH).read_text())
    body["format"] = FORMAT + 1
    (copy / PATH).write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=f"format {FORMAT + 1}, this qoqc reads {FORMAT}"):
        load_model(copy)


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is no artifact"):
        load_model(tmp_path)


def resealed(copy: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """Write other contents with checksums that fit: only the checks behind them are left."""
    save_file(tensors, copy / WEIGHTS)
    manifest = Manifest.read(copy)
    files = {**manifest.files, WEIGHTS: checksum(copy / WEIGHTS)}
    sizes = {WEIGHTS: Shard.of(copy / WEIGHTS)}
    fields = {**vars(manifest), "files": files, "shards": sizes, **changes}
    Manifest(**fields).write(copy)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("qweight", torch.zeros(1, 2, 128, 64, dtype=torch.uint8), "expected torch.uint8"),
        ("channel_scale", torch.full((512,), torch.nan), "not finite"),
        ("group_word", torch.zeros(2, 512, dtype=torch.int64), "expected torch.int32"),
        ("group_word", None, "no weight file holds"),
    ],
)
def test_wrong_tensors_are_an_error(
    copy: Path, suffix: str, value: torch.Tensor | None, message: str
) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    tensors = load_file(copy / WEIGHTS)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    resealed(copy, tensors)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_model(copy)
    assert name in str(caught.value)


def test_unknown_architecture(copy: Path) -> None:
    resealed(copy, load_file(copy / WEIGHTS), architecture="NoSuchModel")
    with pytest.raises(ArtifactError, match="needs the class NoSuchModel"):
        load_model(copy)


def test_an_artifact_serves_a_model_with_its_weights(saved: tuple[Path, list[int]]) -> None:
    directory, expected = saved
    model = stories()
    with torch.no_grad():
        # the artifact's values must win over these
        model.model.layers[0].mlp.up_proj.weight.zero_()
    qoqc.compile(model, glue="eager", artifact=str(directory))
    assert generated(model) == expected


@pytest.mark.parametrize(
    ("family", "changes", "both"),
    [
        ("llama", {}, [r"\[384, 128\]", r"\[4096, 256\]"]),
        ("gpt2", {}, ["transformer.wte.weight", "model.layers.0"]),
    ],
)
def test_another_models_artifact_is_refused(
    saved: tuple[Path, list[int]], family: str, changes: dict[str, Any], both: list[str]
) -> None:
    model = tiny_model(family, **changes)
    qoqc.compile(model, glue="eager", artifact=str(saved[0]))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=both[0]) as caught:
        model.generate(PROMPT % 300, max_new_tokens=2)
    found = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(found, ArtifactError)
    assert caught.match(both[1])


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "deepseek_v3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen2", "mixtral")),
    ],
)
def test_round_trip_of_families(family: str, tmp_path: Path) -> None:
    """Conv1D weights (square ones too), biases, soft caps, 3D experts, latent attention."""
    model = tiny_model(family)
    manifest = saving.save(model, tmp_path / family)
    assert manifest.weights
    tokens = PROMPT % 300
    torch._dynamo.reset()
    qoqc.compile(model, glue="eager")
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch._dynamo.reset()
        loaded = qoqc.load(tmp_path / family, glue="eager")
        assert torch.equal(loaded(tokens, use_cache=False).logits, expected)
    assert expected.isfinite().all()


def test_saving_what_was_loaded_gives_the_same_tensors(
    saved: tuple[Path, list[int]], tmp_path: Path
) -> None:
    model, _ = load_model(saved[0])
    saving.save(model, tmp_path / "again", AutoTokenizer.from_pretrained(saved[0]))
    first, again = load_file(saved[0] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_released_weights_cannot_be_saved_in_16_bit(saved: tuple[Path, list[int]]) -> None:
    model, _ = load_model(saved[0])
    options = Options.parse({"exclude": ["*up_proj"]})
    with pytest.raises(ArtifactError, match="up_proj.weight was released"):
        saving.save(model, saved[0].parent / "other", options=options)
    assert [path.name for path in saved[0].parent.iterdir()] == [saved[0].name]


@pytest.mark.slow
def test_bits_of_layers_are_kept_unless_others_are_asked_for(tmp_path: Path) -> None:
    options = Options.parse({"kv_layers": [8, 4]})
    recipe: dict[str, Any] = {"layers": []}
    gate = {"increase": 1.5}
    manifest = saving.save(
        tiny_model("llama"), tmp_path / "a", options=options, recipe=recipe, gate=gate
    )
    found = Manifest.read(tmp_path / "a")
    assert (found.recipe, found.gate) == (manifest.recipe, manifest.gate) == (recipe, gate)
    model = qoqc.load(tmp_path / "a", glue="eager")
    assert model.qoqc_options.kv_layers == (8, 4)
    torch._dynamo.reset()
    output = model.generate(PROMPT % 300, max_new_tokens=2, return_dict_in_generate=True)
    assert [layer.bits for layer in output.past_key_values.layers] == [8, 4]
    assert qoqc.load(tmp_path / "a", kv_bits=8).qoqc_options.kv_layers == ()


def test_options_are_kept_and_can_be_changed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options = Options.parse({"group_size": -1, "kv_bits": 8, "exclude": ["*o_proj"]})
    manifest = saving.save(model, tmp_path / "a", options=options)
    assert not any("o_proj" in name for name in manifest.weights)
    assert "model.layers.0.self_attn.o_proj.weight" in manifest.tensors
    _, loaded = load_model(tmp_path / "a")
    assert loaded == options
    assert qoqc.load(tmp_path / "a").qoqc_options == options
    changed = qoqc.load(tmp_path / "a", kv_bits=16, glue="eager").qoqc_options
    assert (changed.kv_bits, changed.glue, changed.group_size) == (16, "eager", -1)
    with pytest.raises(ArtifactError, match="packed with group_size=-1, asked for is 128"):
        qoqc.load(tmp_path / "a", group_size=128)
    with PackedFile(tmp_path / "a", torch.device("cpu")) as file:
        with pytest.raises(ArtifactError, match="packed with group_size=-1"):
            file.require_group_size(128)


def test_strict_refuses_before_anything_is_written(tmp_path: Path) -> None:
    options = Options.parse({"strict": True})
    with pytest.raises(Unsupported, match="strict"):
        saving.save(tiny_model("deepseek_v3"), tmp_path / "a", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_split_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.qoqc_parallel = SimpleNamespace(ranks=SimpleNamespace(rank=1, size=2))
    with pytest.raises(Unsupported, match="LlamaForCausalLM is part 1 of 2 here .* without tp"):
        qoqc.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    model.qoqc_parallel.ranks.size = 1  # all of it
    qoqc.save(model, tmp_path / "a")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(tensors: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        saving.save(tiny_model("llama"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_packed_weights_die_with_their_model(saved: tuple[Path, list[int]]) -> None:
    model, _ = load_model(saved[0])
    param = model.model.layers[0].mlp.up_proj.weight
    assert STORE.packed(param) is not None
    assert STORE.is_released(param)
