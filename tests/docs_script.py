"""scripts/write_docs.py as a module, for the tests that compare its pages with docs/."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_write_docs() -> ModuleType:
    """The script, loaded from its file since scripts/ is not a package."""
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_up_to_date(page: str) -> bool:
    """Whether a page of docs/ is what the script writes."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8") == load_write_docs().PAGES[page]()
