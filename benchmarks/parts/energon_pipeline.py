"""One side of the loader benchmark: Megatron-Energon, in an environment of its own, on copies with its index."""

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure_server import serve, time_stream
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from pillow_transform import training_transform

_PREPARE = ["prepare", "--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--num-workers", "1"]
_FIELDS = ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']
# as in its guide; the buffer holds decoded images
_SHUFFLE_BUFFER = 100


class _Photos(DefaultTaskEncoder):
    # its default, float tensors of whole images, takes longer
    decoder = SampleDecoder(image_decode="pilrgb")

    def __init__(self, size: int) -> None:
        super().__init__()
        self._transform = training_transform(size)

    @stateless(restore_seeds=True)
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        return dataclasses.replace(sample, image=self._transform(sample.image))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time its loader; prepare_s: seconds that its index took, once."""
    folder = Path(request["copies"]) / "energon"
    prepare_s = _prepare(request["shards"], folder)
    worker_config = WorkerConfig(rank=0, world_size=1, num_workers=request["workers"])

    def stream() -> Iterator[int]:
        data = get_train_dataset(
            folder,
            worker_config=worker_config,
            batch_size=request["batch"],
            shuffle_buffer_size=_SHUFFLE_BUFFER,
            max_samples_per_sequence=None,
            task_encoder=_Photos(request["size"]),
        )
        for batch in get_loader(data):
            yield len(batch.image)

    return time_stream(stream, request) | {"prepare_s": prepare_s}


def _prepare(shards: list[str], folder: Path) -> float:
    seconds = folder / "prepare_s"
    if not seconds.is_file():
        folder.mkdir(parents=True)
        for shard in shards:
            shutil.copy(shard, folder)
        began = time.perf_counter()
        energon = Path(sys.executable).with_name("energon")
        subprocess.run([energon, _PREPARE[0], str(folder), *_PREPARE[1:], *_FIELDS], check=True)
        seconds.write_text(str(time.perf_counter() - began))
    return float(seconds.read_text())


if __name__ == "__main__":
    serve(measure)
