"""A separate virtual environment for a tool that cannot share ours."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from parts.messages import say

from vlm.errors import VlmError

# it needs NumPy 1, which newer pyarrow does not support although its requirements allow it
AUTOFAISS = ("autofaiss==2.18.0", "pyarrow<20", "psutil")
# sentence-transformers 2, which it imports, needs transformers 4
CLIP_RETRIEVAL = ("clip-retrieval==2.45.0", "transformers<5", "setuptools<81")
# loaders of files that they prepare or convert first
CONVERTING_LOADERS = ("megatron-energon==7.4.1", "mosaicml-streaming==0.13.0")


def same_torch() -> tuple[str, ...]:
    """Requirements for the torch and torchvision of this environment, for speed comparisons."""
    import torch
    import torchvision

    return tuple(f"{module.__name__}=={module.__version__.split('+')[0]}" for module in (torch, torchvision))


def own_python(folder: Path, packages: Sequence[str], *, over: Path | None = None) -> Path:
    """The interpreter of an environment in `folder` with these packages; the environment is created if missing.

    over: another environment whose packages it uses where it has none of its own, since torch alone takes 5 GB.

    Raises:
        VlmError: it cannot be created.
    """
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        say(f"Installing {', '.join(packages)} into {folder} …")
        folder.parent.mkdir(parents=True, exist_ok=True)
        uv = shutil.which("uv")
        if uv:
            run_quietly([uv, "venv", "--allow-existing", "--python", sys.executable, str(folder)])
            run_quietly([uv, "pip", "install", "--python", str(python), *packages])
        else:
            run_quietly([sys.executable, "-m", "venv", str(folder)])
            if over:
                # pip reads it too, and leaves what lies there as it is
                (_packages_of(folder) / "over.pth").write_text(f"{_packages_of(over)}\n", encoding="utf-8")
            run_quietly([str(python), "-m", "pip", "install", *packages])
        (folder / "ready").touch()
    return python


def _packages_of(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def run_quietly(command: list[str]) -> None:
    """Run a command.

    Raises:
        VlmError: it fails; the message has the end of its output.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout)[-2000:]}")
