"""How much of the library a handful of pairs enters on their way from a table to an answer.

    cd CHECKOUT && python scripts/trace_pair.py [--json] [--list]

Packs sixteen drawn pictures with captions, trains the preset `tiny` for a few steps without workers, embeds, builds an
index and asks it, all through `vlm.cli.main.main` in this one process, and notes each function of the library that is
called in any thread. Counted are the files below vlm, data, train and index of the checkout in which it is run.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

FOLDERS = ("vlm", "data", "train", "index")
PICTURES = 16
NEW_LOCALS = 0x2
"""The flag that the code of a function has, and that of a module or a class body has not."""

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


_FEW_STEPS = ["--steps", "4", "--batch-size", "8", "--workers", "0", "--log-every", "1", "--peak-tflops", "1"]


class Trace:
    """The functions of the library that were called, by stage.

    Comprehensions belong to the function they stand in; bodies of modules and classes, which run on import, are no
    functions. A lambda is one.
    """

    def __init__(self, root: Path) -> None:
        self._roots = {os.path.realpath(root / folder) + os.sep for folder in FOLDERS}
        self._root = os.path.realpath(root) + os.sep
        self._files: dict[CodeType, str] = {}
        self.stage = ""
        self.functions: dict[str, set[tuple[str, str]]] = {}
        self.pairs: dict[str, set[tuple[str, str]]] = {}
        self.cross_calls: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls; a generator that goes on is a call too, which sets take no notice of."""
        if event != "call" or not self.stage:
            return
        file = self._file_of(frame.f_code)
        if not file:
            return
        code = frame.f_code
        self.functions[self.stage].add((file, f"{code.co_qualname}:{code.co_firstlineno}"))
        caller = frame.f_back
        while caller is not None and not self._file_of(caller.f_code):
            caller = caller.f_back
        if caller is not None and (origin := self._file_of(caller.f_code)) != file:
            self.pairs[self.stage].add((origin, file))
            self.cross_calls[self.stage] += 1

    @contextlib.contextmanager
    def during(self, stage: str) -> Generator[None, None, None]:
        """Count what is called in the block under a stage."""
        self.functions.setdefault(stage, set())
        self.pairs.setdefault(stage, set())
        self.stage = stage
        try:
            yield
        finally:
            self.stage = ""

    def _file_of(self, code: CodeType) -> str:
        """The file of a function of the library below the root; empty for any other code."""
        known = self._files.get(code)
        if known is None:
            path = os.path.realpath(code.co_filename)
            is_function = bool(code.co_flags & NEW_LOCALS) and code.co_name not in COMPREHENSIONS
            is_ours = is_function and any(path.startswith(folder) for folder in self._roots)
            known = self._files[code] = path.removeprefix(self._root) if is_ours else ""
        return known


def draw_table(folder: Path) -> Path:
    """A table of pictures, one plain colour and a bar each, with captions."""
    from PIL import Image

    folder.mkdir()
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "bar"])
        for number in range(PICTURES):
            name, colour = list(COLOURS.items())[number % len(COLOURS)]
            picture = Image.new("RGB", (48, 48), colour)
            picture.paste((255, 255, 255), (0, 2 * number, 48, 2 * number + 6))
            picture.save(folder / f"{number:02d}.png")
            rows.writerow([f"{number:02d}.png", f"a white bar at height {number} on {name}", number])
    return folder / "captions.csv"


def journey(place: Path) -> list[tuple[str, list[str]]]:
    """The stages, each with its command line."""
    shards, run, embeddings, index = (str(place / name) for name in ("shards", "run", "embeddings", "index"))
    return [
        ("pack", ["pack", str(place / "table" / "captions.csv"), shards]),
        (
            "train",
            ["train", "tiny", "--data", shards, "--run", run, *_FEW_STEPS],
        ),
        ("embed", ["embed", run, shards, embeddings, "--workers", "0", "--device", "cpu"]),
        ("index", ["index", "build", embeddings, index, "--kind", "flat"]),
        ("search", ["search", index, "a white bar on red", "--top", "5", "--json"]),
    ]


def run_traced(main: Callable[[list[str]], int], trace: Trace, place: Path) -> None:
    """Run the stages one after the other under the profile hook.

    Raises:
        SystemExit: a command failed; what it said is shown.
    """
    draw_table(place / "table")
    for stage, words in journey(place):
        talk = io.StringIO()
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            threading.setprofile(trace)
            sys.setprofile(trace)
            try:
                with trace.during(stage):
                    code = main(words)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]
        if code:
            raise SystemExit(f"vlm {' '.join(words)} ended with {code}:\n{talk.getvalue()}")


def figures_of(functions: set[tuple[str, str]], pairs: set[tuple[str, str]], cross_calls: int) -> dict[str, int]:
    """Counts of one stage, or of all."""
    return {
        "files": len({file for file, _ in functions}),
        "functions": len(functions),
        "file_pairs": len(pairs),
        "cross_file_calls": cross_calls,
    }


def main() -> None:
    """Trace the checkout in the current folder and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print counts and files as JSON")
    parser.add_argument("--list", action="store_true", help="print the files of each stage too")
    arguments = parser.parse_args()
    root = Path.cwd()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(root))
    from vlm.cli import main as module

    if Path(os.path.realpath(module.__file__ or "")).parents[2] != Path(os.path.realpath(root)):
        raise SystemExit(f"`import vlm` gives {module.__file__}, not the checkout in {root}.")
    trace = Trace(root)
    with tempfile.TemporaryDirectory() as place:
        run_traced(module.main, trace, Path(place))
    stages = {
        stage: figures_of(functions, trace.pairs[stage], trace.cross_calls[stage])
        for stage, functions in trace.functions.items()
    }
    whole = set().union(*trace.functions.values())
    total = figures_of(whole, set().union(*trace.pairs.values()), sum(trace.cross_calls.values()))
    files = {stage: sorted({file for file, _ in functions}) for stage, functions in trace.functions.items()}
    if arguments.json:
        print(json.dumps({"total": total, "stages": stages, "files": files}, indent=2))
        return
    print(f"{'stage':<10}" + "".join(f"{name.replace('_', ' '):>18}" for name in total))
    for stage, counts in {**stages, "all": total}.items():
        print(f"{stage:<10}" + "".join(f"{count:>18,}" for count in counts.values()))
    if arguments.list:
        for stage, names in files.items():
            print(f"\n{stage}:", *names, sep="\n  ")


if __name__ == "__main__":
    main()
