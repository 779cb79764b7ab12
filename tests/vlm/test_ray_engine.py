"""Ray's cluster of this machine is started once for all tests here that need it."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.cli.main import main
from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS, curate
from vlm.data.selection import write_selection
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError
from vlm.ray_engine import NodeResources, RayCluster, _note_taken, cpus_per_process, run_on_ray

ROOT = Path(__file__).resolve().parents[2]
THREE = RayCluster(processes=3)


@pytest.fixture(scope="module")
def ray_cluster():
    """A cluster of three CPUs, which the calls find started already."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    with pytest.MonkeyPatch.context() as patch:
        # its processes import this module
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options = {"include_dashboard": False, "object_store_memory": 80 << 20, "log_to_driver": False}
        ray.init(address="local", num_cpus=3, logging_level="error", **options)
        yield
        ray.shutdown()


def open_worker(folder: Path, opened: list[int]):
    """A worker that notes each process that opens it, and does as the names of its tasks say."""

    def work(task: str) -> tuple[str, int]:
        first_time = folder / f"{task}.begun"
        was_begun = first_time.exists()
        first_time.touch()
        if task == "deadly" or (task == "deadly-once" and not was_begun):
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "bad":
            raise VlmError("this shard is damaged.")
        return task.upper(), os.getpid()

    (folder / f"opened-{os.getpid()}").touch()
    return work


def run(folder: Path, tasks: list[str], cluster: RayCluster = THREE) -> dict[int, tuple[str, int]]:
    return dict(run_on_ray(partial(open_worker, folder, []), tasks, cluster, name_of=lambda task: f"{task}.tar"))


def test_a_task_whose_process_is_killed_is_done_again_by_another(ray_cluster, tmp_path, caplog):
    tasks = ["a", "deadly-once", "b", "c", "d", "e", "f"]
    results = run(tmp_path, tasks)
    assert [results[number][0] for number in range(len(tasks))] == [task.upper() for task in tasks]
    pids = {pid for _, pid in results.values()}
    assert os.getpid() not in pids
    # the three of the start, and the one in the place of the killed
    opened = {int(path.name.removeprefix("opened-")) for path in tmp_path.glob("opened-*")}
    assert pids <= opened
    assert len(opened) <= THREE.processes + 1
    assert "deadly-once.tar was begun again" in caplog.text


def test_a_task_that_kills_every_process_ends_the_work_by_its_name(ray_cluster, tmp_path):
    with pytest.raises(VlmError, match=r"deadly\.tar: 3 processes died at it.*batch-size"):
        run(tmp_path, ["deadly"], RayCluster(processes=1))


def test_the_error_of_a_task_names_it(ray_cluster, tmp_path):
    with pytest.raises(VlmError, match=r"bad\.tar: this shard is damaged\. What is finished is kept"):
        run(tmp_path, ["bad"], RayCluster(processes=1))


def test_curation_on_ray_writes_the_same_selection(ray_cluster, scene_shards, tmp_path):
    shards = expand_shards(str(scene_shards / "train"))
    filters = [parse_filter(text, FILTERS) for text in ("usable", "near-duplicates", "repeated-caption:max=3")]
    for name, cluster in (("local", None), ("ray", RayCluster(processes=2, uses_gpus=False))):
        write_selection(tmp_path / name, curate(shards, filters, cluster=cluster).selection)
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "local").read_bytes()


def test_more_processes_than_the_cluster_has_room_for_are_refused(ray_cluster, tmp_path):
    with pytest.raises(UsageError, match=r"processes = 9: the Ray cluster has room for 3 \(3 CPUs, 0 GPUs on 1"):
        run(tmp_path, list("abcdefghi"), RayCluster(processes=9))


@pytest.mark.parametrize(
    ("nodes", "processes", "uses_gpus", "expected"),
    [
        ([(16, 0)], 4, False, 4),
        # no process takes its CPUs from two machines
        ([(4, 0), (4, 0), (4, 0)], 2, False, 4),
        ([(5, 0), (3, 0)], 3, False, 2),
        # those without a GPU are of no use
        ([(64, 0), (16, 8)], 8, True, 2),
        ([(96, 8), (96, 8)], 16, True, 12),
    ],
)
def test_cpus_are_divided_among_processes_within_machines(nodes, processes, uses_gpus, expected):
    machines = [NodeResources(cpus=cpus, gpus=gpus) for cpus, gpus in nodes]
    assert cpus_per_process(machines, processes, uses_gpus=uses_gpus) == expected


def test_too_few_gpus_are_told_apart_from_too_few_cpus():
    with pytest.raises(UsageError, match=r"room for 2 \(64 CPUs, 2 GPUs on 1 machines, and each needs a CPU and a GPU"):
        cpus_per_process([NodeResources(cpus=64, gpus=2)], 3, uses_gpus=True)


def test_without_ray_the_command_names_what_to_install(monkeypatch, scene_shards, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["curate", str(scene_shards / "train"), str(tmp_path / "out.selection"), "--filter", "usable"]
    assert main([*words, "--engine", "ray"]) == 2
    assert "pip install 'vlm-pipeline[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out.selection").exists()


def test_an_address_where_nobody_listens_is_named_at_once(monkeypatch, scene_shards, tmp_path, capsys, free_port):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    address = f"127.0.0.1:{free_port()}"
    words = ["curate", str(scene_shards / "train"), str(tmp_path / "out.selection"), "--filter", "usable"]
    assert main([*words, "--engine", "ray", "--ray-address", address]) == 1
    assert f"No Ray cluster can be reached at {address}" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "is_said"), [(3.0, False), (2.0, False), (1.0, True), (None, True)])
def test_cpus_that_others_hold_are_waited_for_with_a_word(free, is_said, caplog):
    resources = {} if free is None else {"CPU": free}
    _note_taken(SimpleNamespace(available_resources=lambda: resources), 2)
    assert ("2 CPUs are needed" in caplog.text) is is_said
