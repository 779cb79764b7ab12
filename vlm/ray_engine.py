"""Work on shards by Ray Data: one task a shard, on processes of a cluster that open what they need once.

`run_on_ray` is to a cluster what `vlm.launch.run_in_processes` is to one machine. Ray Data keeps the queues bounded (a
process has one task running and one waiting), starts a process again that died and repeats its tasks; so a task must
leave the same files when it is done twice.
"""

import contextlib
import logging
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm.console import pluralize
from vlm.errors import UsageError, VlmError
from vlm.launch import Report, environment, report_of

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

Engine = Literal["local", "ray"]
"""Where work on shards runs: processes of this machine, or of a Ray cluster."""

Task = TypeVar("Task")
Value = TypeVar("Value")

# a shard that ends its process each time, most likely out of memory, would be retried endlessly
MAX_ATTEMPTS = 3
# one task runs while the next waits beside it; more would leave other processes idle at the end
_TASKS_PER_PROCESS = 2
_CONNECT_SECONDS = 10.0
# tasks and their reports are small; Ray would reserve a third of the machine's memory
_OBJECT_STORE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """Where Ray runs the work.

    processes: how many work at once, each with a model of its own.
    address: of a running cluster; without one RAY_ADDRESS, and without that a cluster is started on this machine and
        ended with the work. A program that has called `ray.init` keeps its cluster.
    uses_gpus: each process gets a GPU, if the cluster has any.
    """

    processes: int
    address: str | None = None
    uses_gpus: bool = True

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UsageError(f"processes = {self.processes} is out of range: give at least 1.")


@dataclass(frozen=True, kw_only=True)
class NodeResources:
    """What one machine of a cluster offers, in CPUs and GPUs as Ray counts them."""

    cpus: float
    gpus: float = 0.0


def check_engine(engine: str, ray_address: str | None) -> None:
    """Refuse an engine that does not exist, and an address that would be ignored.

    Raises:
        UsageError: either of them.
    """
    if engine not in ("local", "ray"):
        raise UsageError(f"engine = {engine!r}; give local or ray.")
    if engine == "local" and ray_address is not None:
        raise UsageError(f"--ray-address {ray_address} is for --engine ray; add that, or omit the address.")


def run_on_ray(
    open_worker: Callable[[], Callable[[Task], Value]],
    tasks: Sequence[Task],
    cluster: RayCluster,
    *,
    name_of: Callable[[Task], str],
) -> Generator[tuple[int, Value], None, None]:
    """Do each task in a process of a cluster; its number and what came of it, in the order in which they end.

    open_worker: called once in each process, with its first task; what it returns does the tasks. Travels by pickle,
        as do tasks and values.
    name_of: what a message calls a task, e.g. its shard.

    Raises:
        UsageError: Ray is not installed, or the cluster has no room for so many processes.
        VlmError: a task failed, or ended its process again and again; it is named, and what is finished stays.
    """
    ray = _import_ray()
    if not tasks:
        return
    # more processes than tasks would load the model for nothing
    processes = min(cluster.processes, len(tasks))
    with _connected(ray, cluster, processes):
        nodes = list(_alive_nodes(ray))
        uses_gpus = cluster.uses_gpus and any(node.gpus for node in nodes)
        num_cpus = cpus_per_process(nodes, processes, uses_gpus=uses_gpus)
        attempts = ray.remote(num_cpus=0)(_Attempts).remote()
        items: list[dict[str, Any]] = []
        for number, task in enumerate(tasks):
            items.append({"number": number, "name": name_of(task), "task": pickle.dumps(task)})
        # a block of one row a task, so that each is handed out, counted and repeated by itself
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _Process,
            fn_constructor_args=(open_worker, attempts),
            compute=ray.data.ActorPoolStrategy(size=processes, max_tasks_in_flight_per_actor=_TASKS_PER_PROCESS),
            num_cpus=num_cpus,
            num_gpus=1 if uses_gpus else 0,
        )
        gpus = " and a GPU" if uses_gpus else ""
        logger.info(f"Ray: {len(tasks):,} tasks; processes: {processes}, each with {pluralize(num_cpus, 'CPU')}{gpus}.")
        _note_taken(ray, processes * num_cpus)
        rows = iter(dataset.iter_rows())
        try:
            for row in rows:
                report: Report[Value] = pickle.loads(row["report"])
                if report.exit_code:
                    raise _failure(report, row["name"])
                if row["attempt"] > 1:
                    logger.warning(f"{row['name']} was begun again, because its process had died; it is done now.")
                yield row["number"], report.value  # pyright: ignore[reportReturnType]
        except ray.exceptions.RayError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise VlmError(f"Ray ended the work: {reason} What is finished is kept; rerun to resume.") from error
        finally:
            # ends the processes, where the cluster stays
            if isinstance(rows, Generator):
                rows.close()


