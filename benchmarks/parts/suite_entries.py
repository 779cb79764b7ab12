"""The comparisons of `benchmarks/run --all`: their short commands, their peers, and the ratios that count."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times better ours is than a peer: above 1 a win, whatever is measured.

    values: one for each round, data set or command; shown as their median and range.
    in_readme: whether README's table shows it.
    """

    what: str
    peer: str
    values: tuple[float, ...]
    in_readme: bool = False

    @property
    def text(self) -> str:
        """The median, and the range if there are several values."""
        middle = f"{_number(median(self.values))} ×"
        if len(self.values) < 2:
            return middle
        return f"{middle} ({_number(min(self.values))}–{_number(max(self.values))})"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A comparison: `benchmarks/run NAME ARGUMENTS --json` and what its JSON says.

    stage: its name in tables. peers: what it is compared with, with versions. minutes: it is ended after that long.
    Arguments may name {folder}, an empty folder of the run, and {before}, a checkout of the commit BEFORE. tiny: those
    of the smallest sizes at which everything runs.
    """

    name: str
    stage: str
    peers: str
    arguments: str
    tiny: str
    minutes: float
    ratios: Callable[[Any], list[Ratio]]


# the last commit before cold starts were worked on
BEFORE = "b9855a3"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def _loading(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    # those that hand on floats are compared with ours made floats
    peers = {
        ("ours", "open_clip"): "open_clip's pipeline",
        ("ours, float", "Energon"): "Energon",
        ("ours, float", "mosaicml"): "mosaicml-streaming",
        ("ours", "bare"): "bare decoding, torch's resize",
        ("ours", "bare, own filter"): "bare decoding, our resize",
        ("ours", "bare, Pillow"): "bare decoding by Pillow",
    }
    for (mine, other), peer in peers.items():
        for row in result["speed"]:
            runs = zip(row["runs"][mine], row["runs"][other], strict=True)
            values = tuple(ours["images_per_s"] / theirs["images_per_s"] for ours, theirs in runs)
            what = f"images/s, {row['shards']}, {row['workers']} worker"
            ratios.append(Ratio(what=what, peer=peer, values=values, in_readme=other != "bare, Pillow"))
    return ratios


def _training(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for row in result["throughput"]:
        runs = zip(row["runs"]["ours"], row["runs"]["open_clip"], strict=True)
        values = tuple(ours / theirs for ours, theirs in runs)
        ratios.append(Ratio(what="samples/s of training", peer="open_clip's trainer", values=values, in_readme=True))
    runs = zip(result["step"]["runs"]["bare"], result["step"]["runs"]["ours"], strict=True)
    values = tuple(bare / ours for bare, ours in runs)
    return [*ratios, Ratio(what="one step", peer="a bare PyTorch loop", values=values, in_readme=True)]


def _quality(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for row in result["ratios"]:
        what = f"{row['metric'].replace('_', ' ')} at equal samples, {row['data']}"
        ratios.append(Ratio(what=what, peer="open_clip's trainer", values=(row["ratio"],), in_readme=True))
    return ratios


def _evaluation(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        by_command = {row["command"]: row for row in result["rows"] if row["task"] == task}
        theirs = by_command.pop("CLIP_benchmark")
        for command, ours in by_command.items():
            runs = zip(theirs["all_seconds"], ours["all_seconds"], strict=True)
            values = tuple(their_seconds / our_seconds for their_seconds, our_seconds in runs)
            what = f"{task}, whole command" if len(by_command) == 1 else f"{task}, whole command ({command})"
            ratios.append(Ratio(what=what, peer="CLIP_benchmark", values=values, in_readme=True))
    return ratios


def _captioning(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for row in result:
        what = f"captions/s, {row['way']}"
        ratios.append(Ratio(what=what, peer="open_clip's generate", values=(row["times_faster"],), in_readme=True))
    return ratios


def _embedding(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    runs = result["runs"]
    for peer in [name for name in runs[0] if name != "one reader" and not name.startswith("vlm embed")]:
        # by torch beside the other tool alone
        commands = (
            [name for name in runs[0] if name.startswith("vlm embed")] if peer == "clip-retrieval" else ["vlm embed"]
        )
        for command in commands:
            for kind in runs[0][peer]:
                values = tuple(run[command][kind] / run[peer][kind] for run in runs)
                what = f"pairs/s, {kind} ({command})" if len(commands) > 1 else f"pairs/s, {kind}"
                is_shown = peer == "clip-retrieval" and "processor" not in kind
                ratios.append(Ratio(what=what, peer=peer, values=values, in_readme=is_shown))
    return ratios


def _index(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for row in result["ratios"]:
        side, peer = row["ours"].removeprefix("ours, "), row["peer"]
        low, high = row["quartiles"]
        values = (low, row["questions_per_s"], high)
        # README has the library that ours is built on, the one it replaces and the quickest of the other graphs
        is_shown = (side, peer) in (("chosen", "bare FAISS"), ("chosen", "autofaiss"), ("hnsw", "hnswlib"))
        ratios.append(Ratio(what=f"{side} index, queries/s", peer=peer, values=values, in_readme=is_shown))
        ratios.append(Ratio(what=f"{side} index, time to build", peer=peer, values=(1 / row["build_s"],)))
        ratios.append(Ratio(what=f"{side} index, bytes", peer=peer, values=(1 / row["memory"],)))
    return ratios


def _serving(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    keys = dict.fromkeys((row["queries"], row["clients"]) for row in result["rows"])
    for queries, clients in keys:
        rows = [row for row in result["rows"] if (row["queries"], row["clients"]) == (queries, clients)]
        theirs = [row for row in rows if row["server"] == "clip-retrieval back"]
        ours = [row for row in rows if row["server"] == "vlm serve"]
        for field, what in (("qps", "queries/s"), ("p99", "99th percentile of latency")):
            pairs = zip(ours, theirs, strict=True)
            values = tuple(
                mine[field] / other[field] if field == "qps" else other[field] / mine[field] for mine, other in pairs
            )
            is_first = queries.startswith("texts, all")
            what_of = f"{what}, {queries}, {clients} clients"
            ratios.append(Ratio(what=what_of, peer="clip-retrieval's back", values=values, in_readme=is_first))
    return ratios


def _cold_start(result: Any) -> list[Ratio]:
    ratios: list[Ratio] = []
    for command, row in result["commands"].items():
        for field, what in (("wall", "time"), ("megabytes", "memory")):
            value = (1 / row["ratio"][field],)
            ratios.append(Ratio(what=f"{command}: {what}", peer=f"this project at {BEFORE}", values=value))
    return ratios


ENTRIES = (
    Entry(
        name="loading",
        stage="data loading, 224 px",
        peers="open_clip 3.3.0 with webdataset 0.2.86; Energon 7.4.1 and mosaicml-streaming 0.13.0; decoding alone",
        arguments="--workers 1 --batches 24 --epochs 0 --plan-samples",
        tiny="--shards flickr8k --workers 1 --size 64 --batches 6 --skip 2 --repeats 1 --epochs 0 --plan-samples",
        minutes=7,
        ratios=_loading,
    ),
    Entry(
        name="training",
        stage="training, CPU",
        peers="open_clip 3.3.0's trainer; a bare PyTorch loop",
        arguments="--only throughput step --shards flickr8k --allocators default --steps 4 --repeats 2",
        tiny="--only throughput step --shards flickr8k --allocators default --steps 2 --margin 2 --repeats 1 "
        "--batch 16 --large 16 --split 16 --width 32 --layers 1 --text-layers 1 --image-size 32",
        minutes=7,
        ratios=_training,
    ),
    Entry(
        name="quality",
        stage="quality",
        peers="open_clip 3.3.0's trainer, its defaults",
        arguments="--data fashion --seeds 0 --epochs 4 --keep {folder}",
        tiny="--data fashion --seeds 0 --epochs 1 --shards 1 --keep {folder}",
        minutes=9,
        ratios=_quality,
    ),
    Entry(
        name="evaluation",
        stage="evaluation",
        peers="CLIP_benchmark 1.6.2",
        arguments="--repeats 2",
        tiny="--repeats 1 --steps 2",
        minutes=6,
        ratios=_evaluation,
    ),
    Entry(
        name="captioning",
        stage="captioning, batch 32, 32 tokens",
        peers="open_clip 3.3.0 with transformers 4.56",
        arguments="--layers 4",
        tiny="--batch 2 --layers 1 --length 8",
        minutes=5,
        ratios=_captioning,
    ),
    Entry(
        name="embedding",
        stage="bulk embedding",
        peers="clip-retrieval 2.45.0; the bare model; its ONNX export, which vlm embed runs, made beforehand",
        arguments="--pairs 1500 --repeats 2 --bare-seconds 4",
        tiny="--pairs 96 --tars 3 --width 64 --layers 1 --batch-size 16 --repeats 1 --bare-seconds 0.5",
        minutes=6,
        ratios=_embedding,
    ),
    Entry(
        name="index_search",
        stage="index, 50,000 × 192, recall@10 ≥ 0.99",
        peers="autofaiss 2.18.0; bare FAISS, same parameters; HNSW of hnswlib 0.8.0, usearch 2.26.6 and FAISS, "
        "without the links from texts that ours has",
        # links from as many texts as `vlm index build --texts` takes at most
        arguments="--rows 50000 --plan-rows 20000 --rounds 20 --link-drawn 12500",
        tiny="--rows 4000 --dimension 32 --questions 200 --plan-rows 2000 --rounds 2 --link-drawn 300",
        minutes=8,
        ratios=_index,
    ),
    Entry(
        name="serving",
        stage="search service, 50,000 rows",
        peers="clip-retrieval 2.45.0's back",
        arguments="--rows 50000 --clients 16 --seconds 3",
        tiny="--rows 2000 --width 64 --layers 1 --clients 2 --seconds 1 --repeats 1",
        minutes=6,
        ratios=_serving,
    ),
    Entry(
        name="cold_start",
        stage="cold start from the shell",
        peers="the build before it was worked on",
        arguments="--before {before} --rounds 3 --towers",
        tiny="--before {before} --rounds 1 --towers",
        minutes=6,
        ratios=_cold_start,
    ),
)
