"""vlm embed killed again and again leaves the files of one that never was: python -m tests.index.kill_embed --kills 20

SIGKILL comes at a random moment of the work, while a part is being written, while the manifest is, or before the
folder is touched; writes are slowed for that. The same command is then given again. When it has ended by itself,
every file must be, byte for byte, that of an uninterrupted run of the same command (of the manifest all but
`made_at`), and no other file may be there; then another folder is begun, until there were enough kills. After each
kill, the files of finished parts must be those of the uninterrupted run already. With --processes 2 one process is
killed, or all of them.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import preloaded
from tests.data.tar_fixture import write_tar
from vlm.console import show_table

ROOT = Path(__file__).resolve().parents[2]
OUT = "embeddings"
PAUSE_SECONDS = 0.03
START_SECONDS = 10.0
WORK_SECONDS = 1.5
DEADLINE_SECONDS = 1800.0
GLANCE_SECONDS = 0.01

# read by every Python process at its start: writes last longer
SLOWED = f"""
import os, time
real = os.fsync
def fsync(descriptor):
    time.sleep({PAUSE_SECONDS})
    real(descriptor)
    time.sleep({PAUSE_SECONDS})
os.fsync = fsync
"""

AIMS = ("any moment", "a part", "any moment", "a part", "the start", "any moment", "a part", "the manifest")


@dataclass(kw_only=True)
class Trial:
    """What is run, and how often it is killed. work: a folder for it. chance: where all randomness comes from.

    hit: of each kind of moment, the kills, and those that left a half-written file. compared: folders and their files.
    """

    shards: Path
    model: Path
    work: Path
    kills: int
    chance: random.Random
    aims: tuple[str, ...] = AIMS
    modality: str = "image"
    processes: int = 1
    workers: int = 1
    backend: str = "torch"
    hit: Counter[tuple[str, bool]] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)

    def command(self) -> list[str]:
        """The command line, which embeds into the folder OUT of where it is given."""
        options = {"modality": self.modality, "processes": self.processes, "workers": self.workers, "batch-size": 4}
        options["backend"] = self.backend
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "vlm", "embed", str(self.model), str(self.shards), OUT, *given]


def start(trial: Trial, place: Path, *, is_slowed: bool = True) -> preloaded.Popen:
    """Give the command in `place`, in a process group of its own; what it says goes to PLACE.log."""
    place.mkdir(exist_ok=True)
    (trial.work / "sitecustomize.py").write_text(SLOWED, encoding="utf-8")
    paths = [str(trial.work), str(ROOT)] if is_slowed else [str(ROOT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with place.with_suffix(".log").open("ab") as log:
        return preloaded.Popen(
            trial.command(), stdout=log, stderr=log, env=environment, start_new_session=True, cwd=place
        )


def files_of(folder: Path) -> dict[str, bytes]:
    """Each file by its path in the folder; the manifest without the time it was made at."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in (name for name in found if Path(name).name == "manifest.json"):
        values = json.loads(found[name])
        del values["made_at"]
        found[name] = json.dumps(values).encode()
    return found


def compare(place: Path, whole: dict[str, bytes]) -> None:
    """The killed work ended as the uninterrupted.

    Raises:
        SystemExit: naming each file that differs, is missing, or is left over.
    """
    found = files_of(place / OUT)
    if faults := [name for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)]:
        raise SystemExit(f"{place / OUT}: other than in the uninterrupted run: {', '.join(faults)}")


def check_finished_parts(place: Path, whole: dict[str, bytes]) -> None:
    """What has the name of a finished part is one.

    Raises:
        SystemExit: it is not what the uninterrupted run wrote.
    """
    for path in (place / OUT).glob("**/parts/[!.]*"):
        name = str(path.relative_to(place / OUT))
        if name in whole and path.read_bytes() != whole[name]:
            raise SystemExit(f"{place / OUT}: {name} is not whole after a kill")


def moment_of(aim: str, chance: random.Random, folder: Path) -> tuple[Callable[[], object], float]:
    """What to wait for after the start, and how many seconds longer."""
    there, half, enough = set(folder.rglob("*")), half_written(folder), finished_files(folder) + chance.randrange(8)
    moments: dict[str, tuple[Callable[[], object], float]] = {
        "the start": (lambda: True, START_SECONDS),
        "any moment": (lambda: set(folder.rglob("*")) - there, WORK_SECONDS),
        "a part": (lambda: finished_files(folder) >= enough and half_written(folder) - half, PAUSE_SECONDS),
        "the manifest": (lambda: any(folder.glob("**/*manifest.json*")), 3 * PAUSE_SECONDS),
    }
    has_come, at_most = moments[aim]
    return has_come, chance.random() * at_most


def half_written(folder: Path) -> set[str]:
    """The paths of those that never got the name they were to have."""
    return {str(path.relative_to(folder)) for path in folder.glob("**/.*.part")}


def finished_files(folder: Path) -> int:
    """How many files of parts have their name."""
    return sum(1 for _ in folder.glob("**/parts/[!.]*"))


