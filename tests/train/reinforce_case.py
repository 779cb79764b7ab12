"""Shards, photos and settings the tests of reinforcement share."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.caption_sampler import CaptionSampler
from vlm.data.collate import TrainingCollator
from vlm.data.pack import encode_pair
from vlm.data.precomputed_features import PrecomputedFeatures
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.samples import Pair
from vlm.data.shards import ShardSet, count_samples, expand_shards
from vlm.data.transforms import EvalTransform
from vlm.train.dataset_reinforcement import ReinforceConfig, Teachers
from vlm.train.run_config import LoaderConfig
from vlm.train.teacher_views import ViewGeometry

GEOMETRY = ViewGeometry(crop_scale=(0.3, 0.8), flip=0.5)
CONFIG = ReinforceConfig(num_views=3, geometry=GEOMETRY, seed=4)
LOADER = LoaderConfig(arrays=("teacher_image", "teacher_text"), crop_scale=(0.3, 0.8), flip=0.5)


def teachers_of(*models, **changes):
    return Teachers(models=models, names=tuple(model.name for model in models), **changes)


def photo(number: int, *, size=(90, 70)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(folder: Path, numbers, *, per_shard=4, bad=()) -> list[str]:
    """Shards of images with captions in two languages; of the bad ones the image is cut or the captions missing."""
    from webdataset.writer import TarWriter

    folder.mkdir()
    for first in range(0, len(numbers), per_shard):
        with (
            (folder / f"{first // per_shard:05d}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for number in numbers[first : first + per_shard]:
                captions = {"": (f"a red circle {number}", f"number {number}"), "de": (f"Bild {number}",)}
                sample = encode_pair(Pair(key=f"k{number}", image=photo(number), captions=captions))
                if number in bad:
                    sample |= {"jpg": sample["jpg"][:40]} if number % 2 else {"json": b"{}", "txt": b""}
                tar.write(sample)
    return expand_shards(str(folder))


def batch_of(shards, *, size, languages=("en", "de"), names=LOADER.arrays, epoch=0, geometry=GEOMETRY):
    """The batch that training makes of all the samples, once each."""
    counts = tuple(count_samples(shards))
    plan = BatchSampler(
        order=SampleOrder(counts=counts, window=100), batch_size=sum(counts), position=epoch * sum(counts)
    )
    lengths: Any = LengthTokenizer()
    collate = TrainingCollator(
        plan=plan,
        view=geometry.view_for(EvalTransform(size=size)),
        tokenizer=lengths,
        draw=CaptionSampler(languages=languages),
        arrays=PrecomputedFeatures(names=names),
    )
    return collate(plan[0], ShardSet(shards))


class LengthTokenizer:
    def encode(self, texts):
        return np.array([[len(text)] for text in texts], np.int64)


def content_of(sample):
    return sample.key, sample.image, sample.captions, sample.metadata


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in (".tar", ".jsonl")}
