"""Small indexes of real images: Flickr8k val, fashion photos, and emoji with names in 12 languages."""

import csv
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np

from tests.index.embed_fixture import embed_shards
from vlm.index.build import build_index
from vlm.index.index_files import MapRecord
from vlm.index.writer import IndexWriter

ROWS = 120
LANGUAGES = ("ar", "de", "en", "es", "fr", "ja", "ko", "nl", "pl", "pt", "ru", "zh")


def flickr8k(datasets):
    """Keys, encoded images, and what their JSON says."""
    with tarfile.open(datasets / "flickr8k" / "val-00000.tar") as tar:
        for members in itertools.islice(zip(*[iter(tar)] * 3, strict=True), ROWS):
            files = {Path(member.name).suffix: tar.extractfile(member).read() for member in members}
            yield Path(members[0].name).stem, files[".jpg"], json.loads(files[".json"])


def fashion(datasets):
    """The same of photos of products, with their columns."""
    with tarfile.open(datasets / "fashion" / "fashion.tar") as tar:
        rows = csv.DictReader(io.StringIO(tar.extractfile("captions.csv").read().decode()))
        # spread over the table, which is sorted
        for row in itertools.islice(rows, 0, 60 * ROWS, 60):
            columns = {name: row[name] for name in ("gender", "articleType", "baseColour", "season")}
            described = {"captions": [row["title"]], "year": int(row["year"]), **columns}
            yield Path(row["file"]).stem, tar.extractfile(row["file"]).read(), described


def emoji(datasets):
    """The same of drawings, with their names in all languages."""
    with tarfile.open(datasets / "emoji" / "emoji.tar") as tar:
        lines = tar.extractfile("captions.jsonl").read().splitlines()
        for line in itertools.islice(lines, 0, 50 * ROWS, 50):
            row = json.loads(line)
            names = {f"captions_{language}": [row["names"][language]] for language in LANGUAGES}
            described = {"vendor": row["vendor"], "tags": row["keywords"], **names}
            yield row["key"], tar.extractfile(row["file"]).read(), described


def build_real_index(folder, samples, model):
    """An index of the samples, with a map of their two principal axes."""
    shard = folder / "00000.tar"
    with tarfile.open(shard, "w") as tar:
        for key, image, described in samples:
            ending = "png" if image.startswith(b"\x89PNG") else "jpg"
            for name, data in ((f"{key}.{ending}", image), (f"{key}.json", json.dumps(described).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    embed_shards(model, [str(shard)], folder / "embeddings", model_spec="colours", batch_size=64)
    index = folder / "index"
    build_index(folder / "embeddings", index)
    with IndexWriter(index) as writer:
        rows = writer.snapshot.rows
        centred = writer.snapshot.vectors(rows)
        centred = centred - centred.mean(axis=0)
        places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        writer.set_map(rows, places, MapRecord(file="", rows=0, fitted=len(rows), method="axes", seed=0))
    return index
