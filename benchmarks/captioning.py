#!/usr/bin/env python
"""Captions by cached decoding compared with open_clip's `generate`: seconds a batch, and whether the tokens are equal.

    benchmarks/run captioning [--batch 32] [--length 32] [--beams 4] [--rounds 1] [--json]

Both sides read the same random weights of coca_ViT-B-32 and the same noise for images, in processes of their own that
take turns. open_clip 3.3.0's `generate` raises under transformers 4.57 and 5, so its side has an environment with
transformers 4.56. Its beam search sums raw logits instead of log-probabilities; its tokens are compared where its
decoder gives log-probabilities. In two minutes: --batch 4 --layers 2 --length 16.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError
from vlm.models.model import build_network, model_config

sys.path.insert(0, str(Path(__file__).parent))
from parts.isolated_environment import own_python, same_torch
from parts.messages import say
from parts.open_clip_environment import open_clip_python

SIDE = Path(__file__).parent / "parts" / "caption_side.py"
OPEN_CLIP = ("open_clip_torch==3.3.0", "transformers==4.56.2")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the captioning benchmark."""

    batch: int = 32
    """Images."""

    length: int = 32
    """Tokens of a caption, start and end token counted."""

    beams: int = 4
    """Width of the beam search that is compared, too; 1 leaves it out."""

    layers: int = 12
    """Layers of each tower and of the decoder."""

    rounds: int = 1
    """Turns of each side; the median counts."""

    threads: int = 2
    """Threads of each side."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of open_clip's environments (bench-open-clip; bench-captions, the same with transformers)."""

    json: bool = False
    """Print the result as JSON."""


class Side:
    """A process that decodes one way after the other."""

    def __init__(self, python: Path, name: str, folder: Path, threads: int) -> None:
        words = [str(python), str(SIDE), name, str(folder), str(threads)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name

    def decode(self, way: dict[str, Any]) -> dict[str, Any]:
        """Seconds and rows of tokens.

        Raises:
            VlmError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(way) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise VlmError(f"The process of {self.name} ended while it decoded {way}.")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def write_network(folder: Path, arguments: Arguments) -> None:
    """The configuration, weights and images that both sides read."""
    config = model_config("coca_ViT-B-32")
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        config[part]["layers"] = arguments.layers
    config.pop("custom_text", None)
    torch.manual_seed(0)
    network = build_network(config | {"custom_text": True})
    with torch.no_grad():
        for weights in network.parameters():
            # larger than they are drawn, so that captions differ from image to image
            weights.mul_(1.5)
    pixels = torch.randn(arguments.batch, 3, 224, 224)
    torch.save({"network": network.state_dict(), "pixels": pixels}, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def compare(sides: list[Side], name: str, way: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median seconds of both sides in turns, their ratios, and the share of rows with equal tokens."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    # what others do on the machine meanwhile changes these far less
    cpu_seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    rows: dict[str, list[list[int]]] = {}
    for number in range(rounds):
        for side in sides:
            say(f"{name}, round {number + 1} of {rounds}: {side.name} …")
            answer = side.decode(way)
            seconds[side.name].append(answer["seconds"])
            cpu_seconds[side.name].append(answer["cpu_seconds"])
            rows[side.name] = answer["rows"]
    if way["beams"] > 1:
        rows["theirs"] = sides[1].decode(way | {"log_softmax": True})["rows"]
    # open_clip's greedy rows end in a forced end token, ours in what is likeliest
    last = way["length"] - 1
    same = [one[:last] == other[:last] for one, other in zip(rows["ours"], rows["theirs"], strict=True)]
    return {
        "way": name,
        "ours_seconds": median(seconds["ours"]),
        "theirs_seconds": median(seconds["theirs"]),
        "times_faster": median(seconds["theirs"]) / median(seconds["ours"]),
        "times_less_cpu": median(cpu_seconds["theirs"]) / median(cpu_seconds["ours"]),
        "same_rows": sum(same) / len(same),
        "different_captions": len({tuple(row) for row in rows["ours"]}),
    }


def main(arguments: Arguments) -> None:
    """Measure and show."""
    plain = arguments.cache.expanduser() / "bench-open-clip"
    open_clip_python(plain)
    python = own_python(plain.with_name("bench-captions"), (*OPEN_CLIP, *same_torch()), over=plain)
    base = {"length": arguments.length, "min_length": 6, "groups": 1, "log_softmax": False}
    ways = {"greedy": base | {"beams": 1}}
    if arguments.beams > 1:
        ways[f"{arguments.beams} beams"] = base | {"beams": arguments.beams}
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder), arguments)
        sides = [
            Side(Path(sys.executable), "ours", Path(folder), arguments.threads),
            Side(python, "theirs", Path(folder), arguments.threads),
        ]
        results = [compare(sides, name, way, arguments.rounds) for name, way in ways.items()]
        for side in sides:
            side.close()
    if arguments.json:
        show_json(results)
        return
    rows = [[result[name] for name in result] for result in results]
    show_table(
        ["decoding", "ours, s", "open_clip, s", "times faster", "times less CPU", "same rows", "different captions"],
        rows,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
