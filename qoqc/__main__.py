"""`python -m qoqc`: the same as the command `qoqc`."""

from __future__ import annotations

import sys

from qoqc.cli import main

sys.exit(main())
