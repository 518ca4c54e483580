"""`qoqc bench --serve --url` against a server: its figures are those of that server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qoqc.cli import main


def test_load_on_a_server(live: Any, tmp_path: Path) -> None:
    arguments = ["--url", live.url, "--requests", "10", "--prompt", "9", "--gen", "6"]
    more = ["--rate", "50", "--warm-up", "2", "-o", str(tmp_path)]
    assert main(["bench", "--serve", *arguments, *more]) == 0
    (load,) = json.loads((tmp_path / "serve.json").read_text())["loads"]
    assert load["system"] == f"stories at {live.url}"
    assert (load["requests"], load["failed"], load["restarted"]) == (10, 0, None)
    assert load["generated_tokens"] == sum(one["tokens"] for one in load["answered"]) > 20
    assert all(0 < one["first"] <= one["whole"] for one in load["answered"])
    assert (tmp_path / "serve.png").exists()
    live.settle()


def test_refusals_of_a_server_are_failures(launch: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    url = launch(max_pending=2, api_key="sesame").url
    arguments = ["--url", url, "--requests", "8", "--prompt", "9", "--gen", "40"]
    more = ["--warm-up", "1", "--api-key-file", str(key), "-o", str(tmp_path)]
    assert main(["bench", "--serve", *arguments, *more]) == 0
    (load,) = json.loads((tmp_path / "serve.json").read_text())["loads"]
    assert load["failed"] == 6
    assert any("2 requests are open" in error for error in load["errors"])
    assert main(["bench", "--serve", "--url", url, *more[:2]]) == 2  # without the key
