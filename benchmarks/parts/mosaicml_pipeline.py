"""One side of the loader benchmark: mosaicml-streaming, in an environment of its own, on files of its own kind."""

import io
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure_server import serve, time_stream
from PIL import Image
from pillow_transform import training_transform
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

_COLUMNS = {"image": "bytes", "caption": "str"}


class _Photos(StreamingDataset):
    def __init__(self, folder: Path, *, batch: int, size: int) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=batch)
        self._transform = training_transform(size)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, str]:
        sample = super().__getitem__(at)
        return self._transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["caption"]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time its loader over as many epochs as the batches take; prepare_s: seconds that its files took, once."""
    folder = Path(request["copies"]) / "mosaicml"
    prepare_s = _convert(request["shards"], folder)
    # what a run before has left keeps the next from starting
    clean_stale_shared_memory()

    def stream() -> Iterator[int]:
        data = _Photos(folder, batch=request["batch"], size=request["size"])
        loader = DataLoader(data, batch_size=request["batch"], num_workers=request["workers"], persistent_workers=True)
        while True:
            for images, _ in loader:
                yield len(images)

    return time_stream(stream, request) | {"prepare_s": prepare_s}


def _convert(shards: list[str], folder: Path) -> float:
    seconds = folder.with_suffix(".prepare_s")
    if not seconds.is_file():
        began = time.perf_counter()
        with MDSWriter(out=str(folder), columns=_COLUMNS) as writer:
            for shard in shards:
                for sample in _samples(shard):
                    writer.write(sample)
        seconds.write_text(str(time.perf_counter() - began))
    return float(seconds.read_text())


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    """The photos with their captions; the files of a sample stand together, the photo first."""
    sample: dict[str, Any] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and member.name.endswith((".jpg", ".txt")):
                is_photo = member.name.endswith(".jpg")
                sample["image" if is_photo else "caption"] = file.read() if is_photo else file.read().decode()
                if len(sample) == len(_COLUMNS):
                    yield sample
                    sample = {}


if __name__ == "__main__":
    serve(measure)
