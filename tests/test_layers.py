"""The shape of the tree: imports, sizes, packaging."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vlm", "data", "train", "index")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_imports_flow_one_way():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_hold_one_idea_and_functions_stay_short():
    too_long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 700:
            too_long.append(f"{path} has more than 700 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                own = length - len((ast.get_docstring(node) or "").splitlines())
                if own > 60:
                    too_long.append(f"{path.name}:{node.lineno} {node.name} has {own} lines")
    assert not too_long


def test_no_file_name_stands_twice():
    """Except that a verb in `vlm/cli` may be called as the module whose calls it shows."""
    stems = [path.stem for path in SOURCES if path.parent.name != "cli" and path.stem != "__init__"]
    assert not {stem for stem in stems if stems.count(stem) > 1}
    assert not {"utils", "helpers", "common", "misc"} & set(stems)


def test_the_package_list_is_the_tree():
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for name, folder in mapping.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            if any(parent.is_symlink() for parent in init.parents):
                continue
            inside = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inside)))
    assert listed == found


@pytest.mark.parametrize("folder", ["data", "train", "index"])
def test_links_stand_for_the_mapped_folders(folder):
    link = ROOT / "vlm" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_the_help_needs_no_heavy_import():
    code = "import sys; from vlm.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "numpy", "tyro", "faiss", "pyarrow", "open_clip"):
        assert f"'{heavy}'" not in done.stdout


def test_no_future_annotations_hide_shapes():
    assert not [path for path in SOURCES if "from __future__ import annotations" in path.read_text(encoding="utf-8")]
