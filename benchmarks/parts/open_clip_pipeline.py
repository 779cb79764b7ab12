"""One side of the loader benchmark: open_clip's training pipeline, in an environment of its own."""

from collections.abc import Iterator
from typing import Any

from measure_server import serve, time_stream
from open_clip import get_tokenizer, image_transform
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args

MODEL = "ViT-B-32"


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time its loader as its trainer builds it: default augmentation, default tokenizer, float images."""

    def stream() -> Iterator[int]:
        data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=get_tokenizer(MODEL))
        for images, _ in data.dataloader:
            yield len(images)

    arguments = parse_args(
        [
            *("--train-data", "::".join(request["shards"]), "--dataset-type", "webdataset", "--model", MODEL),
            *("--train-num-samples", str((request["batches"] + request["workers"]) * request["batch"])),
            *("--batch-size", str(request["batch"]), "--workers", str(request["workers"])),
        ]
    )
    arguments.world_size, arguments.distributed = 1, False
    transform = image_transform(request["size"], is_train=True)
    return time_stream(stream, request)


if __name__ == "__main__":
    serve(measure)
