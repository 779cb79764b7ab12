#!/usr/bin/env python
"""Our index compared with bare FAISS, autofaiss and HNSW graphs of others, one thread each.

    benchmarks/run index_search [--rows 200000 --dimension 192] [--link-drawn 50000] [--json]
    benchmarks/run index_search --images EMBEDDINGS --texts EMBEDDINGS
    benchmarks/run index_search --rows 1000000 --patches-of MODEL --shards SHARDS --texts EMBEDDINGS
                                [--link-texts EMBEDDINGS]

Like is compared with like: the index that our autotuner chooses with autofaiss and with bare FAISS of the same
parameters, our `hnsw` with the graphs of others, each at the least ef that reaches the recall on the same tuning
queries; the chosen index with these graphs too. Every side has its own process and gets the same vectors and the same
text queries, which no tuner has seen. The sides alternate in short rounds, since the speed of shared machines varies
within seconds, and medians are reported; rates and builds are of processor time, latencies by the clock. Without
embeddings, vectors are synthetic: clusters of images, and texts across a modality gap.
"""

import importlib.metadata
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from vlm.console import progress, show_json, show_table
from vlm.errors import UsageError, VlmError
from vlm.files import write_text
from vlm.index.autotune.query_sampling import exact_scores
from vlm.tensor_types import Array, Float32

sys.path.insert(0, str(Path(__file__).parent))
from parts.index_vectors import draw_vectors, halves, read_texts, read_vectors, write_vectors
from parts.isolated_environment import AUTOFAISS, own_python
from parts.measure_process import Side
from parts.messages import say
from parts.patch_embeddings import embed_patches

