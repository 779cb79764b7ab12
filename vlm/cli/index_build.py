"""Build a FAISS index with its catalogue from embeddings."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import show_fields, show_json
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.index.build import BuildSummary

logger = logging.getLogger(__name__)

_NUMBERS = ("nlist", "nprobe", "links", "ef_construction", "ef_search", "rerank")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index build`."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `vlm embed` or `vlm index import` made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the index."""

    kind: str = "auto"
    """flat (exact), ivf, ivfsq, ivfpq, rabitq, sq8, hnsw, or auto: flat for small ones, ivf for others, or what a plan
    finds best."""

    recall: float | None = None
    """Plan: share of the nearest rows that a search must find, 0.95 if only another promise is given."""

    recall_at: int = 10
    """Plan: among how many answers the recall is counted."""

    latency_ms: float | None = None
    """Plan: what 95 of 100 questions may take, each alone on one thread."""

    memory: str | None = None
    """Plan: what the FAISS index may hold in memory, like 4GB or 512MiB."""

    texts: Path | None = None
    """Plan: embeddings of questions in words, by the same model (`vlm embed --modality text`); without them rows
    are asked with. From 1,000 on they are also taken as rows and asked with pictures."""

    images: Path | None = None
    """Plan: embeddings of pictures to ask with, for an index of texts."""

    plan_rows: int = 50_000
    """Plan: rows of the sample it tries kinds on."""

    nlist: int | None = None
    """Lists of an ivf, ivfsq, ivfpq or rabitq index; by rule if not given."""

    nprobe: int | None = None
    """Lists that a search reads; by rule if not given."""

    links: int | None = None
    """Edges of a node of an hnsw index; by rule if not given."""

    ef_construction: int | None = None
    """Candidates kept while an hnsw index is built; by rule if not given."""

    ef_search: int | None = None
    """Candidates kept while an hnsw index is searched; by rule if not given."""

    rerank: int | None = None
    """How many times more rows an ivfsq, ivfpq, rabitq or sq8 index takes by their codes than it answers; by rule if
    not given."""

    seed: int = 0
    """Of samples and of k-means."""

    json: bool = False
    """Print the result as JSON."""

    @property
    def is_planned(self) -> bool:
        """Whether anything is promised."""
        return any(value is not None for value in (self.recall, self.latency_ms, self.memory, self.texts, self.images))


def run(arguments: Arguments) -> None:
    """Build, after a plan if something is promised, then say what to ask."""
    from vlm.index.ann.index_type import TuningParams
    from vlm.index.build import build_index

    if arguments.is_planned:
        _build_autotuned(arguments)
        return
    numbers = {name: getattr(arguments, name) for name in _NUMBERS}
    tuning = TuningParams(seed=arguments.seed, **numbers)
    summary = build_index(arguments.embeddings, arguments.out, kind=arguments.kind, tuning=tuning)
    if arguments.json:
        show_json(asdict(summary))
    else:
        _show(summary, arguments)


def _build_autotuned(arguments: Arguments) -> None:
    """Build for a target, show plan and measurements, and fail if the target is missed."""
    from vlm.index.autotune.autotune_report import show_plan
    from vlm.index.autotune.trial import TuningTarget, parse_bytes
    from vlm.index.build import build_autotuned

    given = [name for name in _NUMBERS if getattr(arguments, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} is for the plan to find; leave it out, or leave the promises out.")
    target = TuningTarget(
        recall=0.95 if arguments.recall is None else arguments.recall,
        at=arguments.recall_at,
        latency_ms=arguments.latency_ms,
        memory_bytes=None if arguments.memory is None else parse_bytes(arguments.memory),
    )
    build = build_autotuned(
        arguments.embeddings,
        arguments.out,
        target,
        texts=arguments.texts,
        images=arguments.images,
        kind=arguments.kind,
        max_rows=arguments.plan_rows,
        seed=arguments.seed,
        on_plan=None if arguments.json else show_plan,
    )
    verification = asdict(build.verification)
    if arguments.json:
        measured = {"setting": build.search_params and asdict(build.search_params), "confirmed": verification}
        show_json(asdict(build.summary) | {"plan": build.plan.evidence} | measured)
    else:
        del verification["breaks"]
        show_fields(verification, title=f"The finished index, queried {build.plan.direction}")
        _show(build.summary, arguments)
    build.check_target()


def _show(summary: "BuildSummary", arguments: Arguments) -> None:
    show_fields(asdict(summary))
    logger.info(f'Next: vlm search {arguments.out} "what you look for"')
