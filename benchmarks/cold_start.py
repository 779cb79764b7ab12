#!/usr/bin/env python
"""How fast a command answers from the shell, against another checkout; parity of ONNX exports; cost and gain of int8.

    git worktree add ../before COMMIT
    benchmarks/run cold_start --before ../before [--rounds 7] [--keep FOLDER] [--json]

Both checkouts run the same commands on the same index, in turn, each in a new process, after a round that only warms
caches. Seconds are medians; CPU seconds (user and system) are more certain on a shared machine.
"""

import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from vlm.console import show_json, show_table
from vlm.manifest import is_complete

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.onnx_towers import TOWERS, int8_speed, measure_parity

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {"search by words": 1 / 8, "search by an item": 1 / 4, "classify one image": 1 / 4, "index info": 1 / 4}
"""The largest share of the other checkout's time that a command may take; of its memory a quarter, for each."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of cold starts."""

    before: Path
    """Another checkout, to compare with."""

    rounds: int = 7
    """Rounds; in each both checkouts run each command once."""

    keep: Path | None = None
    """Folder for the data, a model and an index, which a later run takes up."""

    towers: tuple[str, ...] = tuple(TOWERS)
    """Pairs of towers whose export is compared with torch."""

    speed_architecture: str = "ViT-B-32"
    """open_clip architecture, of random weights, whose speed in int8 is measured."""

    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a process: seconds by the clock and of the CPU, and its peak memory."""

    wall: float
    cpu: float
    megabytes: float


def main(arguments: Arguments) -> None:
    """Prepare, measure, show."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        prepare(folder, arguments.before)
        results: dict[str, Any] = {"commands": compare_commands(arguments, folder)}
        results["int8"] = {"recall": int8_recall(folder), "speed": int8_speed(arguments.speed_architecture)}
        results["parity"] = [asdict(measure_parity(name, folder / "quickstart")) for name in arguments.towers]
    if arguments.json:
        show_json(results)
    else:
        show(results)


def prepare(folder: Path, before: Path) -> None:
    """A short quickstart by the other checkout, whose formats both can read; an export; an image of its shards."""
    quickstart = folder / "quickstart"
    if not is_complete(quickstart / "index"):
        say("preparing a model and an index …")
        _run(before.resolve(), ["quickstart", str(quickstart), "--scenes", "3000", "--steps", "120"])
    if not is_complete(quickstart / "run" / "model" / "onnx"):
        say("exporting it …")
        _run(ROOT, ["export", str(quickstart / "run"), "--to", "onnx"])
    image = folder / "image.jpg"
    if not image.is_file():
        shard = min((quickstart / "shards" / "val").glob("*.tar"))
        with tarfile.open(shard) as tar:
            first = next(member for member in tar if member.name.endswith(".jpg"))
            file = tar.extractfile(first)
            assert file is not None
            image.write_bytes(file.read())


def compare_commands(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Each command's medians in both checkouts, and their ratios."""
    index = str(folder / "quickstart" / "index")
    commands = {
        "search by words": ["search", index, "a red star"],
        "search by an item": ["search", index, "--like", "train-000000"],
        "classify one image": [
            *("classify", str(folder / "quickstart" / "run"), str(folder / "image.jpg")),
            *("--classes", "red star,blue heart,green circle"),
        ],
        "index info": ["index", "info", index],
    }
    compared: dict[str, Any] = {}
    for name, words in commands.items():
        say(f"{name}: {arguments.rounds} rounds …")
        costs: dict[str, list[Cost]] = {"before": [], "now": []}
        for number in range(arguments.rounds + 1):
            for side, tree in (("before", arguments.before.resolve()), ("now", ROOT)):
                cost = _run(tree, words)
                # the first round only warms the caches of files
                if number:
                    costs[side].append(cost)
        medians = {side: _medians(of_side) for side, of_side in costs.items()}
        ratios = {field: medians["now"][field] / medians["before"][field] for field in medians["now"]}
        compared[name] = medians | {"ratio": ratios, "bound": BOUNDS[name]}
    return compared


def int8_recall(folder: Path) -> dict[str, Any]:
    """What int8 costs on the held-out scenes of the quickstart."""
    from vlm.api.model_export import export

    say("int8 on the quickstart's model …")
    with tempfile.TemporaryDirectory() as temporary:
        quickstart = folder / "quickstart"
        result = export(
            quickstart / "run",
            Path(temporary) / "int8",
            to="onnx",
            precision="int8",
            evaluate=str(quickstart / "shards" / "val"),
            max_recall_loss=1.0,
        )
        return result.to_json()["quality"]


def _medians(costs: list[Cost]) -> dict[str, float]:
    return {name: statistics.median(getattr(cost, name) for cost in costs) for name in ("wall", "cpu", "megabytes")}


def _run(tree: Path, words: list[str]) -> Cost:
    """Run a verb of a checkout in a new process; its output is thrown away."""
    script = Path(__file__).parent / "parts" / "measure_command.py"
    done = subprocess.run([sys.executable, script, tree, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: vlm {' '.join(words)} failed; run it to see why. {done.stderr}")
    return Cost(**json.loads(done.stdout))


def show(results: dict[str, Any]) -> None:
    """Tables of all results."""
    rows: list[list[Any]] = []
    for name, compared in results["commands"].items():
        before, now, ratio = compared["before"], compared["now"], compared["ratio"]
        cells: list[Any] = [name]
        for field, unit in (("wall", "s"), ("cpu", "s"), ("megabytes", "MB")):
            digits = 2 if unit == "s" else 0
            cells.append(f"{before[field]:.{digits}f} → {now[field]:.{digits}f} {unit} (1/{1 / ratio[field]:.1f})")
        rows.append([*cells, f"1/{1 / compared['bound']:.0f}"])
    show_table(["command", "wall", "CPU", "memory", "time at most"], rows)
    parity: list[list[Any]] = []
    for row in results["parity"]:
        parity.append([row["name"], f"{row['largest_difference']:.1e}", row["text_length"], row["seconds"]])
    columns = ["towers", "largest difference", "text length", "export, s"]
    show_table(columns, parity, title="ONNX against torch, batches of 1, 2 and 33")
    recall = results["int8"]["recall"]
    show_table(
        ["", *recall["float32"]],
        [[precision, *recall[precision].values()] for precision in ("float32", "int8")],
        title=f"recall on {recall['images']:,} images; mean cosine {recall['image_cosine']['mean']:.5f} (images), "
        f"{recall['text_cosine']['mean']:.5f} (texts)",
    )
    show_table(
        ["tower", "rows", "float32, CPU ms", "int8, CPU ms", "faster", "float32, MB", "int8, MB"],
        [list(row.values()) for row in results["int8"]["speed"]],
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
