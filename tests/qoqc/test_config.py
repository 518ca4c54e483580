"""Options and environment: what is accepted, and what each refusal says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.config import LOG_LEVELS, Options, cache_dir, log_level
from qoqc.errors import OptionError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QOQC_DUMP", "QOQC_CACHE", "QOQC_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("raw", [None, {}])
def test_nothing_given_means_defaults(raw: dict[str, Any] | None) -> None:
    assert Options.parse(raw) == Options()


@pytest.mark.parametrize(
    "raw",
    [
        {"group_size": -1},
        {"kv_bits": 8},
        {"kv_bits": 16},
        {"prefill_kv": "quantized"},
        {"strict": True},
        {"tune": "search"},
        {"glue": "eager"},
        {"release": True},
        {"artifact": "/some/where"},
        {"artifact": None},
        {"dump": "out"},
    ],
)
def test_good_values_are_kept(raw: dict[str, Any]) -> None:
    assert Options.parse(raw) == dataclasses.replace(Options(), **raw)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("group_size", 64, "128, -1"),
        ("group_size", "128", "128, -1"),
        ("group_size", True, "128, -1"),
        ("group_size", 128.0, "128, -1"),
        ("group_size", None, "128, -1"),
        ("group_size", torch.tensor([1, 2]), "128, -1"),
        ("kv_bits", 3, "4, 8, 16"),
        ("kv_bits", True, "4, 8, 16"),
        ("kv_bits", 4.0, "4, 8, 16"),
        ("kv_bits", [4], "4, 8, 16"),
        ("kv_layers", 4, "a list with 4, 8 or 16 for each layer"),
        ("kv_layers", [4, 5], "4, 8 or 16"),
        ("kv_layers", [4, True], "4, 8 or 16"),
        ("prefill_kv", "approximate", "'exact', 'quantized'"),
        ("tune", "max", "'heuristic', 'search'"),
        ("tune", False, "'heuristic', 'search'"),
        ("glue", None, "'inductor', 'eager'"),
        ("strict", 1, "True or False"),
        ("strict", "yes", "True or False"),
        ("release", None, "True or False"),
        ("exclude", 5, "list of name patterns"),
        ("exclude", ["lm_head", 5], "list of name patterns"),
        ("exclude", None, "list of name patterns"),
        ("artifact", 3, "directory path"),
        ("dump", True, "directory path"),
    ],
)
def test_a_bad_value_names_option_value_and_allowed_set(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({name: value})
    text = str(caught.value)
    assert name in text
    assert repr(value) in text
    assert allowed in text


def test_an_unknown_option_lists_every_known_one() -> None:
    with pytest.raises(OptionError, match="unknown option 'kv_bit'") as caught:
        Options.parse({"kv_bit": 4})
    for field in dataclasses.fields(Options):
        assert field.name in str(caught.value)


def test_bits_of_layers() -> None:
    assert Options(kv_bits=8).layer_bits(3) == (8, 8, 8)
    mixed = Options.parse({"kv_layers": [4, 8, 16]})
    assert mixed.layer_bits(3) == mixed.kv_layers == (4, 8, 16)
    with pytest.raises(OptionError, match="the bits of 3 layers, the model has 2"):
        mixed.layer_bits(2)
    with pytest.raises(OptionError, match="kv_bits=16 means no cache of qoqc's"):
        Options.parse({"kv_layers": [4, 8], "kv_bits": 16})


def test_parsed_options_hold_the_allowed_values_themselves() -> None:
    options = Options.parse({"group_size": 128, "kv_bits": 4})
    assert type(options.group_size) is int
    assert type(options.kv_bits) is int
    assert hash(options) == hash(Options())


@pytest.mark.parametrize(
    ("given", "kept"),
    [("lm_head", ("lm_head",)), (["a*", "b"], ("a*", "b")), (("a",), ("a",)), ([], ())],
)
def test_exclude_becomes_a_tuple(given: Any, kept: tuple[str, ...]) -> None:
    assert Options.parse({"exclude": given}).exclude == kept


def test_a_path_object_becomes_a_string() -> None:
    assert Options.parse({"artifact": Path("a") / "b"}).artifact == "a/b"


def test_the_environment_gives_the_dump_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_DUMP", "/from/env")
    assert Options.parse(None).dump == "/from/env"
    assert Options.parse({"kv_bits": 8}).dump == "/from/env"


def test_an_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_DUMP", "/from/env")
    assert Options.parse({"dump": "mine"}).dump == "mine"
    assert Options.parse({"dump": None}).dump is None


def test_an_empty_variable_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_DUMP", "")
    monkeypatch.setenv("QOQC_CACHE", "")
    assert Options.parse(None).dump is None
    assert cache_dir() == Path.home() / ".cache" / "qoqc"


def test_the_cache_directory_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().kv_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize("level", LOG_LEVELS)
def test_log_levels_in_any_case(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_LOG", level.lower())
    assert log_level() == level


def test_the_default_log_level_is_quiet() -> None:
    assert log_level() == "WARNING"


@pytest.mark.parametrize("value", ["LOUD", "10", "DEBUG,INFO"])
def test_a_bad_log_level_names_the_variable_and_the_set(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQC_LOG", value)
    with pytest.raises(OptionError, match=f"QOQC_LOG='{value}'.*DEBUG, INFO, WARNING, ERROR"):
        log_level()
