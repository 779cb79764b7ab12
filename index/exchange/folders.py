"""Folders that `vlm index export` wrote: what they say of themselves, and where none may be begun."""

import json
from pathlib import Path

from vlm.errors import UsageError
from vlm.index.embeddings import Space
from vlm.manifest import MANIFEST

EXPORT = "export"


def refuse_existing(out: Path) -> None:
    """Refuse to write where something lies; an empty folder may be there.

    Raises:
        UsageError: something is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name another folder or remove it.")


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
