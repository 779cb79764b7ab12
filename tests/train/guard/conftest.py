"""Where a run keeps its checkpoints."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of checkpoints, yet to be made."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"
