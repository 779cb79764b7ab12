"""A full disk and a read-only one: real file systems, mounted in a name space of their own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.errors import VlmError
from vlm.train.checkpoint.checkpoint_files import find_damage, list_checkpoints
from vlm.train.checkpoint.manager import CheckpointWriter

def fill(folder, left):
    space = os.statvfs(folder)
    with (folder / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(space.f_bavail * space.f_frsize - left))

def spoil(kind, folder):
    if kind == "full":
        fill(folder, 1 << 20)
    elif kind == "fills":
        # says there is room, so that the disk fills up in the midst of writing
        shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40)
        fill(folder, 8192)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)

for kind in ("full", "read-only", "fills"):
    folder = Path(sys.argv[1]) / kind
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], check=True)
    state = small_state()
    writer = CheckpointWriter(folder / "checkpoints", keep=5)
    writer.save(state, ledger=Ledger(), is_scheduled=True)
    writer.wait()
    step(state, torch.randn(6, 4))
    spoil(kind, folder)
    try:
        writer.save(state, ledger=Ledger(), is_scheduled=True)
        writer.close()
    except VlmError as error:
        print(kind, "said:", error)
    left = list_checkpoints(folder / "checkpoints")
    hidden = list(folder.glob("checkpoints/.*"))
    print(kind, "left:", [path.name for path in left], [find_damage(path) for path in left], hidden)
"""


@pytest.mark.slow
def test_a_run_that_cannot_save_says_what_it_needs_and_keeps_what_it_has(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Umr", "true"], check=False).returncode:
        pytest.skip("no name spaces of one's own here")
    child = ["unshare", "-Umr", sys.executable, "-c", CHILD, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(child, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    said = {"full": "too little space", "read-only": "Read-only file system", "fills": "No space left"}
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for kind, reason in said.items():
        told, left = (line for line in lines if line.startswith(f"{kind} "))
        assert f"Step 2 cannot be saved in {tmp_path / kind / 'checkpoints'}: " in told
        assert reason in told
        assert "It takes " in told
        assert "are free" in told
        assert f"vlm train {tmp_path / kind} --resume" in told
        assert left == f"{kind} left: ['step-00000001'] [''] []"
