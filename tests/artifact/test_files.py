"""Weight files, card, kernels and checksums of an artifact, each by itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qoqc.artifact import checked, kernel_files
from qoqc.artifact.card import card
from qoqc.artifact.checked import Shard, require_plain_names, verify_files
from qoqc.artifact.folder import checksum
from qoqc.artifact.kernel_sources import NOMINAL, Wanted, choices, devices
from qoqc.artifact.manifest import INDEX, KERNELS, TUNING, WEIGHTS, Manifest
from qoqc.artifact.shards import shards_in, write_shards
from qoqc.codegen.build import OPS
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.tuning import table
from qoqc.config import private_cache_dir, verify_mode
from qoqc.errors import ArtifactError, OptionError, Unsupported

QUANTIZE = Wanted("quantize", QuantizeSpec(256, torch.bfloat16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_one_file_or_several_with_an_index(folder: Path) -> None:
    tensors = {name: torch.full((100,), value) for value, name in enumerate("abc")}
    assert list(write_shards(tensors, folder)) == [WEIGHTS]
    assert not (folder / INDEX).exists()
    (folder / WEIGHTS).unlink()
    shards = write_shards(tensors, folder, 900)
    assert shards == shards_in(folder)
    assert len(shards) == 3
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, tensor in tensors.items():
        assert torch.equal(load_file(folder / index[name])[name], tensor)
    mode = (folder / "config.json").stat().st_mode
    assert all((folder / name).stat().st_mode == mode for name in shards)


@pytest.mark.parametrize("limit", ["", "3XB", 0, "GB", "-1GB"])
def test_a_limit_that_is_none(folder: Path, limit: int | str) -> None:
    with pytest.raises(OptionError, match="expected bytes or a size such as 5GB"):
        write_shards({"a": torch.zeros(1)}, folder, limit)


def test_a_shard_is_told_by_its_header(folder: Path) -> None:
    (name,) = write_shards({"a": torch.zeros(100)}, folder)
    before = Shard.of(folder / name)
    content = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(content[:-1] + b"\1")
    assert Shard.of(folder / name) == before, "values are not looked at"
    (folder / name).write_bytes(content[:9] + b"x" + content[10:])
    assert Shard.of(folder / name) != before
    (folder / name).write_bytes(b"\xff" * 8)
    with pytest.raises(ValueError, match="a header of"):
        Shard.of(folder / name)


@pytest.fixture
def shard_file(folder: Path) -> Path:
    """A weight file of some hundred bytes."""
    write_shards({"a": torch.arange(77)}, folder)
    return folder / WEIGHTS


def test_pieces_of_a_file_are_hashed(shard_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "PIECE", 100)
    content = shard_file.read_bytes()
    shard = Shard.hashed(shard_file)
    assert shard.pieces == tuple(
        hashlib.sha256(content[start : start + 100]).hexdigest()
        for start in range(0, len(content), 100)
    )
    assert Shard.read(json.loads(json.dumps(dataclasses.asdict(shard)))) == shard


@pytest.mark.parametrize("pieces", [["0" * 64], [5], None, "ab"], ids=str)
def test_pieces_of_another_file_are_no_pieces(
    shard_file: Path, monkeypatch: pytest.MonkeyPatch, pieces: Any
) -> None:
    monkeypatch.setattr(checked, "PIECE", 100)
    raw = dataclasses.asdict(Shard.of(shard_file))
    with pytest.raises((ValueError, TypeError)):
        Shard.read({**raw, "pieces": pieces})


@pytest.mark.parametrize("whole", [False, True], ids=["in pieces", "as a whole"])
def test_each_damaged_byte_is_found(
    shard_file: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(checked, "PIECE", 100)
    shard = Shard.of(shard_file) if whole else Shard.hashed(shard_file)
    content = bytearray(shard_file.read_bytes())
    files = {WEIGHTS: checksum(shard_file)}
    assert verify_files(shard_file.parent, files, {WEIGHTS: shard}) == 1
    for place in range(len(content) - 130, len(content)):
        content[place] ^= 1
        shard_file.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged"):
            verify_files(shard_file.parent, files, {WEIGHTS: shard})
        content[place] ^= 1


def test_lazy_verification_reads_no_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards({"a": torch.zeros(100)}, folder)
    files = {name: checksum(folder / name) for name in ("config.json", WEIGHTS)}
    assert verify_files(folder, files, shards) == 2
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + b"\1")
    assert verify_files(folder, files, shards, "lazy") == 2
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged"):
        verify_files(folder, files, shards)
    (folder / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged"):
        verify_files(folder, files, shards, "lazy")
    monkeypatch.setenv("QOQC_VERIFY", "lazy")
    assert verify_mode() == "lazy"
    monkeypatch.setenv("QOQC_VERIFY", "never")
    with pytest.raises(OptionError, match="QOQC_VERIFY='never': expected one of full, lazy"):
        verify_mode()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b"])
def test_names_that_leave_the_directory(name: str) -> None:
    with pytest.raises(ValueError, match="is not a file of the artifact"):
        require_plain_names([name])
    require_plain_names(["a", "a/b.c"])


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "versions": {"qoqc": "1.2"},
        "options": {"group_size": 128, "kv_bits": 4, "kv_layers": []},
        "weights": {},
        "tensors": [],
        "aliases": {},
        "graphs": [{"refusals": [{"name": "lm_head", "reason": "output head", "kept": True}]}],
        "bytes_before": 16_000_000,
        "bytes_after": 5_000_000,
        "files": {},
        "shards": {},
        **changes,
    }
    return Manifest(**fields)


def test_the_card_names_what_it_is_and_how_good() -> None:
    recipe = {
        "recipe": {"rotate": True, "smooth_attention": True, "method": "gptq", "reorder": False},
        "samples": 128,
        "seq": 1024,
    }
    gate = {"perplexity": 7.5, "baseline": 7.25, "increase": 3.4, "text": "held out"}
    text = card(manifest(base_model="owner/llama", recipe=recipe, gate=gate))
    for part in (
        'base_model: "owner/llama"',
        "base_model_relation: quantized",
        "# owner/llama in W4A8KV4",
        "| left in 16 bit | lm_head |",
        "| size | 5.0 MB, 16.0 MB before |",
        "QoQ: rotate, smooth attention, GPTQ; calibrated on 128 windows of 1024 tokens",
        "perplexity 7.5000; 7.2500 in 16 bit; +3.40 % (held out)",
        "from_pretrained(PATH)",
    ):
        assert part in text, part
    plain = card(manifest())
    assert "rounded to nearest" in plain
    assert "not measured" in plain
    assert "base_model" not in plain


def test_the_card_quotes_what_it_is_given() -> None:
    text = card(manifest(base_model="x\n---\n# <script>|`a`"))
    assert text.count("---\n") == 2, "the name ended the front matter"
    assert "<script>" not in text
    assert "base_model:" not in text, "not a name on the Hub"
    options = {"group_size": -1, "kv_bits": 4, "kv_layers": [4, 8, 4]}
    assert "4 bit in 2 layers, 8 bit in 1 layers" in card(manifest(options=options))


def test_kernels_are_chosen_for_the_archs_asked_for() -> None:
    cpu = torch.device("cpu")
    assert devices(cpu) == NOMINAL
    assert [key.arch for key in devices(cpu, (90, 80))] == [90, 80]
    with pytest.raises(OptionError, match="arch sm_75: expected sm_80, sm_89, sm_90"):
        devices(cpu, (75,))
    found = choices([QUANTIZE], devices(cpu, (90,)))
    assert {(choice.size, choice.device.arch) for choice in found} == {(1, 90), (16, 90), (512, 90)}


def test_machine_code_is_not_written_by_an_interpreter(folder: Path) -> None:
    entries = kernel_files.write_kernels([QUANTIZE], torch.device("cpu"), folder)
    assert {entry["op"] for entry in entries} == {"quantize"}
    assert all((folder / entry["file"]).is_file() for entry in entries)
    assert all(entry["cubin"] is None for entry in entries)
    with pytest.raises(Unsupported, match="TRITON_INTERPRET=1; unset it"):
        kernel_files.write_kernels([QUANTIZE], torch.device("cpu"), folder, (90,))


AOT = """
import sys, torch
from pathlib import Path
from qoqc.artifact.kernel_files import write_kernels
from qoqc.artifact.kernel_sources import Wanted
from qoqc.codegen.kernels.quantize import QuantizeSpec
wanted = Wanted("quantize", QuantizeSpec(256, torch.bfloat16))
write_kernels([wanted], torch.device("cpu"), Path(sys.argv[1]), (80, 90))
"""


def test_machine_code_for_gpus_that_are_not_there(folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", AOT, str(folder)], check=True, env=environment)
    files = sorted((folder / KERNELS).glob("*.cubin"))
    assert {path.name.rsplit(".", 2)[1] for path in files} == {"sm_80", "sm_90"}
    for path in files:
        content = path.read_bytes()
        assert content[:4] == b"\x7fELF"
        # e_machine, ELF specification: 190 is EM_CUDA
        assert int.from_bytes(content[18:20], "little") == 190


def test_tuning_entries_that_were_used_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQC_CACHE", str(folder / "cache"))
    key = NOMINAL[2]
    op = OPS["quantize"]
    form, tile = op.heuristic(QUANTIZE.spec, 16, key)
    entry = table.entry_key(op, QUANTIZE.spec, 16, key)
    table.record(entry, form, tile)
    entries = kernel_files.write_kernels([QUANTIZE], torch.device("cpu"), folder, ())
    assert [e["size"] for e in entries if e["tuned"]] == [16]
    (path,) = (folder / TUNING).iterdir()
    assert path.name == "h100-sm_90.json"
    assert table._read(path) == {entry: (form.name, tile)}


def test_a_cache_that_others_can_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path / "cache"))
    path = private_cache_dir("kernels")
    assert path == tmp_path / "cache" / "kernels"
    assert path.stat().st_mode & 0o777 == 0o700
    for bad in (path, path.parent):
        for mode in (0o770, 0o702):
            bad.chmod(mode)
            with pytest.raises(OptionError, match=f"{bad} is writable by others.*chmod go-w"):
                private_cache_dir("kernels")
        bad.chmod(0o755)
    assert private_cache_dir("kernels") == path
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid != 0:
        with pytest.raises(OptionError, match="belongs to another user"):
            private_cache_dir("kernels")
