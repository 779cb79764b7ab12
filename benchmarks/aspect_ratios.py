#!/usr/bin/env python
"""What images gain that keep their shape, over squares of as many patches: recall, images per second, padding.

    benchmarks/run aspect_ratios 'flickr8k/train-*.tar' 'flickr8k/val-*.tar' OUT --tokenizer words.model --cut

`--cut` first cuts every photo to 3:2, 4:3, 1:1, 3:4 or 2:3, drawn by its key, as cameras make them; without it the
shards are taken as they are. A small naflexvit is trained from scratch on each side, each seed in turn, on the same
samples in the same order. The model of squares is measured on centre crops and on squashed images. Finished runs are
kept in OUT and not repeated; others begin anew, since a resumed one would not know its processor time. Images per
second are those of processor time, so that other work on the machine weighs less; padding is that of batches in the
order of the shards.
"""

import hashlib
import io
import json
import shutil
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro
from PIL import Image

import vlm
from vlm.console import show_json, show_table
from vlm.data.shards import expand_shards
from vlm.data.transforms import TokenGrid
from vlm.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say

# 3:2 twice, as most cameras have it
_SHAPES = ((3, 2), (3, 2), (4, 3), (1, 1), (3, 4), (2, 3))
_TRUNK = "{'patch_size': 12, 'embed_dim': 128, 'depth': 4, 'num_heads': 2}"
_METRICS = ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@10")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    train: tyro.conf.Positional[str]
    """Training shards."""

    val: tyro.conf.Positional[str]
    """Shards to measure retrieval on."""

    out: tyro.conf.Positional[Path]
    """Folder of the runs, and of the shards that are cut."""

    tokenizer: str = "clip"
    """Tokenizer of all runs."""

    cut: bool = False
    """Cut the photos to shapes first."""

    side: int = 8
    """Patches along a square; images that keep their shape have at most its square."""

    seeds: tuple[int, ...] = (0, 1)
    """Random seeds."""

    epochs: float = 3.4
    """Epochs of each run."""

    batch_size: int = 128
    """Batch size."""

    json: Annotated[bool, tyro.conf.arg(help="Print the results as JSON.")] = False


def main(arguments: Arguments) -> None:
    """Run what is missing and show the table."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    train = cut_shards(arguments.train, arguments.out / "train") if arguments.cut else arguments.train
    val = cut_shards(arguments.val, arguments.out / "val") if arguments.cut else arguments.val
    padding = measure_padding(arguments, train)
    rows: list[dict[str, Any]] = []
    # the first run of a process imports what the others find
    run_once(arguments, train, "squares-first", seed=0, steps=2)
    for seed in arguments.seeds:
        squares = run_once(arguments, train, f"squares-{seed}", seed)
        shapes = run_once(arguments, train, f"shapes-{seed}", seed)
        rows.append(measure(squares, val, f"squares, centre crop, seed {seed}", "shortest"))
        rows.append(measure(squares, val, f"squares, squashed, seed {seed}", "squash"))
        rows.append(measure(shapes, val, f"own shape, seed {seed}", "") | {"padding": padding})
        if not arguments.json:
            show_table(list(rows[-1]), [[row.get(name, "") for name in rows[-1]] for row in rows])
    if arguments.json:
        show_json({"rows": rows})


def cut_shards(pattern: str, folder: Path) -> str:
    """The same shards with each photo cut to a shape that its key draws, at a place that its key draws too."""
    folder.mkdir(exist_ok=True)
    for url in expand_shards(pattern):
        path = folder / Path(url).name
        if path.is_file():
            continue
        part = path.with_suffix(".part")
        with tarfile.open(url) as source, tarfile.open(part, "w") as target:
            for entry in source:
                member = source.extractfile(entry)
                assert member is not None
                data = member.read()
                if entry.name.endswith(".jpg"):
                    data = cut_photo(data, hashlib.sha256(entry.name.encode()).digest())
                copy = tarfile.TarInfo(entry.name)
                copy.size = len(data)
                target.addfile(copy, io.BytesIO(data))
        part.rename(path)
    return str(folder / "*.tar")


def cut_photo(photo: bytes, numbers: bytes) -> bytes:
    """The largest part of a shape that fits into a photo. numbers: at least three, which shape and place follow."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    columns, rows = _SHAPES[numbers[0] % len(_SHAPES)]
    unit = min(image.width / columns, image.height / rows)
    width, height = round(columns * unit), round(rows * unit)
    left = (image.width - width) * numbers[1] // 255
    top = (image.height - height) * numbers[2] // 255
    file = io.BytesIO()
    image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=95)
    return file.getvalue()


def run_once(arguments: Arguments, train: str, name: str, seed: int, steps: int = -1) -> Path:
    """A run of one side, trained unless it was already, with its processor seconds beside it. steps: -1 for epochs."""
    folder = arguments.out / name
    if (folder / "manifest.json").is_file():
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    say(f"{name} …")
    is_square = name.startswith("squares")
    tokens = "" if is_square else f"tokens={arguments.side**2},"
    tower = f"timm:naflexvit_base_patch16_gap,{tokens}overrides={_TRUNK}+bag@256"
    started = time.process_time()
    vlm.train(
        "flickr8k",
        data=train,
        run=folder,
        architecture=tower,
        image_size=12 * arguments.side if is_square else 0,
        tokenizer=arguments.tokenizer,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        steps=steps,
        seed=seed,
        workers=0,
    )
    (folder / "seconds.json").write_text(json.dumps(time.process_time() - started), encoding="utf-8")
    return folder


def measure(run: Path, val: str, name: str, resize_mode: str) -> dict[str, Any]:
    """Retrieval on held-out shards. resize_mode: how images become squares; empty is the model's own way."""
    model = load_model(str(run))
    if resize_mode:
        model = replace(model, view=replace(model.view, resize_mode=resize_mode))
    result = vlm.evaluate(model, retrieval=val).retrieval
    assert result is not None
    metrics = result.metrics()
    seen = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seen"]
    seconds = json.loads((run / "seconds.json").read_text(encoding="utf-8"))
    values: dict[str, Any] = {"images": name, "images per CPU second": round(seen / seconds, 1)}
    return values | {metric: round(100 * metrics[metric], 1) for metric in _METRICS}


def measure_padding(arguments: Arguments, train: str) -> str:
    """The share of tokens in batches that are padding."""
    grid = TokenGrid(patch=12, tokens=arguments.side**2)
    lengths: list[int] = []
    for url in expand_shards(train):
        with tarfile.open(url) as tar:
            for entry in tar:
                member = tar.extractfile(entry)
                if member is not None and entry.name.endswith((".jpg", ".png")):
                    rows, columns = grid.cells(*Image.open(member).size)
                    lengths.append(rows * columns)
    shares: list[float] = []
    for first in range(0, len(lengths), arguments.batch_size):
        batch = lengths[first : first + arguments.batch_size]
        shares.append(1 - sum(batch) / (len(batch) * max(batch)))
    return f"{100 * mean(shares):.1f}%"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
