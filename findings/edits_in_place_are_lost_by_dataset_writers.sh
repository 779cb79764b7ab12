#!/usr/bin/env bash
# mosaicml-streaming 0.13.0 (MDSWriter, encoding jpeg), litdata 0.2.76 (its serializer of JPEGs), datasets 5.2.0 (feature Image), with
# Pillow: an image that was opened from a JPEG file and then changed in place (thumbnail, paste, ImageDraw) is written as
# the file on disk, not as its pixels. All three ask Pillow's `filename` and copy that file. A copy (`image.copy()`, `resize`,
# `convert`) has no file name, and is written as it looks. No warning either way.
# Why it matters: faces that were covered in place are in the corpus after all, and pictures made small in place take the
# space and the decoding time of large ones. Nothing tells: the same code keeps the change once an image came from
# memory. The cure: hand over `image.copy()`, and compare one sample that was read back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make() {  # one environment each: their dependencies exclude one another
  python3 -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet --disable-pip-version-check "${@:2}" "pillow<13" "setuptools<81" 2>/dev/null
}
make streams "mosaicml-streaming==0.13.0" "litdata==0.2.76"
make tables "datasets==5.2.0"
cat >"$work/seen.py" <<'CODE'
import sys
from pathlib import Path

from PIL import Image

folder = Path(sys.argv[1])
Image.new("RGB", (64, 64), "white").save(folder / "photo.jpg", quality=95)


def covered():
    image = Image.open(folder / "photo.jpg")
    image.paste((0, 0, 0), (0, 0, 64, 64))
    return image


def by_mosaicml(image, name):
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=str(folder / name), columns={"image": "jpeg"}) as writer:
        writer.write({"image": image})
    return LocalDataset(str(folder / name))[0]["image"]


def by_litdata(image, name):
    from litdata.streaming.serializers import JPEGSerializer

    (folder / f"{name}.jpg").write_bytes(JPEGSerializer().serialize(image)[0])
    return Image.open(folder / f"{name}.jpg")


def by_datasets(image, name):
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [image]}, features=features)[0]["image"]


for name in sys.argv[2:]:
    write = globals()[name]
    seen = {
        kind: write(image, f"{name}-{kind}").convert("RGB").getpixel((32, 32))
        for kind, image in (("changed", covered()), ("copied", covered().copy()))
    }
    print(f"{name}: covered in black, read back as {seen['changed']}; its copy as {seen['copied']}")
    assert min(seen["changed"]) > 250 and max(seen["copied"]) < 5, seen
CODE
"$work/streams/bin/python" "$work/seen.py" "$work" by_mosaicml by_litdata
"$work/tables/bin/python" "$work/seen.py" "$work" by_datasets
