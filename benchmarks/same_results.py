#!/usr/bin/env python
"""Whether two checkouts give the same results, bit for bit: what they print as JSON, and every file they leave.

    benchmarks/run same_results BASE NEW --out DIR [--python PYTHON] [--jobs 2]
    benchmarks/run same_results BASE --out DIR            (only runs BASE, and leaves its folders in DIR/place)

A fixed journey of `vlm` commands runs in two halves: the first makes shards, a tokenizer, runs, embeddings and indexes
from the same images; the second measures, searches, resumes and changes what was made. BASE runs both. NEW makes
everything again, which must equal what BASE made, and then *opens what BASE made*, with the answers and the changed
files that BASE had: since both made the same, that is also how NEW opens its own.

All of it runs in one folder (DIR/place), emptied in between, because embeddings and indexes hold absolute paths of what
they were made from. Commands are given as BASE spells them; a renamed option must keep its old name as an alias. What
BASE gave is kept in DIR/base and used again as long as its code, this file and the Python are the same.

Ignored on purpose: logs on stderr (messages may be reworded), and what `parts/result_comparison.py` names. Of an SQLite
file the schema and the rows are compared, not how its pages lie. The exit code is 0 where all is equal, 1 where
something differs, 2 where the journey cannot be run.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parts.result_comparison import compare_folders, difference_of_texts

FOLDERS = ("vlm", "data", "train", "index")


@dataclass(frozen=True)
class Command:
    """One `vlm` command; `after` names those it waits for, `code` is the exit code that is right."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    code: int = 0


def command(name: str, line: str, *texts: str, after: str = "", code: int = 0) -> Command:
    """A command from a line; each `%` word in it stands for the next of `texts`, which may hold spaces.

    `after` names the commands it waits for, with commas between them.
    """
    waiting = iter(texts)
    words = tuple(next(waiting) if word == "%" else word for word in line.split())
    return Command(name, words, tuple(after.split(", ")) if after else (), code)


TRAINING = "--log-every 1 --peak-tflops 1 --keep-checkpoints 1"


def make_commands() -> list[Command]:
    """The first half: everything that later commands open."""
    return [
        command("pack scenes", "pack scenes shards --kind scenes --scenes.number 288 --samples-per-shard 96 --json"),
        command("pack val", "pack scenes val --scenes.split val --scenes.number 48 --scenes.is-distinct --json"),
        command("pack jsonl", "pack ../inputs/table/captions.jsonl table --hold-out 10 --samples-per-shard 20 --json"),
        command("pack csv", "pack ../inputs/table/captions.csv csv --caption-column title --json"),
        command("pack classes", "pack ../inputs/classes classes --max-bad 0.2 --template % --json", "a drawn {}."),
        command(
            "tokenizer",
            "tokenizer train shards tokenizer.model --vocabulary 256 --languages en --json",
            after="pack scenes",
        ),
        command(
            "train clip",
            "train tiny --data shards --val val --run run --tokenizer tokenizer.model --epochs 3 --batch-size 48 "
            f"--workers 0 --checkpoint-every 9 --evaluate-every 9 {TRAINING} --json",
            after="tokenizer",
        ),
        command(
            "train captioner",
            "train tiny-coca --data shards --run captioner --tokenizer tokenizer.model --steps 12 --batch-size 24 "
            "--workers 1 --languages en de --language-weights 2 1 --crop-scale 0.5 1 --flip 0.5 --shuffle-window 50 "
            f"{TRAINING} --json",
            after="tokenizer",
        ),
        command("inspect", "inspect table --tokenizer clip --html table.html --json", after="pack jsonl"),
        command(
            "curate",
            "curate table table.selection --rule size:min=40 --rule words:min=2 --rule exact-duplicates "
            "--rule near-duplicates:distance=6 --rule sample:share=0.8 --report curate.json --html curate.html --json",
            after="pack jsonl",
        ),
        command("embed shards", "embed run shards embeddings --modality both --workers 0 --json", after="train clip"),
        command(
            "train micro-batches",
            "train tiny --data ../inputs/mixture.toml --run micro --tokenizer tokenizer.model --steps 12 "
            "--batch-size 32 --micro-batch 8 --workers 0 --optimizer muon --patch-dropout 0.25 --average-decay 0.9 "
            f"--same-pairs ignore --sentences --objective % {TRAINING} --json",
            "siglip + 0.5*ranking",
            after="tokenizer, curate",
        ),
        command("embed more", "embed run val more --modality both --workers 0 --codes int8 --json", after="train clip"),
        command("build flat", "index build embeddings/images flat --kind flat --json", after="embed shards"),
        command("build hnsw", "index build embeddings/images hnsw --kind hnsw --json", after="embed shards"),
        command("build ivf", "index build embeddings/images ivf --kind ivf --nlist 4 --json", after="embed shards"),
        command(
            "train terms",
            "train tiny --data shards --run terms --tokenizer tokenizer.model --steps 6 --batch-size 16 --workers 0 "
            f"--teacher run --sub-captions 2 --local-views 1 --average-decay 0.9 --objective % {TRAINING} --json",
            "clip + distill + sub_captions + grouping + local_to_global",
            after="train clip",
        ),
        command(
            "embed table",
            "embed micro table micro-table --workers 1 --selection table.selection --store float32 --json",
            after="train micro-batches, curate",
        ),
        command(
            "embed micro",
            "embed micro shards micro-embeddings --modality both --workers 0 --json",
            after="train micro-batches",
        ),
    ]


