"""One update of a folder's index in a process of its own, whose model counts the images it sees.

    python counted_update.py FOLDER HOME MODEL LOG

Each batch appends its number of images to LOG before it is embedded, so that killed processes are counted too. The
result goes to stdout as JSON.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from vlm.api.find import ImageFolder
from vlm.service.search import load_encoder


class CountedModel:
    """A model that notes how many images it sees."""

    def __init__(self, spec: str, log: Path) -> None:
        self._model: Any = load_encoder(spec)
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed_images(self, images: Any) -> Any:
        """As the model."""
        with self._log.open("a") as file:
            file.write(f"{len(images)}\n")
        return self._model.embed_images(images)


def run(folder: str, home: str, model: str, log: str) -> None:
    """Update, and print what it did with the peak of memory."""

    def load(spec: str) -> Any:
        return CountedModel(spec, Path(log))

    update = ImageFolder(folder, model=model, index=home, load=load).update()
    assert update is not None
    print(json.dumps(update.to_json() | {"peak_mb": _peak_mb(), "loaded_torch": "torch" in sys.modules}))


def _peak_mb() -> float:
    """The peak of this process's memory; `ru_maxrss` would be that of the process that started it, if larger."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(*sys.argv[1:])