GRAPHS = ("hnswlib==0.8.0", "usearch==2.26.6", "psutil")
CHOSEN, GRAPH = "ours, chosen", "ours, hnsw"
BESIDE_CHOSEN = ("bare FAISS", "autofaiss")
_MADE_FROM = "made-from.json"
_MEASURED = ("recall@1", "recall@10", "recall@100", "p50_ms", "p95_ms", "questions_per_s")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the index benchmark."""

    rows: int = 200_000
    """Number of synthetic image vectors, or of patches."""

    dimension: int = 192
    """Dimension of synthetic vectors."""

    questions: int = 2000
    """Number of text queries: half for tuning, half for evaluation."""

    images: Path | None = None
    """Embeddings folder of images, instead of synthetic vectors."""

    texts: Path | None = None
    """Embeddings folder of texts, by the same model."""

    link_texts: Path | None = None
    """Embeddings folder of other texts, whose answers our `hnsw` links; the graphs of others cannot."""

    link_drawn: int = 0
    """Number of texts that are drawn beside synthetic vectors for the same purpose."""

    language: str | None = None
    """Only texts of captions in this language, as the shards name it; "" for captions without one. None: all."""

    patches_of: str = ""
    """MODEL that embeds patches of random crops of the photos in `shards`, instead of --images."""

    shards: str = ""
    """Photos for --patches-of."""

    decay: float = 1.5
    """Decay of synthetic vectors: the variance of the i-th strongest dimension is proportional to i^-decay.

    With 1.5, recall@10 of 0.99 for text queries takes as many lists as with our models on 7,383 fashion photos (13 of
    86; theirs 7, 10, 13), and a larger efSearch (48; theirs 12, 12, 24). With 0 all dimensions have equal variance.
    """

    recall: float = 0.99
    """Target of text-to-image recall@10 for our autotuner and for each graph."""

    plan_rows: int = 50_000
    """Rows of the sample on which our autotuner tries configurations."""

    autofaiss_memory: str = "16G"
    """Memory that autofaiss may use for its index; defaults to its own setting."""

    autofaiss: bool = True
    """Measure autofaiss beside the chosen index."""

    chosen: bool = True
    """Measure the index that our autotuner chooses, and bare FAISS and autofaiss beside it."""

    graphs: tuple[str, ...] = ("hnswlib", "usearch", "FAISS HNSW")
    """Libraries whose HNSW graph (16 links, efConstruction 200) is measured beside our hnsw."""

    rounds: int = 50
    """Rounds per side, a fifth of a second each; the sides alternate."""

    seed: int = 0
    """Random seed of synthetic vectors."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of the environments of autofaiss (bench-autofaiss) and the graphs' libraries (bench-graphs)."""

    keep: Path | None = None
    """Folder where vectors and the graphs of others are kept and used again, as their builds take longest."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        shape = _kept_shape(arguments, folder) or _write(arguments, folder)
        result = _compare(arguments, folder) | {
            "command": shlex.join(["benchmarks/run", "index_search", *sys.argv[1:]]),
            "shape": shape,
        }
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _made_from(arguments: Arguments) -> dict[str, str]:
    names = ("rows", "dimension", "questions", "seed", "decay", "images", "texts", "patches_of", "shards")
    names += ("link_texts", "link_drawn", "language")
    return {name: str(getattr(arguments, name)) for name in names}


def _kept_shape(arguments: Arguments, folder: Path) -> tuple[int, ...] | None:
    """The shape of the rows that a run before kept; None where there are none.

    Raises:
        UsageError: they were made from other options.
    """
    if not (folder / _MADE_FROM).is_file():
        return None
    # a folder of an earlier version lacks the options that came later
    kept = _made_from(Arguments()) | json.loads((folder / _MADE_FROM).read_text(encoding="utf-8"))
    for name, value in _made_from(arguments).items():
        if (before := kept[name]) != value:
            option = name.replace("_", "-")
            raise UsageError(
                f"--keep {folder} holds vectors of --{option} {before or 'unset'}, not {value or 'unset'}; give that, "
                "or another folder."
            )
    return np.load(folder / "rows.npy", mmap_mode="r").shape


def _write(arguments: Arguments, folder: Path) -> tuple[int, int]:
    """Rows, queries and ground truth for all sides, and the embeddings folders that ours reads."""
    given = {name for name in ("images", "patches_of", "shards", "texts") if getattr(arguments, name)}
    if given not in (set(), {"images", "texts"}, {"patches_of", "shards", "texts"}):
        raise UsageError("Give --images and --texts, or --patches-of, --shards and --texts, or none of them.")
    linking = None
    if arguments.texts:
        rows = _embedded_rows(arguments)
        planned, asked = halves(arguments.texts, arguments.questions, seed=arguments.seed, language=arguments.language)
        if arguments.link_texts:
            linking = read_texts(arguments.link_texts, arguments.language)
    else:
        count = arguments.questions
        rows, texts = draw_vectors(
            arguments.rows,
            count + arguments.link_drawn,
            arguments.dimension,
            seed=arguments.seed,
            decay=arguments.decay,
        )
        planned, asked = texts[:count:2], texts[1:count:2]
        if arguments.link_drawn:
            linking = texts[count:]
    say(f"Writing {len(rows):,} × {rows.shape[1]} and the ground truth of {len(asked):,} queries …")
    write_vectors(folder / "images", rows, modality="image")
    write_vectors(folder / "texts", planned, modality="text")
    # all sides get the rows rounded to float16
    rows = read_vectors(folder / "images")
    np.save(folder / "rows.npy", rows)
    np.save(folder / "questions.npy", asked)
    np.save(folder / "truth.npy", exact_scores([rows], asked, 100))
    np.save(folder / "planned.npy", planned)
    np.save(folder / "planned_truth.npy", exact_scores([rows], planned, 100))
    if linking is not None:
        np.save(folder / "linking.npy", linking)
    # last: without it, what lies there was not finished
    write_text(folder / _MADE_FROM, json.dumps(_made_from(arguments)))
    return len(rows), rows.shape[1]


def _embedded_rows(arguments: Arguments) -> Float32[Array, "N D"]:
    if arguments.images:
        return read_vectors(arguments.images)
    return embed_patches(arguments.patches_of, arguments.shards, arguments.rows, seed=arguments.seed)


def _compare(arguments: Arguments, folder: Path) -> dict[str, Any]:
    sides: dict[str, Side] = {}
    built: dict[str, dict[str, Any]] = {}
    if arguments.chosen:
        say("Ours: autotuning and building …")
        _add_ours(CHOSEN, "auto", arguments, folder, sides, built)
        sides["bare FAISS"] = Side(sys.executable, "bare_faiss_index.py", threads=1)
        say("Bare FAISS: building …")
        same = {name: built[CHOSEN][name] for name in ("kind", "parameters")}
        built["bare FAISS"] = sides["bare FAISS"].ask(do="build", folder=str(folder), **same)
    if arguments.chosen and arguments.autofaiss:
        _add_autofaiss(arguments, folder, sides, built)
    if arguments.graphs:
        say("Ours: building hnsw …")
        _add_ours(GRAPH, "hnsw", arguments, folder, sides, built)
        _add_graphs(arguments, folder, sides, built)
    say("Measuring recall …")
    recalls = {name: side.ask(do="recall", folder=str(folder)) for name, side in sides.items()}
    timed = _time(arguments, folder, sides)
    for side in sides.values():
        side.close()
    medians = {name: recalls[name] | _speed(rounds) for name, rounds in timed.items()}
    rates = {name: [_rate(each) for each in rounds] for name, rounds in timed.items()}
    return {"built": built, "medians": medians, "ratios": _ratios(built, rates), "questions_per_s": rates}


def _add_ours(
    name: str,
    kind: str,
    arguments: Arguments,
    folder: Path,
    sides: dict[str, Side],
    built: dict[str, dict[str, Any]],
) -> None:
    sides[name] = Side(sys.executable, "vlm_index.py", threads=1)
    numbers = {"recall": arguments.recall, "plan_rows": arguments.plan_rows}
    built[name] = sides[name].ask(do="build", folder=str(folder), kind=kind, **numbers)


def _time(arguments: Arguments, folder: Path, sides: dict[str, Side]) -> dict[str, list[dict[str, Any]]]:
    """The timed queries by side and round (`index_measure.measure`); the first side changes from round to round."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    names, places = list(sides), dict.fromkeys(sides, 0)
    with progress(total=arguments.rounds, what="measure", unit=" rounds") as shown:
        for turn in range(arguments.rounds):
            for number in range(len(names)):
                name = names[(turn + number) % len(names)]
                found = sides[name].ask(do="time", folder=str(folder), first=places[name])
                rounds[name].append(found)
                places[name] = found["next"]
            shown.update(1)
    return rounds