COPIES = {"resumed": "run", "changed": "flat", "grown": "hnsw"}
"""Folders that the second half changes, each a copy of one that others read at the same time."""


def open_commands() -> list[Command]:
    """The second half: measures, questions and changes, of what the first half made."""
    return [
        command(
            "resume",
            f"train resumed --run resumed --resume --allow epochs --epochs 4 {TRAINING} --json",
        ),
        command(
            "eval retrieval and zero-shot",
            "eval run --retrieval val --classes classes --templates % --workers 0 --out evaluation --json",
            "a drawn {}.",
        ),
        command(
            "eval captions",
            "eval captioner --captions val --prompt % --retrieval val --workers 1 --json",
            "a picture of",
        ),
        command("caption", "caption captioner ../inputs/table/00.jpg ../inputs/table/03.png --json"),
        command(
            "classify", "classify run ../inputs/table/01.jpg --classes % --json", "red circle,blue star,green heart"
        ),
        command("embed again", "embed run csv again --workers 1 --modality both --json"),
        command("search flat", "search flat --queries ../inputs/questions.jsonl --json"),
        command("search hnsw", "search hnsw --queries ../inputs/questions.jsonl --json"),
        command("search ivf", "search ivf --queries ../inputs/items.jsonl --top 4 --json"),
        command("search text", "search flat % --top 5 --json --html answer.html", "two green stars"),
        command(
            "search re-ranked", "search flat % --rerank captioner --rerank-top 8 --top 8 --json", "a small blue heart"
        ),
        command("search by item", "search ivf --like train-000003 --top 5 --group-duplicates 0.99 --json"),
        command("info", "index info flat --json"),
        command("check", "index check hnsw --sample 50 --json"),
        command("add", "index add changed more/images --json"),
        command("update", "index update changed more/images --where % --json", "label like 'b%'", after="add"),
        command("delete by filter", "index delete changed --where % --json", "label like 'g%'", after="update"),
        command(
            "delete by uid", "index delete changed --uid train-000003 train-000007 --json", after="delete by filter"
        ),
        command("search changed", "search changed --like train-000011 --top 300 --json", after="delete by uid"),
        command("export of changed", "index export changed changed-npy --to npy --json", after="delete by uid"),
        command("compact", "index compact changed --kind hnsw --json", after="search changed, export of changed"),
        command("search compacted", "search changed --like train-000011 --top 300 --json", after="compact"),
        command("check compacted", "index check changed --json", after="compact"),
        command("grow", "index add grown more/images --json"),
        command("shrink", "index delete grown --uid train-000003 --json", after="grow"),
        command(
            "search grown", "search grown --like train-000011 --top 20 --where % --json", "label != 'x'", after="shrink"
        ),
        command("export parquet", "index export flat flat-parquet --to parquet --where % --json", "label like 'r%'"),
        command("export faiss", "index export hnsw hnsw-faiss --to faiss --json"),
        command("export clip-retrieval", "index export flat flat-clip --to clip-retrieval --json"),
        command(
            "import clip-retrieval",
            "index import flat-clip imported --model run --json",
            after="export clip-retrieval",
        ),
        command(
            "signals",
            "signals embeddings/images --texts embeddings/texts --duplicates 0.98 --clusters 4 "
            "--near more/images --json",
        ),
        command(
            "curate by signals",
            "curate shards signals.selection --columns embeddings/images/signals --rule similarity:top=0.5 "
            "--rule embedding-duplicates --json",
            after="signals",
        ),
        command("pack a selection", "pack table repacked --kind shards --selection table.selection --json"),
        command("inspect a selection", "inspect table --selection table.selection --workers 1 --json"),
        command(
            "fit head",
            "index fit-head embeddings/images micro-embeddings/images head --old-texts embeddings/texts "
            "--new-texts micro-embeddings/texts --held-out 0.25 --json",
        ),
        command("upgrade", "index upgrade flat upgraded --head head --json", after="fit head"),
        command("soup", "soup run terms --out soup --weights 0.7,0.3 --json"),
        command("export model", "export run exported --json"),
        command("reinforce", "reinforce table reinforced --teacher run --views 2 --workers 0 --json"),
        command("runs", "runs . --json"),
        command("misused: a field", "search flat --like train-000003 --where % --json", "nosuch = 1", code=2),
        command("misused: a verb", "nosuch", code=2),
    ]


