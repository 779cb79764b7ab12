import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests import preloaded
from tests.index.conftest import ColourModel
from vlm.errors import UsageError
from vlm.index.embed import EmbedOptions, ProcessRank, embed_into
from vlm.index.embeddings_folder import Embeddings, Modality, begin_or_resume

ROOT = Path(__file__).parents[2]

EMBED_SHARE = """
import json, runpy, sys
from dataclasses import asdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from vlm.index.embed import EmbedOptions, embed_into
from vlm.index.embed import ProcessRank
Model = runpy.run_path(sys.argv[1])["ColourModel"]
options = EmbedOptions(model_spec="colours", batch_size=3, share=ProcessRank.from_environment())
out = Path(sys.argv[2])
done = embed_into(Model(), sys.argv[3:], {"image": out / "images", "text": out / "texts"}, options)
print(json.dumps({modality: asdict(summary) for modality, summary in done.items()}))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files; of the manifest what does not tell when and by which command it was written."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith("manifest.json")]:
        values = json.loads(found[name])
        del values["made_at"], values["command"]
        found[name] = json.dumps(values).encode()
    return found


def embed_alone(shards: list[str], out: Path, share: ProcessRank | None = None) -> dict:
    options = EmbedOptions(model_spec="colours", batch_size=3, share=share or ProcessRank())
    return embed_into(ColourModel(), shards, {"image": out / "images", "text": out / "texts"}, options)


def start(shards: list[str], out: Path, rank: int, world_size: int) -> preloaded.Popen:
    told = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    arguments = [str(Path(__file__).with_name("conftest.py")), str(out), *shards]
    return preloaded.Popen(
        [sys.executable, "-c", EMBED_SHARE, *arguments],
        cwd=ROOT,
        env=os.environ | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_started_at_once_leave_the_files_of_one(
    tmp_path: Path, shards: list[str], world_size: int
) -> None:
    embed_alone(shards, tmp_path / "whole")
    started = [start(shards, tmp_path / "out", rank, world_size) for rank in range(world_size)]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * world_size, ended
    summaries = [json.loads(out)["image"] for out, _ in ended]
    assert sum(summary["new_rows"] for summary in summaries) == 11
    assert min(summary["missing_parts"] for summary in summaries) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_each_process_writes_its_own_shards_and_the_last_one_ends_the_work(tmp_path: Path, shards: list[str]) -> None:
    embed_alone(shards, tmp_path / "whole")
    out = tmp_path / "out"
    first = embed_alone(shards, out, ProcessRank(1, 2))["image"]
    assert (first.parts, first.missing_parts, first.rows, first.new_rows) == (1, 2, 3, 3)
    with pytest.raises(UsageError, match="unfinished"):
        Embeddings.open(out / "images")
    last = embed_alone(shards, out, ProcessRank(0, 2))["image"]
    assert (last.parts, last.missing_parts, last.rows, last.new_rows) == (3, 0, 11, 8)
    assert contents(out) == contents(tmp_path / "whole")


def test_work_begun_by_three_is_ended_by_one(tmp_path: Path, shards: list[str]) -> None:
    embed_alone(shards, tmp_path / "whole")
    embed_alone(shards, tmp_path / "out", ProcessRank(2, 3))
    assert embed_alone(shards, tmp_path / "out")["text"].new_rows == 16
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_process_is_known_by_what_its_launcher_tells() -> None:
    assert ProcessRank.from_environment({}) == ProcessRank(0, 1, 0)
    assert ProcessRank.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == ProcessRank(5, 8, 1)
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert ProcessRank.from_environment(slurm) == ProcessRank(3, 4, 0)
    assert ProcessRank.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == ProcessRank()
    assert list(ProcessRank(1, 3).shard_indices(8)) == [1, 4, 7]
    for told in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(UsageError, match="are not a rank"):
            ProcessRank.from_environment(told)


def test_many_begin_a_folder_at_one_moment_and_none_is_in_the_way(tmp_path: Path) -> None:
    def start_together(barrier: Barrier, folder: Path) -> None:
        barrier.wait()
        begin_or_resume(folder, {"model": "colours"})

    with ThreadPoolExecutor(4) as pool:
        for folder in (tmp_path / str(attempt) for attempt in range(60)):
            barrier = Barrier(4)
            list(pool.map(start_together, [barrier] * 4, [folder] * 4))
            assert sorted(path.name for path in folder.iterdir()) == ["parts", "progress.json"]


@pytest.mark.parametrize("attempt", range(5))
def test_of_several_at_once_exactly_one_ends_the_work(attempt: int, tmp_path: Path, shards: list[str]) -> None:
    folders: dict[Modality, Path] = {"image": tmp_path / "i", "text": tmp_path / "t"}

    def fill(rank: int) -> bool:
        options = EmbedOptions(model_spec="colours", share=ProcessRank(rank, 3))
        return embed_into(ColourModel(), shards, folders, options)["image"].ended_here

    with ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(fill, range(3))) == 1
