"""Public data that lies outside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_file(name: str) -> Path:
    """The path of a public data file; skips the test where there is none."""
    named = os.environ.get("GOLDY_SHARED_DATA")
    folders = [Path(named)] if named else [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is in none of the shared data folders; set GOLDY_SHARED_DATA")