QUESTIONS: list[dict[str, Any]] = [
    {"texts": ["two green stars at the top"], "top": 7},
    {"texts": ["a red circle"], "minus": ["something large"], "top": 5},
    {"texts": ["a blue heart"], "where": "label like 'blue%' or label has 'heart'", "top": 5},
    {"images": ["../inputs/table/00.jpg"], "top": 5},
    {
        "images": ["../inputs/table/03.png"],
        "texts": ["yellow"],
        "weights": [0.25, 0.75],
        "where": "not label like 'red%'",
    },
    {"items": ["train-000005"], "at_least": 0.2, "top": 50},
    {"texts": ["three triangles"], "words": "triangle", "top": 6},
    {"texts": ["a cross"], "diversity": 0.5, "top": 6},
    {"texts": ["a star"], "duplicates": 0.97, "top": 6},
    {"texts": ["nothing of the kind"], "where": "label in ('red circle', 'blue star') and not key like '%7'"},
]
"""What the indexes are asked, as lines of `vlm search --queries`."""

ITEMS: list[dict[str, Any]] = [
    {"items": ["train-000005"], "top": 9},
    {"items": ["train-000005", "train-000012"], "weights": [2, -1], "where": "label like 'b%'"},
    {"items": ["train-000100"], "words": "star", "where": "key > 'train-000050'"},
]
"""Questions that need no model."""

MIXTURE = """[[source]]
data = "shards"
name = "scenes"
weight = 3.0

[[source]]
data = "table/train-{00000..00001}.tar"
name = "table"
weight = 1.0
"""

DRAWING = """
import json, random, sys
from pathlib import Path
from PIL import Image, ImageDraw

place = Path(sys.argv[1])
rng = random.Random(7)
colours = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "grey": (120, 120, 120)}
german = {"red": "rot", "green": "grün", "blue": "blau", "grey": "grau"}
shapes = ["ellipse", "rectangle", "line"]


def draw(colour, shape, size):
    image = Image.new("RGB", size, tuple(rng.randrange(150, 256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    width, height = size
    box = [rng.randrange(width // 3), rng.randrange(height // 3)]
    box += [width // 2 + rng.randrange(width // 2), height // 2 + rng.randrange(height // 2)]
    getattr(pen, shape)(box, fill=colours[colour])
    for _ in range(30):
        spot = rng.randrange(width), rng.randrange(height)
        pen.point(spot, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


(place / "table").mkdir(parents=True)
rows = []
for number in range(50):
    colour, shape = rng.choice(list(colours)), rng.choice(shapes)
    size = rng.choice([(64, 64), (97, 61), (240, 180), (33, 120)])
    name = f"{number:02d}." + ("png" if number % 4 == 3 else "webp" if number % 10 == 4 else "jpg")
    image = draw(colour, shape, size)
    if number % 4 == 3:
        image = image.convert(["RGBA", "L", "P"][number % 3])
    image.save(place / "table" / name)
    english = [f"a {colour} {shape} number {number}. It lies on a pale ground.", f"{colour} {shape} of {number}"]
    rows.append({"image": name, "caption": {"en": english, "de": [f"{shape} in {german[colour]}, Nummer {number}"]},
                 "label": colour, "year": 1990 + number, "tags": [shape, size[0] > size[1] and "wide" or "tall"]})
(place / "table" / "copy.jpg").write_bytes((place / "table" / "00.jpg").read_bytes())
near = Image.open(place / "table" / "01.jpg")
near.save(place / "table" / "near.jpg", quality=60)
rows.append(rows[0] | {"image": "copy.jpg"})
rows.append(rows[1] | {"image": "near.jpg"})
with (place / "table" / "captions.jsonl").open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\\n" for row in rows)
with (place / "table" / "captions.csv").open("w", encoding="utf-8") as file:
    file.write("image,title,year\\n")
    file.writelines(f'{row["image"]},"{row["caption"]["en"][1]}, plain",{row["year"]}\\n' for row in rows[:24])
for colour in colours:
    (place / "classes" / colour).mkdir(parents=True)
    for number in range(6):
        draw(colour, "ellipse", (72, 64)).save(place / "classes" / colour / f"{number}.png")
broken = place / "classes" / "red" / "5.png"
broken.write_bytes(broken.read_bytes()[:150])
"""
"""Draws the pictures once, for both; run by the Python of the commands, since this file needs no package."""


