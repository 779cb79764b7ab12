"""The wheel built from the tree holds all of it and starts outside of it."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack modules of earlier builds again
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


def start(unpacked, tmp_path, *words):
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    words = [sys.executable, *words]
    return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_nothing_but_vlm_and_its_start_are_installed(unpacked):
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"vlm", "vlm_pipeline.py"}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None, reason="no compiler, or another processor"
)
def test_the_compiled_filter_is_built_where_there_is_a_compiler(unpacked, tmp_path):
    done = start(unpacked, tmp_path, "-c", "from vlm.data import antialias; print(antialias.__file__)")
    assert done.stdout.strip() == str(unpacked / "vlm" / "data" / "antialias.abi3.so"), done.stderr


def test_the_distribution_says_its_name(unpacked):
    metadata = next(unpacked.glob("vlm_pipeline-*.dist-info"), None)
    assert metadata is not None
    assert 'DISTRIBUTION = "vlm-pipeline"' in (unpacked / "vlm" / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_overwritten", [True, False], ids=["installed over ours", "before ours on the path"])
def test_another_package_called_vlm_is_named_before_anything_breaks(unpacked, tmp_path, is_overwritten):
    site = tmp_path / "site"
    shutil.copytree(unpacked, site)
    other = site if is_overwritten else tmp_path / "other"
    (other / "vlm").mkdir(parents=True, exist_ok=True)
    (other / "vlm" / "__init__.py").write_text("from .vlm import *\n", encoding="utf-8")
    (other / "vlm" / "vlm.py").write_text("raise ImportError('never imported')\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (other, site)))}
    done = subprocess.run(
        [sys.executable, "-m", "vlm_pipeline", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert str(other / "vlm" / "__init__.py") in done.stderr
    assert "pip uninstall vlm vlm-pipeline" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_holds_every_source_file(unpacked):
    for folder, inside in (("vlm", ""), ("data", "data"), ("train", "train"), ("index", "index")):
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                assert (unpacked / "vlm" / inside / path.relative_to(ROOT / folder)).is_file(), path


def test_the_wheel_holds_the_pages(unpacked, tmp_path):
    names = {path.name for path in (ROOT / "vlm" / "templates").iterdir()}
    assert {"base.html", "style.css"} <= names
    assert {path.name for path in (unpacked / "vlm" / "templates").iterdir()} == names
    # type checkers read a package's annotations only where it says so
    assert (unpacked / "vlm" / "py.typed").is_file()
    code = "from vlm.pages import render; print(render('base.html', title='A page'))"
    assert "<h1>A page</h1>" in start(unpacked, tmp_path, "-c", code).stdout


def test_the_wheel_holds_the_reference_curves(unpacked, tmp_path):
    code = "from vlm.train.recipes import measured_curves; print(sorted(measured_curves()))"
    done = start(unpacked, tmp_path, "-c", code)
    assert "'fashion'" in done.stdout, done.stderr


def test_it_starts_and_packs_from_there(unpacked, tmp_path):
    assert start(unpacked, tmp_path, "-c", "import vlm; print(vlm.__file__)").stdout.startswith(str(unpacked))
    assert "usage: vlm [--quiet | --verbose] VERB" in start(unpacked, tmp_path, "-m", "vlm", "--help").stdout
    done = start(unpacked, tmp_path, "-m", "vlm", "pack", "scenes", "out", "--scenes.number", "10", "--json")
    assert done.returncode == 0, done.stderr
    assert '"samples": 10' in done.stdout
