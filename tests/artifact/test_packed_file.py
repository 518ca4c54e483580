"""An artifact read while it is verified: the same tensors, and never a model of a damaged file."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qoqc.artifact import checked
from qoqc.artifact.adopt import adopt_weights
from qoqc.artifact.folder import checksum
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import Manifest, stored_name
from qoqc.artifact.packed_file import PackedFile
from qoqc.artifact.save import save
from qoqc.errors import ArtifactError
from qoqc.runtime.weights import STORE
from qoqc.testing import capture, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.tensor([[1, 3, 56, 207, 302]])
SECONDS = 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact in several weight files."""
    directory = tmp_path_factory.mktemp("artifact") / "tiny"
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    save(model, directory, max_shard_size=100_000)
    assert len(Manifest.read(directory).shards) > 1
    return directory


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy with one bit of the last value of its largest weight file turned around."""
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = copy / largest(copy)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return copy


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("qoqc-")]


def largest(directory: Path) -> str:
    shards = Manifest.read(directory).shards
    return max(shards, key=lambda name: shards[name].size)


@pytest.mark.parametrize("ahead", [False, True])
def test_tensors_are_those_of_the_files(saved: Path, ahead: bool) -> None:
    manifest = Manifest.read(saved)
    stored = {k: v for name in manifest.shards for k, v in load_file(saved / name).items()}
    with PackedFile(saved, CPU) as file:
        if ahead:
            file.read_ahead([*manifest.weights, *manifest.tensors])
        tensors = {name: file.tensor(name) for name in reversed(manifest.tensors)}
        for name in reversed(manifest.weights):
            fields = file.packed(name).tensors().items()
            tensors |= {stored_name(name, field): tensor for field, tensor in fields}
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name


def test_tensors_are_read_while_the_hashes_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow(path: Path, *part: int) -> str:
        if path.suffix == ".safetensors":
            assert go.wait(SECONDS)
        return checksum(path, *part)

    monkeypatch.setattr(checked, "checksum", slow)
    with PackedFile(saved, CPU) as file:
        names = file.manifest.tensors
        file.read_ahead(names)
        assert all(file.tensor(name).numel() for name in names)
        assert not go.is_set()
        go.set()


def test_damage_found_after_all_was_read_is_an_error(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match=f"{largest(damaged)} is damaged .its SHA-256"):
        with PackedFile(damaged, CPU) as file:
            for name in file.manifest.tensors:
                file.tensor(name)
    with pytest.raises(ArtifactError, match=f"{largest(damaged)} is damaged .its SHA-256"):
        load_model(damaged)
    monkeypatch.setenv("QOQC_VERIFY", "lazy")
    load_model(damaged)


def test_a_damaged_file_matters_more_than_what_it_led_to(damaged: Path, saved: Path) -> None:
    with pytest.raises(ArtifactError, match="is damaged") as found:
        with PackedFile(damaged, CPU) as file:
            file.tensor("nowhere")
    assert "no weight file holds nowhere" in str(found.value.__context__)
    with pytest.raises(ArtifactError, match="no weight file holds nowhere"):
        with PackedFile(saved, CPU) as file:
            file.read_ahead(["nowhere"])
            file.tensor("nowhere")
    with pytest.raises(KeyboardInterrupt):  # nobody's error
        with PackedFile(damaged, CPU):
            raise KeyboardInterrupt


def test_nothing_of_a_damaged_file_is_adopted(damaged: Path, saved: Path) -> None:
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    gm, inputs = capture(model, TOKENS, use_cache=False)
    param = model.model.layers[0].mlp.up_proj.weight
    for _ in range(2):  # it is not taken for adopted the second time
        with pytest.raises(ArtifactError, match="is damaged"):
            adopt_weights(damaged, gm, inputs)
        assert STORE.packed(param) is None
    assert adopt_weights(saved, gm, inputs) == 7
    assert STORE.packed(param) is not None


def test_leaving_early_ends_the_threads(saved: Path) -> None:
    with pytest.raises(KeyError):
        with PackedFile(saved, CPU) as file:
            file.read_ahead([*file.manifest.weights, *file.manifest.tensors])
            raise KeyError


def test_a_name_has_one_meaning(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="is named as packed and as not"):
        with PackedFile(saved, CPU) as file:
            file.tensor(next(iter(file.manifest.weights)))


def test_a_header_that_lies_is_an_error_and_ends_the_threads(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copy / largest(copy)).write_bytes(b"\2\0\0\0\0\0\0\0[]")
    with pytest.raises(ArtifactError, match=f"{largest(copy)} is damaged"):
        PackedFile(copy, CPU).__enter__()
    # as if the manifest had been made to fit it
    monkeypatch.setattr(checked, "_has_header", lambda path, shard: True)
    monkeypatch.setattr(checked, "checksum", lambda path, *part: "x" * 64)
    file = PackedFile(copy, CPU)
    file.manifest.files.update(dict.fromkeys(file.manifest.files, "x" * 64))
    for name, shard in file.manifest.shards.items():
        file.manifest.shards[name] = dataclasses.replace(shard, pieces=())
    with pytest.raises(ArtifactError, match=f"{largest(saved)} is damaged: "):
        file.__enter__()