def draw_inputs(folder: Path, python: str) -> None:
    """Pictures with captions, classes with one damaged picture, questions and a mixture."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-c", DRAWING, str(folder)], check=True)
    for name, questions in (("questions", QUESTIONS), ("items", ITEMS)):
        lines = [json.dumps(question) + "\n" for question in questions]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "mixture.toml").write_text(MIXTURE, "utf-8")


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Journey:
    """Runs the commands of one checkout in one place."""

    def __init__(self, checkout: Path, place: Path, python: str, jobs: int) -> None:
        self._place, self._python, self._jobs = place, python, jobs
        self._environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "PYTHONSAFEPATH": "1",  # the place holds a folder `index`, and the like
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLM_CACHE": str(place / "cache"),
            "COLUMNS": "200",
        }
        self.checkout = checkout

    def check_import(self) -> None:
        """Make sure that the commands run the checkout's code, whatever the Python has installed.

        Raises:
            SystemExit: they run other code.
        """
        code = "import vlm, vlm.data, vlm.train, vlm.index; print(vlm.__file__, vlm.data.__file__)"
        done = self._call([self._python, "-c", code])
        for file in done.stdout.split():
            if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self.checkout)):
                raise SystemExit(f"{self._python} imports {file}, not the code of {self.checkout}.")
        if done.returncode:
            raise SystemExit(f"{self.checkout} cannot be imported by {self._python}:\n{done.stderr}")

    def run(self, commands: Sequence[Command]) -> dict[str, Outcome]:
        """Run all commands, each once those it waits for have ended, some at a time.

        Raises:
            ValueError: a command waits for one that never runs.
        """
        outcomes: dict[str, Outcome] = {}
        waiting, running = list(commands), dict[Future[Outcome], Command]()
        with ThreadPoolExecutor(self._jobs) as pool:
            while waiting or running:
                ready = [one for one in waiting if all(name in outcomes for name in one.after)]
                for command in ready[: self._jobs - len(running)]:
                    waiting.remove(command)
                    running[pool.submit(self._run_one, command)] = command
                if not running:
                    raise ValueError(f"{waiting[0].name!r} waits for a command that never runs: {waiting[0].after}")
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcomes[running.pop(future).name] = future.result()
        return outcomes

    def _run_one(self, command: Command) -> Outcome:
        begun = time.monotonic()
        done = self._call([self._python, "-m", "vlm", *command.words])
        return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)

    def _call(self, words: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            words,
            cwd=self._place,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def run_half(
    journey: Journey, commands: Sequence[Command], place: Path, start: Path | None, keep: Path
) -> dict[str, Outcome]:
    """Run commands in the place, emptied or filled from `start`, and move what is then there to `keep`."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(keep, ignore_errors=True)
    if start is None:
        place.mkdir(parents=True)
    else:
        shutil.copytree(start, place)
        for copy, original in COPIES.items():
            shutil.copytree(place / original, place / copy)
    outcomes = journey.run(commands)
    keep.parent.mkdir(parents=True, exist_ok=True)
    place.rename(keep)
    return outcomes


def identity_of(checkout: Path, python: str) -> str:
    """A digest of the checkout's library code, of this file and of the Python."""
    digest = hashlib.sha256(f"{python} {os.path.realpath(checkout)}".encode())
    digest.update(Path(__file__).read_bytes())
    for folder in FOLDERS:
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(checkout)).encode() + path.read_bytes())
    return digest.hexdigest()


def run_base(journey: Journey, out: Path, python: str) -> dict[str, dict[str, Outcome]]:
    """Both halves of BASE, or what is kept of them.

    Raises:
        SystemExit: some command did not end as it should.
    """
    record, identity = out / "base" / "record.json", identity_of(journey.checkout, python)
    if record.is_file():
        kept = json.loads(record.read_text("utf-8"))
        if kept["identity"] == identity:
            print(f"BASE: as kept in {out / 'base'}")
            return {
                half: {name: Outcome(**outcome) for name, outcome in outcomes.items()}
                for half, outcomes in kept["halves"].items()
            }
    record.unlink(missing_ok=True)
    draw_inputs(out / "inputs", python)
    halves = {}
    for half, commands, start in (
        ("made", make_commands(), None),
        ("opened", open_commands(), out / "base" / "made"),
    ):
        begun = time.monotonic()
        halves[half] = run_half(journey, commands, out / "place", start, out / "base" / half)
        print(f"BASE: {len(commands)} commands, {half}, in {time.monotonic() - begun:.0f} s", flush=True)
        refuse_failures(halves[half], commands)
    values = {half: {name: asdict(one) for name, one in outcomes.items()} for half, outcomes in halves.items()}
    record.write_text(json.dumps({"identity": identity, "halves": values}), "utf-8")
    return halves


