"""One side of the loader benchmark, the upper bound of the others: JPEGs in memory to uint8 views, nothing else.

Crops are sampled beforehand; no tar, captions, batches or transfer between processes. Decoded at reduced scales, by the
loader's decoder with torch's filter ("torch") or with its own ("own", the same pixels), or by the usual Pillow code
("Pillow"): scaled decoding (`draft`) and area averaging (`BOX`).
"""

import io
import multiprocessing
import time
from math import ceil
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from measure_server import serve
from PIL import Image

from vlm.data.tar import ShardReader
from vlm.data.transforms import Crop, RandomResizedCrop, resize_antialiased


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Images per second of `workers` processes, each decoding its even share of the batches."""
    images = [read for shard in request["shards"] for read in _images(shard)]
    count = request["batches"] * request["batch"] // request["workers"]
    context = multiprocessing.get_context("fork")
    barrier, spans = context.Barrier(request["workers"]), context.SimpleQueue()
    processes = [
        context.Process(target=_decode_many, args=(images, request, count, number, barrier, spans))
        for number in range(request["workers"])
    ]
    for process in processes:
        process.start()
    found = [spans.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for _, end in found) - min(begin for begin, _ in found)
    return {"images_per_s": count * request["workers"] / seconds}


def _images(shard: str) -> list[bytes]:
    reader = ShardReader(shard)
    images = [reader.read(number).image for number in range(len(reader))]
    reader.close()
    return images


def _decode_many(
    images: list[bytes], request: dict[str, Any], count: int, number: int, barrier: Barrier, spans: Any
) -> None:
    torch.set_num_threads(1)
    size, decode = request["size"], _DECODERS[request["filter"]]
    rng = np.random.default_rng(number)
    chosen = [images[place] for place in rng.integers(len(images), size=count)]
    view = RandomResizedCrop(size=size)
    crops: list[Crop] = []
    for image in chosen:
        height, width, *_ = simplejpeg.decode_jpeg_header(image)
        crops.append(view.draw(int(width), int(height), rng))
    barrier.wait()
    began = time.perf_counter()
    for image, crop in zip(chosen, crops, strict=True):
        decode(image, crop, size)
    spans.put((began, time.perf_counter()))


def _decode_crop(image: bytes, crop: Crop, size: int) -> np.ndarray:
    shorter = min(crop.width, crop.height)
    step = next((step for step in (8, 4, 2) if step * size <= shorter), 1)
    if step == 1:
        pixels = simplejpeg.decode_jpeg(image, fastupsample=size <= 0.75 * shorter)
    else:
        height, width, *_ = simplejpeg.decode_jpeg_header(image)
        pixels = simplejpeg.decode_jpeg(image, min_height=ceil(int(height) / step), min_width=ceil(int(width) / step))
    rows = slice(crop.top // step, (crop.top + crop.height) // step)
    columns = slice(crop.left // step, (crop.left + crop.width) // step)
    return pixels[rows, columns]


def _decode(image: bytes, crop: Crop, size: int) -> np.ndarray:
    batch = torch.from_numpy(_decode_crop(image, crop, size)).unsqueeze(0).permute(0, 3, 1, 2)
    return F.interpolate(batch, (size, size), mode="bicubic", antialias=True)[0].numpy()


def _decode_by_own_filter(image: bytes, crop: Crop, size: int) -> np.ndarray:
    shown = np.empty((size, size, 3), np.uint8)
    resize_antialiased(_decode_crop(image, crop, size), shown, interpolation="bicubic")
    return shown


def _decode_by_pillow(image: bytes, crop: Crop, size: int) -> np.ndarray:
    pil_image = Image.open(io.BytesIO(image))
    whole, share = pil_image.width, size / min(crop.width, crop.height)
    pil_image.draft("RGB", (int(pil_image.width * share), int(pil_image.height * share)))
    step = whole / pil_image.width
    right = min((crop.left + crop.width) / step, pil_image.width)
    bottom = min((crop.top + crop.height) / step, pil_image.height)
    box = (crop.left / step, crop.top / step, right, bottom)
    return np.asarray(pil_image.convert("RGB").resize((size, size), Image.Resampling.BOX, box=box))


_DECODERS = {"torch": _decode, "own": _decode_by_own_filter, "Pillow": _decode_by_pillow}


if __name__ == "__main__":
    serve(measure)