def run_until_killed(trial: Trial, place: Path, aim: str) -> bool:
    """Let the work go on and kill it; False if it ended by itself before.

    Raises:
        SystemExit: it failed.
    """
    has_come, longer = moment_of(aim, trial.chance, place / OUT)
    process, deadline = start(trial, place), time.monotonic() + DEADLINE_SECONDS
    while process.poll() is None and not has_come():
        if time.monotonic() > deadline:
            kill_group(process)
            raise SystemExit(f"{aim} did not come in {DEADLINE_SECONDS:g} s, see {place.with_suffix('.log')}")
        time.sleep(GLANCE_SECONDS)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=longer)
    if process.returncode is None:
        kill(trial, process)
        return True
    if process.returncode:
        raise SystemExit(f"The command failed by itself, see {place.with_suffix('.log')}")
    return False


def kill(trial: Trial, process: preloaded.Popen) -> None:
    """SIGKILL the process, and with several one of those it started, or all of them."""
    whom = trial.chance.choice(("first", "one", "all"))
    if whom == "one" and trial.processes > 1:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            trial.chance.choice(embedding_processes(process)).kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
    if whom == "all":
        kill_group(process)
    process.kill()
    process.wait()


def embedding_processes(process: preloaded.Popen) -> list[psutil.Process]:
    """Those it started to embed, and their readers."""
    others = psutil.Process(process.pid).children(recursive=True)
    return [other for other in others if "resource_tracker" not in " ".join(other.cmdline())]


def kill_group(process: preloaded.Popen) -> None:
    """SIGKILL the process and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_many(trial: Trial) -> None:
    """Run all of it, with a line for each kill.

    Raises:
        SystemExit: a file differs.
    """
    if start(trial, trial.work / "whole", is_slowed=False).wait():
        raise SystemExit(f"The run that is left alone failed, see {trial.work / 'whole.log'}")
    whole = files_of(trial.work / "whole" / OUT)
    number, place = 0, trial.work / "killed-1"
    while number < trial.kills:
        aim, before = trial.aims[number % len(trial.aims)], half_written(place / OUT)
        if not run_until_killed(trial, place, aim):
            place = finish(trial, place, whole)
            continue
        number += 1
        check_finished_parts(place, whole)
        half = half_written(place / OUT) - before
        trial.hit[aim, bool(half)] += 1
        done = finished_files(place / OUT)
        left = f"; half-written: {', '.join(sorted(half))}" if half else ""
        print(f"kill {number}, {place.name}, aimed at {aim}: {done} files of parts{left}", flush=True)
    if start(trial, place).wait():
        raise SystemExit(f"The last command failed, see {place.with_suffix('.log')}")
    finish(trial, place, whole)


def finish(trial: Trial, place: Path, whole: dict[str, bytes]) -> Path:
    """Compare a folder that has ended, and name the next."""
    compare(place, whole)
    trial.compared[place.name] = len(whole)
    print(f"{place.name}: {len(whole)} files equal those of the uninterrupted run", flush=True)
    return trial.work / f"killed-{len(trial.compared) + 1}"


def make_data(folder: Path, *, shards: int, has_export: bool = False) -> tuple[Path, Path]:
    """Shards of six drawn scenes, some with broken samples between them, and a tiny model with random weights."""
    import torch

    from vlm.api.data import train_tokenizer
    from vlm.api.model_export import export
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SceneOptions, SourceOptions
    from vlm.data.sources.source_registry import open_source
    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.models.load import save_model
    from vlm.models.model import build_network, fit_to_tokenizer, model_config

    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=6 * shards, pixels=32)))
    pack(source, folder / "shards", PackConfig(samples_per_shard=6))
    for path in sorted((folder / "shards").glob("*.tar"))[::5]:
        write_tar(path.with_name(f"{path.stem}-broken.tar"), ["", "unreadable image", "unreadable json", ""])
    train_tokenizer(str(folder / "shards"), folder / "words.model", vocabulary=300, languages=("en",))
    tokenizer, view = open_tokenizer(str(folder / "words.model"), 16), EvalTransform(size=32)
    config = fit_to_tokenizer(model_config("vit:32x1/8+bag@16"), tokenizer)  # these import quickly
    config["vision_cfg"]["image_size"] = view.size
    torch.manual_seed(0)
    weights = build_network(config).state_dict()
    save_model(folder / "model", weights=weights, config=config, view=view, tokenizer=tokenizer)
    if has_export:
        export(folder / "model", to="onnx")
    return folder / "shards", folder / "model"


def show(trial: Trial) -> None:
    """The table at the end."""
    hit = trial.hit
    rows = [[aim, hit[aim, False] + hit[aim, True], hit[aim, True]] for aim in dict.fromkeys(trial.aims)]
    show_table(["killed at", "kills", "with a file half-written"], rows, title="vlm embed, SIGKILL")
    print(
        f"{trial.hit.total()} kills in {len(trial.compared)} folders ({trial.modality}, {trial.processes} processes): "
        f"all {trial.compared.total()} files equal those of an uninterrupted run; of the manifest all but made_at."
    )


def main() -> None:
    """Read the arguments and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--modality", default="image", help="as vlm embed has it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--backend", default="torch", choices=("torch", "onnx"))
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="a new folder to leave everything in")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = (given.work or Path(name)).resolve()
        shards, model = make_data(work, shards=given.shards, has_export=given.backend == "onnx")
        trial = Trial(
            shards=shards,
            model=model,
            work=work,
            kills=given.kills,
            chance=random.Random(given.seed),
            modality=given.modality,
            processes=given.processes,
            workers=given.workers,
            backend=given.backend,
        )
        kill_many(trial)
        show(trial)


if __name__ == "__main__":
    main()
