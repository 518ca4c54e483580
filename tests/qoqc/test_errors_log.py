"""One base for every error; logging and dumps are silent until asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from qoqc import errors
from qoqc.errors import OptionError, QoqcError
from qoqc.log import dump, get_logger, span


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The `qoqc` logger as a fresh process has it."""
    logger = logging.getLogger("qoqc")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def test_every_error_can_be_caught_by_the_base() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) >= 7
    assert all(issubclass(e, QoqcError) for e in found)
    assert all(e.__doc__ for e in found)


def test_a_logger_takes_the_level_of_the_environment(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQC_LOG", "DEBUG")
    assert get_logger("passes").name == "qoqc.passes"
    assert root.level == logging.DEBUG
    assert get_logger("passes").isEnabledFor(logging.DEBUG)


def test_a_level_set_by_the_program_is_kept(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.setLevel(logging.ERROR)
    monkeypatch.setenv("QOQC_LOG", "DEBUG")
    get_logger("passes")
    assert root.level == logging.ERROR


def test_a_bad_level_is_an_option_error(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQC_LOG", "LOUD")
    with pytest.raises(OptionError, match="LOUD"):
        get_logger("passes")


def test_span_logs_the_time_at_debug(
    root: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="qoqc"):
        with span(root.getChild("x"), "pass linear"):
            pass
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage().startswith("pass linear: ")
    assert record.getMessage().endswith(" ms")


def test_dump_writes_below_the_directory(tmp_path: Path) -> None:
    dump(str(tmp_path / "new"), "graphs/01-linear.py", "x = 1\n")
    assert (tmp_path / "new" / "graphs" / "01-linear.py").read_text() == "x = 1\n"


def test_dump_without_a_directory_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dump(None, "graph.py", "x = 1\n")
    assert list(tmp_path.iterdir()) == []
