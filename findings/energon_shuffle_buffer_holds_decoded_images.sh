#!/usr/bin/env bash
# megatron-energon 7.4.1: the shuffle buffer of get_train_dataset holds decoded samples: decoding comes before it, and only
# encode_sample after it. With the default decoder, which makes float32 tensors, 200 photos of 512×512, 50 kB each as files, take 638 MB
# more in one process instead of 8; a buffer of 10,000 would take 31 GB, in every worker of every rank. The first batch waits
# until the whole buffer is decoded.
# Why it matters: a buffer of thousands of samples is what one is used to from webdataset, whose shuffle stands before decode and
# holds files. Here the same number takes the machine's memory; the option is described as a number of samples "before task encoding".
# The cure: `decoder = None` in the task encoder and decoding in encode_sample; or image_decode="pilrgb" (a quarter) and a small buffer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "megatron-energon==7.4.1" "torch==2.15.0" "numpy<3" "psutil"
cat >"$work/seen.py" <<'CODE'
import dataclasses
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil
from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
from PIL import Image

FOLDER = Path(sys.argv[1])
PHOTOS, SIZE = 400, 512


class Decoded(DefaultTaskEncoder):
    @stateless
    def encode_sample(self, sample):
        return dataclasses.replace(sample, image=sample.image.mean())


class Files(DefaultTaskEncoder):
    decoder = None

    @stateless
    def encode_sample(self, sample):
        return dataclasses.replace(sample, image=float(np.asarray(Image.open(io.BytesIO(sample.image))).mean() / 255))


def grown_mb(encoder, buffer):
    """How much a process grows until its first batch."""
    before = psutil.Process().memory_info().rss
    data = get_train_dataset(
        FOLDER,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=4,
        shuffle_buffer_size=buffer,
        max_samples_per_sequence=None,
        task_encoder=encoder,
    )
    next(iter(get_loader(data)))
    return (psutil.Process().memory_info().rss - before) / 1e6


if len(sys.argv) > 2:
    grown_mb(Files(), None)  # whatever a first batch loads
    print(grown_mb({"decoded": Decoded, "files": Files}[sys.argv[2]](), int(sys.argv[3]) or None))
    sys.exit()

rng = np.random.default_rng(0)
FOLDER.mkdir()
sizes = []
with tarfile.open(FOLDER / "photos.tar", "w") as tar:
    for number in range(PHOTOS):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        sizes.append(len(file.getvalue()))
        for name, data in ((f"{number:04d}.jpg", file.getvalue()), (f"{number:04d}.txt", b"a photo")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
energon = Path(sys.executable).with_name("energon")
words = ["--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--num-workers", "1"]
words += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']
subprocess.run([energon, "prepare", str(FOLDER), *words], check=True, stdout=subprocess.DEVNULL)
print(f"{PHOTOS} JPEGs, on average {sum(sizes) / PHOTOS / 1e3:.0f} kB")
grown = {}
for kind, buffer in (("decoded", 0), ("decoded", 200), ("files", 200)):
    done = subprocess.run([sys.executable, __file__, str(FOLDER), kind, str(buffer)], check=True, stdout=subprocess.PIPE)
    grown[kind, buffer] = float(done.stdout.split()[-1])
    print(f"{kind}, a buffer of {buffer}: {grown[kind, buffer]:.0f} MB more until the first batch")
assert grown["decoded", 200] > 200 * SIZE * SIZE * 3 * 4 / 1e6 * 0.9
assert grown["decoded", 0] < 150 and grown["files", 200] < 150
CODE
export OMP_NUM_THREADS=1
"$work/venv/bin/python" "$work/seen.py" "$work/photos" 2>/dev/null
