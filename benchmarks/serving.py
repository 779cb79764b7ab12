#!/usr/bin/env python
"""vlm serve compared with clip-retrieval's back: requests a second and latency over HTTP, on the same vectors.

    benchmarks/run serving [--rows 100000] [--clients 1 16 64] [--seconds 8] [--json]

Both servers hold the same vectors in an HNSW graph of the same parameters (ours of float16 rows), the same captions and
the same weights, and get the same requests from the same generator, which shares the machine with them. Text queries
are measured twice: all different, so that each is embedded, and drawn from 200 popular ones, as people ask. Ours is
measured with micro-batching and without, and beside the bare calls of model and index, by wall time and by CPU time of
the server. clip-retrieval's own client then asks ours. In two minutes: --rows 5000 --seconds 2 --clients 1 16. With
towers as wide as ViT-B/32's text tower: --width 512 --layers 12.
"""

import base64
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.embedding_data import Network, write_model
from parts.isolated_environment import CLIP_RETRIEVAL, own_python, same_torch
from parts.messages import say
from parts.serving_data import Corpus, write_corpus

PARTS = Path(__file__).parent / "parts"
OURS = "vlm serve"
UNBATCHED = "vlm serve, one query a batch"
THEIRS = "clip-retrieval back"
# clip-retrieval's back reads every field, given or null
KNN_FIELDS = {
    "text": None,
    "image": None,
    "image_url": None,
    "embedding_input": None,
    "modality": "image",
    "num_images": 20,
    "num_result_ids": 20,
    "indice_name": "bench",
    "use_mclip": False,
    "deduplicate": False,
    "use_safety_model": False,
    "use_violence_detector": False,
    "aesthetic_score": "",
    "aesthetic_weight": "",
}
POPULAR = 200
TOP = 20


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the serving benchmark."""

    rows: int = 100_000
    """Number of vectors."""

    width: int = 256
    """Width of the text tower, and dimension of the vectors."""

    layers: int = 6
    """Number of layers of the towers."""

    clients: tuple[int, ...] = (1, 16, 64)
    """Numbers of concurrent clients."""

    seconds: float = 8.0
    """Seconds of each measurement."""

    repeats: int = 2
    """Rounds; the servers take turns."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of clip-retrieval's environment (bench-clip-retrieval)."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Measure both servers and print the results."""
    with tempfile.TemporaryDirectory() as name:
        result = _measure(arguments, Path(name))
    result["command"] = shlex.join(["benchmarks/run", "serving", *sys.argv[1:]])
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    python = own_python(arguments.cache.expanduser() / "bench-clip-retrieval", (*CLIP_RETRIEVAL, *same_torch()))
    say(f"Writing the model and {arguments.rows:,} vectors …")
    model, weights, config = write_model(Network(width=arguments.width, layers=arguments.layers), folder)
    # as a server would have it: queries then need no torch
    subprocess.run([sys.executable, "-m", "vlm", "export", str(model), "--to", "onnx"], capture_output=True, check=True)
    corpus = write_corpus(folder, rows=arguments.rows, dimension=arguments.width, model=model)
    port = _free_port()
    theirs = {"config": str(config), "weights": str(weights), "indices": str(corpus.indices), "port": port}
    ours = [sys.executable, "-m", "vlm", "serve", f"bench={corpus.index}", "--port", str(port)]
    servers = {
        THEIRS: [str(python), str(PARTS / "clip_retrieval_server.py"), json.dumps(theirs)],
        OURS: ours,
        UNBATCHED: [*ours, "--max-batch", "1"],
    }
    rows: list[dict[str, Any]] = []
    bare: list[dict[str, dict[str, float]]] = []
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(arguments.repeats):
        for name, command in servers.items():
            say(f"Round {number + 1}: {name} …")
            with _running(command, port, folder / "server.log") as (boot, process):
                kinds = _requests(corpus, port, is_ours=name != THEIRS)
                for kind, (url, bodies) in kinds.items():
                    for clients in arguments.clients:
                        cpu = _cpu_seconds(process)
                        figures = _load(url, bodies, clients, arguments.seconds)
                        figures["cpu_ms"] = 1000 * (_cpu_seconds(process) - cpu) / figures["requests"]
                        rows.append({"server": name, "queries": kind, "clients": clients} | figures)
                starts[name].append({"boot_s": boot, "memory_mb": _memory_of(process) / 1e6})
                if name == OURS and not number:
                    client = _ask_their_client(python, port, corpus)
        bare.append(_measure_bare(corpus, arguments.seconds))
    return {"rows": rows, "bare": bare, "starts": starts, "their_client": client, "options": _options(arguments)}


def _measure_bare(corpus: Corpus, seconds: float) -> dict[str, dict[str, float]]:
    """The model's call and the index's alone, without service: what overhead is measured against."""
    texts = [f"{caption} number {number}" for number, caption in enumerate(corpus.captions[:20_000])]
    request = {"index": str(corpus.index), "texts": texts, "vectors": corpus.queries.tolist()}
    return _run_part("bare_search.py", request | {"top": TOP, "seconds": seconds})


def _options(arguments: Arguments) -> dict[str, Any]:
    return {"rows": arguments.rows, "width": arguments.width, "layers": arguments.layers, "cpus": os.cpu_count()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[tuple[float, subprocess.Popen[bytes]]]:
    """A server that answers a first query; the seconds until it did, and its process."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "PYTHONWARNINGS": "ignore",
    }
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/indices-list", process, log)
        boot = time.perf_counter() - began
        body = json.dumps(KNN_FIELDS | {"text": "a first query"})
        _post(f"http://127.0.0.1:{port}/knn-service", body.encode())
        yield boot, process
    except OSError as error:
        raise VlmError(f"The server failed ({error}): {log.read_text(errors='replace')[-1500:]}") from error
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        if process.poll() is not None:
            raise VlmError(f"The server ended: {log.read_text(errors='replace')[-1500:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.02)


def _post(url: str, body: bytes) -> Any:
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def _requests(corpus: Corpus, port: int, *, is_ours: bool) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """For each kind of query where it goes and the bodies; ours by our own route, theirs by `/knn-service`."""
    rng = np.random.default_rng(0)
    distinct = [f"{caption} number {number}" for number, caption in enumerate(corpus.captions[:20_000])]
    popular = rng.choice(corpus.captions[:POPULAR], 5_000).tolist()
    vectors = corpus.queries.tolist()
    images = list(map(_encoded, corpus.images))
    address = f"http://127.0.0.1:{port}"
    if is_ours:
        url = f"{address}/api/v1/indexes/bench/search"
        return {
            "texts, all different": (url, [{"texts": [text], "top": TOP} for text in distinct]),
            "texts, popular": (url, [{"texts": [text], "top": TOP} for text in popular]),
            "images": (url, [{"images": [f"data:image/jpeg;base64,{image}"], "top": TOP} for image in images]),
            "vectors": (url, [{"vectors": [vector], "top": TOP} for vector in vectors]),
        }
    common = KNN_FIELDS
    url = f"{address}/knn-service"
    return {
        "texts, all different": (url, [common | {"text": text} for text in distinct]),
        "texts, popular": (url, [common | {"text": text} for text in popular]),
        "images": (url, [common | {"image": image} for image in images]),
        "vectors": (url, [common | {"embedding_input": vector} for vector in vectors]),
    }


def _encoded(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


def _load(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, float]:
    request = {"url": url, "bodies": bodies, "clients": clients, "seconds": seconds}
    figures = _run_part("load_generator.py", request)
    if figures["failures"]:
        raise VlmError(f"{figures['failures']} requests to {url} failed.")
    return figures


def _run_part(name: str, request: dict[str, Any]) -> Any:
    """What a part of the benchmark that runs as a process prints."""
    command = [sys.executable, str(PARTS / name)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise VlmError(f"{name} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


def _cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    server = psutil.Process(process.pid)
    times = [one.cpu_times() for one in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _memory_of(process: subprocess.Popen[bytes]) -> int:
    server = psutil.Process(process.pid)
    return sum(one.memory_full_info().uss for one in (server, *server.children(recursive=True)))


def _ask_their_client(python: Path, port: int, corpus: Corpus) -> str:
    """Whether clip-retrieval's own client, unchanged, gets from ours what our route gives."""
    code = (
        "import json, sys; from clip_retrieval.clip_client import ClipClient; "
        f"client = ClipClient(url='http://127.0.0.1:{port}/knn-service', indice_name='bench', num_images={TOP}, "
        "deduplicate=False); print(json.dumps(client.query(text=sys.argv[1])))"
    )
    text = corpus.captions[0]
    done = subprocess.run([str(python), "-c", code, text], capture_output=True, text=True, check=False)
    if done.returncode:
        raise VlmError(f"clip-retrieval's client failed: {done.stderr[-1500:]}")
    hits = json.loads(done.stdout)
    body = json.dumps({"texts": [text], "top": len(hits)}).encode()
    expected = _post(f"http://127.0.0.1:{port}/api/v1/indexes/bench/search", body)["hits"]
    is_equal = [hit.get("uid") for hit in hits[:TOP]] == [hit["uid"] for hit in expected[:TOP]]
    return f"{len(hits)} hits, {'the same' if is_equal else 'NOT the same'} as by our route"


def _show(result: dict[str, Any]) -> None:
    columns = ["server", "queries", "clients", "QPS", "p50 ms", "p95 ms", "p99 ms", "CPU ms"]
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["queries"], row["clients"], row["server"])):
        percentiles = [f"{row[name]:.1f}" for name in ("p50", "p95", "p99", "cpu_ms")]
        rows.append([row["server"], row["queries"], row["clients"], f"{row['qps']:.0f}", *percentiles])
    show_table(columns, rows, title="Requests over HTTP, each round")
    bare = []
    for figures in result["bare"]:
        bare += [[kind, f"{one['wall_ms']:.2f}", f"{one['cpu_ms']:.2f}"] for kind, one in figures.items()]
    show_table(["bare calls", "wall ms", "CPU ms"], bare, title="Model and index without a service, one by one")
    starts = []
    for name, rounds in result["starts"].items():
        for start in rounds:
            starts.append([name, f"{start['boot_s']:.2f}", f"{start['memory_mb']:.0f}"])
    show_table(["server", "boot s", "memory MB"], starts, title="Until the first answer, and after the load")
    print(f"\nclip-retrieval's own client at ours: {result['their_client']}")
    print(f"\n{result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
