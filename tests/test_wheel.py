"""The wheel built from the tree holds all of it and starts outside of it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
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


def test_nothing_but_vlm_is_installed(unpacked):
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"vlm"}


def test_the_wheel_holds_every_source_file(unpacked):
    for folder, inside in (("vlm", ""), ("data", "data"), ("train", "train"), ("index", "index")):
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                assert (unpacked / "vlm" / inside / path.relative_to(ROOT / folder)).is_file(), path


def test_it_starts_and_packs_from_there(unpacked, tmp_path):
    assert start(unpacked, tmp_path, "-c", "import vlm; print(vlm.__file__)").stdout.startswith(str(unpacked))
    assert "usage: vlm VERB" in start(unpacked, tmp_path, "-m", "vlm", "--help").stdout
    done = start(unpacked, tmp_path, "-m", "vlm", "pack", "scenes", "out", "--scenes.number", "10", "--json")
    assert done.returncode == 0, done.stderr
    assert '"samples": 10' in done.stdout
