"""The page about an artifact: whole, escaped, self-contained; looked at by a browser if any."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qoqc.artifact.manifest import Manifest, WeightEntry
from qoqc.artifact.report import report
from qoqc.artifact.svg import bars, shares

VOID = frozenset({"meta"})
EVIL = '<script>document.title="ran"</script><img src=http://x/y onerror=alert(1)>'


class _Page(HTMLParser):
    """Collects tags and text, and complains about what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def manifest(**changes: Any) -> Manifest:
    layer = {
        "name": "model.layers.0",
        "kv": {"bits": 8, "errors": {"4": 0.3}, "reason": "4 bits ruin it"},
        "errors": {"q_proj": 0.001, "down_proj": 0.02},
        "sqnr": 21.5,
        "refused": ["no reorder: odd"],
    }
    kernel = {
        "op": "w4a8_linear",
        "form": "gemm_plain",
        "spec": {"in_features": 256},
        "size": 16,
        "tile": {"BLOCK_M": 16},
        "tuned": True,
        "roofline": 0.75,
        "device": {"name": "A100"},
        "file": "qoqc/kernels/gemm_plain-0.py",
    }
    refusal = {"name": "lm_head", "reason": "output head", "kept": True}
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "versions": {"qoqc": "1.2"},
        "options": {"group_size": 128, "kv_bits": 4, "kv_layers": [4, 8]},
        "weights": {"up_proj.weight": WeightEntry(512, 256, 128, False, "bfloat16")},
        "tensors": [],
        "aliases": {},
        "graphs": [{"graph": "decode", "counts": {"linear": 7}, "refusals": [refusal]}],
        "bytes_before": 1_000_000,
        "bytes_after": 500_000,
        "files": {"config.json": "ab12"},
        "shards": {},
        "base_model": "owner/name",
        "kernels": [kernel],
        "recipe": {"layers": [layer]},
        "gate": {"perplexity": 7.5, "baseline": 7.25, "increase": 3.4, "kl": 0.01},
        **changes,
    }
    return Manifest(**fields)


def test_it_says_everything_the_manifest_knows() -> None:
    page = _Page(report(manifest(), "stories"))
    for part in (
        *("stories", "owner/name", "KV cache in 4, 8 bit", "7.25", "decode", "linear"),
        *("output head", "by a rule", "4 bits ruin it", "21.5", "down_proj", "0.02"),
        *("no reorder: odd", "w4a8_linear", "in_features=256", "BLOCK_M=16", "75 %", "A100"),
        *("up_proj.weight", "512 x 256", "ab12", "config.json", "table"),
    ):
        assert part in page.text, part
    assert page.tags.count("svg") == 3, "accuracy, sizes, SQNR"


def test_an_artifact_that_was_not_calibrated() -> None:
    page = _Page(report(manifest(recipe=None, gate=None, kernels=[], base_model=None), "x"))
    assert "Not measured when it was compiled" in page.text
    assert "nothing was measured" in page.text
    assert page.tags.count("svg") == 1


def test_it_needs_no_network_and_runs_nothing() -> None:
    page = _Page(report(manifest(), "x"))
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "action"} & names
    assert not any(name.startswith("on") for name in names)
    assert "url(" not in report(manifest(), "x")
    assert "default-src 'none'" in str(dict(page.attributes))


def test_what_the_manifest_says_is_escaped() -> None:
    whole = manifest(
        architecture=EVIL,
        base_model=EVIL,
        versions={EVIL: EVIL},
        graphs=[
            {
                "graph": EVIL,
                "counts": {EVIL: 1},
                "refusals": [{"name": EVIL, "reason": EVIL, "kept": False}],
            }
        ],
        files={EVIL: EVIL},
        kernels=[{"op": EVIL, "spec": {EVIL: EVIL}, "file": EVIL}],
        recipe={"layers": [{"name": EVIL, "sqnr": 1.0, "refused": [EVIL]}]},
        gate={"text": EVIL},
    )
    page = _Page(report(whole, EVIL))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("document.title") > 10, "nothing of it arrived"


def test_bars_are_to_scale() -> None:
    widths = [
        float(w)
        for w in re.findall(
            r'width="([\d.]+)" height="16"',
            bars([("a", 10.0), ("b", 5.0), ("c", 0.0), ("d", float("nan"))], "dB"),
        )
    ]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)
    assert widths[2:] == [0.0, 0.0]
    drawing = shares([("before", {"x": 8.0}), ("now", {"y": 1.0, "x": 3.0})], "MB")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="16"', drawing)]
    assert widths[0] == pytest.approx(widths[1] * 8, abs=0.5)
    assert "8 MB" in drawing
    _Page(bars([], "dB") + shares([], "MB"))


def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(report(manifest(base_model=EVIL), "stories"), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1200"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    url = path.as_uri()
    subprocess.run(
        [*command, profile, f"--screenshot={picture}", url],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 900
    # a blank page of that size compresses to about 4 kB
    assert len(content) > 15_000
    result = subprocess.run(
        [*command, profile, "--dump-dom", url],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>stories</title>" in result.stdout, "a script ran"
    assert "<script" not in result.stdout
    assert result.stdout.count("<svg") == 3
