"""Where the repository is: the one place that tests and their helpers find its files from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
TESTS = ROOT / "tests"