def _speed(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Median and 95th percentile over all queries; queries per second of processor time in the median round."""
    seconds = np.concatenate([one["seconds"] for one in rounds])
    p50, p95 = (float(value) * 1000 for value in np.percentile(seconds, (50, 95)))
    return {"p50_ms": p50, "p95_ms": p95, "questions_per_s": median(map(_rate, rounds))}


def _rate(timed: dict[str, Any]) -> float:
    return len(timed["seconds"]) / timed["cpu_s"]


def _add_autofaiss(
    arguments: Arguments, folder: Path, sides: dict[str, Side], built: dict[str, dict[str, Any]]
) -> None:
    """Add autofaiss to the sides; if it cannot be installed or fails, the reason is printed and it is left out."""
    try:
        python = own_python(arguments.cache.expanduser() / "bench-autofaiss", AUTOFAISS)
        side = Side(python, "autofaiss_index.py", threads=1)
    except VlmError as error:
        built["autofaiss"] = {"failed": str(error)}
        return
    say("autofaiss: building …")
    built["autofaiss"] = side.ask(do="build", folder=str(folder), memory=arguments.autofaiss_memory)
    if "failed" in built["autofaiss"]:
        side.close()
    else:
        sides["autofaiss"] = side


def _add_graphs(arguments: Arguments, folder: Path, sides: dict[str, Side], built: dict[str, dict[str, Any]]) -> None:
    """Add the HNSW graphs of other libraries to the sides."""
    faiss = f"faiss-cpu=={importlib.metadata.version('faiss-cpu')}"
    python = own_python(arguments.cache.expanduser() / "bench-graphs", (*GRAPHS, faiss))
    for library in arguments.graphs:
        say(f"{library}: building …")
        sides[library] = Side(python, "graph_library_index.py", threads=1)
        built[library] = sides[library].ask(do="build", folder=str(folder), library=library, recall=arguments.recall)


def _ratios(built: dict[str, dict[str, Any]], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Ours relative to other sides: queries per second (median of rounds, quartiles), build seconds and bytes."""
    pairs = [(GRAPH, peer) for peer in rates if GRAPH in rates and peer not in (GRAPH, CHOSEN, *BESIDE_CHOSEN)]
    pairs += [(CHOSEN, peer) for peer in rates if CHOSEN in rates and peer not in (GRAPH, CHOSEN)]
    ratios: list[dict[str, Any]] = []
    for ours, peer in pairs:
        each = [mine / theirs for mine, theirs in zip(rates[ours], rates[peer], strict=True)]
        low, middle, high = np.percentile(each, (25, 50, 75)).tolist()
        ratios.append(
            {
                "ours": ours,
                "peer": peer,
                "questions_per_s": middle,
                "quartiles": [low, high],
                "build_s": built[ours]["build_s"] / built[peer]["build_s"],
                "memory": built[ours]["index_mb"] / built[peer]["index_mb"],
                "plan_and_build_s": (built[ours]["plan_s"] + built[ours]["build_s"]) / built[peer]["build_s"],
            }
        )
    return ratios


def _show(result: dict[str, Any]) -> None:
    rows, dimension = result["shape"]
    columns = [
        "side",
        "index",
        "tune s",
        "build s",
        "index MB",
        "peak MB",
        "R@1",
        "R@10",
        "R@100",
        "p50 ms",
        "p95 ms",
        "q/s",
    ]
    cells = [_cells(name, built, result["medians"].get(name)) for name, built in result["built"].items()]
    show_table(
        columns, cells, title=f"{rows:,} × {dimension}, text queries, one thread; q/s and seconds of processor time"
    )
    show_table(
        ["ours", "to", "queries per second", "middle half of the rounds", "build time", "tune and build", "bytes"],
        [
            [
                ratio["ours"],
                ratio["peer"],
                f"{ratio['questions_per_s']:.2f}",
                " to ".join(f"{quartile:.2f}" for quartile in ratio["quartiles"]),
                f"{ratio['build_s']:.2f}",
                f"{ratio['plan_and_build_s']:.2f}",
                f"{ratio['memory']:.2f}",
            ]
            for ratio in result["ratios"]
        ],
    )
    if CHOSEN in result["built"]:
        print(result["built"][CHOSEN]["why"])
    print(f"To repeat: {result['command']}")


def _cells(name: str, built: dict[str, Any], measured: dict[str, float] | None) -> list[str]:
    if measured is None:
        return [name, built["failed"], *["–"] * 10]
    recalls = [f"{measured[field]:.4f}" for field in _MEASURED[:3]]
    plan = f"{built['plan_s']:.1f}" if "plan_s" in built else "–"
    costs = [plan, f"{built['build_s']:.1f}", f"{built['index_mb']:.1f}", f"{built['peak_mb']:.0f}"]
    speed = [f"{measured['p50_ms']:.3f}", f"{measured['p95_ms']:.3f}", f"{measured['questions_per_s']:,.0f}"]
    return [name, built["what"], *costs, *recalls, *speed]


if __name__ == "__main__":
    run(tyro.cli(Arguments))
