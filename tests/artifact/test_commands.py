"""What the commands compile and inspect do with the files of an artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from qoqc.artifact.manifest import INDEX, Manifest
from qoqc.cli import main
from qoqc.cli.compile import Files
from qoqc.errors import OptionError
from qoqc.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(directory)
    return directory


def test_files_and_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, page = tmp_path / "artifact", tmp_path / "page.html"
    assert main(["compile", str(model), "-o", str(target), "--max-shard-size", "200KB"]) == 0
    manifest = Manifest.read(target)
    assert len(manifest.shards) > 1
    assert (target / INDEX).is_file()
    # not the whole path, which is nobody's business who downloads it
    assert manifest.base_model == "tiny"
    assert main(["inspect", str(target), "--html", str(page)]) == 0
    assert f"{page}: the same as a page" in capsys.readouterr().out
    assert "<h1>artifact</h1>" in page.read_text()
    assert main(["inspect", str(model), "--html", str(page)]) == 2
    assert "is not an artifact; make one by qoqc compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "hopper"], "--arch hopper: expected names such as sm_80,sm_90"),
        (["--arch", "sm_80,sm_75"], "arch sm_75: expected sm_80, sm_89, sm_90"),
        (["--max-shard-size", "big"], "max_shard_size 'big': expected bytes or a size such as 5GB"),
        (["--arch", "sm_90"], "nothing is compiled under TRITON_INTERPRET=1"),
    ],
)
def test_bad_values(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["compile", str(model), "-o", str(tmp_path / "a"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_archs_are_read() -> None:
    assert Files(arch="sm_90, 80,sm_90").archs() == (90, 80)
    assert Files().archs() == ()
    with pytest.raises(OptionError):
        Files(arch="sm_9").archs()