def refuse_failures(outcomes: dict[str, Outcome], commands: Sequence[Command]) -> None:
    """Make sure that every command of BASE ended as it should.

    Raises:
        SystemExit: some did not; what they said is shown, and 2 is the exit code.
    """
    failed = [command for command in commands if outcomes[command.name].code != command.code]
    for command in failed:
        outcome = outcomes[command.name]
        print(f"\n{command.name!r} ended with {outcome.code}, {command.code} was expected:", file=sys.stderr)
        print(f"vlm {' '.join(command.words)}\n{outcome.stderr[-2000:]}", file=sys.stderr)
    if failed:
        raise SystemExit(2)


def compare_outcomes(
    base: dict[str, Outcome], new: dict[str, Outcome], commands: Sequence[Command]
) -> Iterator[tuple[str, str]]:
    """Each command with the first difference of what it printed, and of its exit code."""
    for command in commands:
        one, other = base[command.name], new[command.name]
        if one.code != other.code:
            said = other.stderr.strip().splitlines()[-1:] or [""]
            yield command.name, f"exit code {one.code} and {other.code}: {said[0][:300]}"
        else:
            yield command.name, difference_of_texts(one.stdout, other.stdout)


def show(title: str, rows: Iterator[tuple[str, str]]) -> int:
    """Print a table; the number of differences."""
    print(f"\n{title}")
    wrong = 0
    for what, difference in rows:
        wrong += bool(difference)
        print(f"  {what:<34} {'≠ ' + difference if difference else 'equal'}", flush=True)
    return wrong


def compare(base: dict[str, dict[str, Outcome]], journey: Journey, out: Path) -> int:
    """Run NEW beside what BASE gave and show the table; the number of differences."""
    place, halves = out / "place", out / "new"
    wrong = 0
    for half, commands, start, title in (
        ("made", make_commands(), None, "made by NEW as by BASE"),
        ("opened", open_commands(), out / "base" / "made", "made by BASE, opened by NEW as by BASE"),
    ):
        begun = time.monotonic()
        outcomes = run_half(journey, commands, place, start, halves / half)
        print(f"NEW: {len(commands)} commands, {half}, in {time.monotonic() - begun:.0f} s", flush=True)
        talk = {name: outcome.stderr for name, outcome in outcomes.items()}
        (halves / f"{half}.stderr.json").write_text(json.dumps(talk, indent=1, ensure_ascii=False), "utf-8")
        wrong += show(f"{title}: exit code and output", compare_outcomes(base[half], outcomes, commands))
        wrong += show(f"{title}: files", compare_folders(out / "base" / half, halves / half))
    return wrong


def main() -> None:
    """Run the journey of two checkouts and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", type=Path, help="root of the checkout that is right")
    parser.add_argument("new", type=Path, nargs="?", help="root of the checkout that is compared")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--python", help="Python that runs the commands; BASE/.venv/bin/python if not given")
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at the same time")
    parser.add_argument("--again", action="store_true", help="run BASE again though it is kept")
    arguments = parser.parse_args()
    out, own = arguments.out.absolute(), arguments.base.absolute() / ".venv" / "bin" / "python"
    python = arguments.python or (str(own) if own.is_file() else sys.executable)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        shutil.rmtree(out / "base", ignore_errors=True)
    journeys = [
        Journey(checkout.absolute(), out / "place", python, arguments.jobs)
        for checkout in (arguments.base, arguments.new)
        if checkout is not None
    ]
    (out / "place").mkdir(exist_ok=True)
    for journey in journeys:
        journey.check_import()
    begun = time.monotonic()
    base = run_base(journeys[0], out, python)
    wrong = compare(base, journeys[1], out) if len(journeys) > 1 else 0
    shutil.rmtree(out / "place", ignore_errors=True)
    shutil.copytree(out / "base" / "made", out / "place")
    if len(journeys) > 1:
        print(f"\n{f'{wrong} differences' if wrong else 'All equal'}, in {time.monotonic() - begun:.0f} s.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
