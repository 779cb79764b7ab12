"""Folders that `vlm index export` wrote: what they say of themselves."""

import json
from pathlib import Path

from vlm.index.embeddings import Space
from vlm.manifest import MANIFEST

EXPORT = "export"


def exported_space(source: Path) -> Space | None:
    """Whose vectors an export holds; None: the folder is of another tool."""
    path = source / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Space(**values["details"]["space"]) if values["kind"] == EXPORT else None
    except (ValueError, KeyError, TypeError):
        return None
