"""Sets in CLIP_benchmark's WebDataset layout, from those of ../shared/datasets."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlm.data.samples import UNNAMED
from vlm.data.sources.source import SourceOptions
from vlm.evaluation.class_vectors import template_set
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"
CLASSIFICATION = "wds_cifar10"
RETRIEVAL = "wds_flickr8k"
# as many as CLIP_benchmark starts workers, each of which webdataset wants to give a shard
_SHARDS = 4


def write_sets(folder: Path, *, is_large: bool) -> None:
    """CIFAR-10's test images with OpenAI's 80 templates, and Flickr8k's val photos with captions of their own.

    is_large: the images of CIFAR-10's and Flickr8k's training instead, which are more.
    """
    options = SourceOptions(folder="train" if is_large else "test")
    photos = open_evaluation_set(str(DATASETS / "cifar10" / "cifar10.tar"), options=options)
    classification = folder / CLASSIFICATION
    _write_shards(classification / "test", list(_classified(photos)))
    (classification / "classnames.txt").write_text("\n".join(photos.candidates) + "\n", encoding="utf-8")
    templates = [template.replace("{}", "{c}") for template in template_set("openai")]
    (classification / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n", encoding="utf-8")

    retrieval = folder / RETRIEVAL
    shards = DATASETS / "flickr8k" / ("train-*.tar" if is_large else "val-*.tar")
    _write_shards(retrieval / "test", list(_captioned(open_evaluation_set(str(shards)))))
    (retrieval / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")


Members = dict[str, bytes]


def _classified(data: EvaluationSet) -> Iterator[Members]:
    numbers = {name: number for number, name in enumerate(data.candidates)}
    # a random order, so that the batches are not of one class each
    for row in np.random.default_rng(0).permutation(len(data)).tolist():
        yield {"jpg": data.image_file(row), "cls": str(numbers[data.true_labels[row][0]]).encode()}


def _captioned(data: EvaluationSet) -> Iterator[Members]:
    for row, captions in enumerate(data.captions):
        yield {"jpg": data.image_file(row), "txt": "\n".join(captions[UNNAMED]).encode()}


def _write_shards(folder: Path, samples: Sequence[Members]) -> None:
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text(str(_SHARDS), encoding="utf-8")
    for shard, numbers in enumerate(np.array_split(np.arange(len(samples)), _SHARDS)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in numbers.tolist():
                for extension, data in samples[number].items():
                    entry = tarfile.TarInfo(f"{number:06}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
