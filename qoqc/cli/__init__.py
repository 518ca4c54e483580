"""The command `qoqc`: compile, chat, inspect, eval. One file per command; app.py declares them."""

from __future__ import annotations

from qoqc.cli.app import main

__all__ = ["main"]