def cpus_per_process(nodes: Sequence[NodeResources], processes: int, *, uses_gpus: bool) -> int:
    """The most whole CPUs that each of so many processes can have, with a GPU too if so asked.

    >>> cpus_per_process([NodeResources(cpus=16), NodeResources(cpus=8)], 3, uses_gpus=False)
    8

    Raises:
        UsageError: there is no room for so many.
    """
    most = max((int(node.cpus) for node in nodes), default=0)
    # from the most down: the first that leaves room for all is the best
    for num_cpus in range(most, 0, -1):
        if _num_places(nodes, num_cpus, uses_gpus=uses_gpus) >= processes:
            return num_cpus
    places = _num_places(nodes, 1, uses_gpus=uses_gpus)
    offered = f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"
    raise UsageError(
        f"processes = {processes}: the Ray cluster has room for {places} ({offered} on {len(nodes)} machines, and each "
        f"needs a CPU{' and a GPU' if uses_gpus else ''}). Give fewer, or add machines."
    )


def _num_places(nodes: Sequence[NodeResources], num_cpus: int, *, uses_gpus: bool) -> int:
    """Processes that fit, since none can take its CPUs from two machines."""
    places = 0
    for node in nodes:
        by_cpu = int(node.cpus) // num_cpus
        places += min(by_cpu, int(node.gpus)) if uses_gpus else by_cpu
    return places


def check_shared(path: Path, node: str) -> None:
    """Refuse to work on a machine that does not see what the one that began the work wrote.

    Raises:
        VlmError: the path does not exist here.
    """
    if not path.exists():
        raise VlmError(
            f"The machine {node} does not see the folder {path.parent}, which the command has begun. Every machine of "
            "a Ray cluster needs it under this path: name a folder on shared storage (NFS, a mounted bucket)."
        )


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray ({error}): pip install 'vlm-pipeline[ray]'.") from error
    return ray


@contextlib.contextmanager
def _connected(ray: ModuleType, cluster: RayCluster, processes: int) -> Iterator[None]:
    if ray.is_initialized():
        # somebody else's connection: used, and left open
        with _quiet(ray):
            yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _check_listening(address)
        options["address"] = address
    else:
        # Ray refuses to start more processes than it counts CPUs, though they could share them
        num_cpus = max(len(os.sched_getaffinity(0)), processes)
        options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    # no report to Ray's makers
    with environment({"RAY_USAGE_STATS_ENABLED": "0"}):
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address or "this machine", error) from error
    try:
        with _quiet(ray):
            yield
    finally:
        ray.shutdown()


def _check_listening(address: str) -> None:
    # Ray itself would ask for more than ten minutes
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> VlmError:
    return VlmError(
        f"No Ray cluster can be reached at {address} ({error}). Start one by ray start --head, or give no address "
        "(nor RAY_ADDRESS) to have one started on this machine."
    )


@contextlib.contextmanager
def _quiet(ray: ModuleType) -> Iterator[None]:
    """Ray Data draws no bars of its own meanwhile and logs its errors only."""
    context = ray.data.DataContext.get_current()
    ray_logger = logging.getLogger("ray.data")
    before = (context.enable_progress_bars, ray_logger.level)
    context.enable_progress_bars = False
    ray_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        ray_logger.setLevel(before[1])


def _alive_nodes(ray: ModuleType) -> Iterator[NodeResources]:
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            yield NodeResources(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


def _note_taken(ray: ModuleType, needed: int) -> None:
    """Say what is waited for, since Ray itself waits without a word, and for ever, while others hold the CPUs."""
    free = ray.available_resources().get("CPU", 0.0)
    if free < needed:
        logger.warning(
            f"Ray: {needed} CPUs are needed, and {free:g} are free: others work on the cluster, and their CPUs are "
            "waited for (ray status shows them). Fewer --processes need fewer."
        )


def _failure(report: Report[Any], name: str) -> VlmError:
    if report.failure:
        return VlmError(f"{name}: its process {report.failure}")
    named = report.message if name in report.message else f"{name}: {report.message}"
    message = f"{named} What is finished is kept; rerun the same command to resume."
    return UsageError(message) if report.exit_code == UsageError.exit_code else VlmError(message)


class _Attempts:
    """Counts how often each task was begun; an actor, since the process of a task may die without a word."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def count(self, number: int) -> int:
        """Count another beginning of a task; which it is, from 1."""
        self._counts[number] = self._counts.get(number, 0) + 1
        return self._counts[number]


class _Process:
    """An actor of Ray Data: rows with a task in, rows with the report on it out.

    The worker is opened with the first task, not here: Ray starts an actor that is killed in its constructor (a model
    that does not fit into memory) again and again, without end.
    """

    def __init__(self, open_worker: Callable[[], Callable[[Any], Any]], attempts: "ActorHandle") -> None:
        self._open_worker = open_worker
        self._attempts = attempts
        self._worker: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        counted: Any = ray.get(self._attempts.count.remote(row["number"]))
        attempt = int(counted)
        # a task that kills its process is not begun for ever
        if attempt > MAX_ATTEMPTS:
            report: Report[Any] = Report(
                message=f"{MAX_ATTEMPTS} processes died at it, most likely out of memory: give a smaller --batch-size, "
                "or fewer --processes.",
                exit_code=1,
            )
        else:
            report = report_of(self._do, row["task"])
        return {"number": row["number"], "name": row["name"], "attempt": attempt, "report": pickle.dumps(report)}

    def _do(self, task: bytes) -> Any:
        if self._worker is None:
            self._worker = self._open_worker()
        return self._worker(pickle.loads(task))
