"""Build a FAISS index with its catalogue from embeddings."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import say, show_fields, show_json
from vlm.errors import UsageError, VlmError

if TYPE_CHECKING:
    from vlm.index.autotune.autotuner import Plan
    from vlm.index.build import BuildSummary

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
        _build_planned(arguments)
        return
    numbers = {name: getattr(arguments, name) for name in _NUMBERS}
    tuning = TuningParams(seed=arguments.seed, **numbers)
    summary = build_index(arguments.embeddings, arguments.out, kind=arguments.kind, tuning=tuning)
    if arguments.json:
        show_json(asdict(summary))
    else:
        _show(summary, arguments)


def _build_planned(arguments: Arguments) -> None:
    """Plan, build, leave the plot in the folder, then set and measure the finished index."""
    from vlm.index.ann.index_types import search_params_dict
    from vlm.index.autotune.autotune_report import PLOT, draw_plan, show_plan
    from vlm.index.autotune.autotuner import retune, verify_plan
    from vlm.index.build import build_index
    from vlm.index.embeddings import Embeddings
    from vlm.index.reader import Index

    plan = _plan(arguments)
    if not arguments.json:
        show_plan(plan)
    summary = build_index(
        arguments.embeddings, arguments.out, kind=plan.kind, tuning=plan.tuning, evidence=plan.evidence
    )
    draw_plan(plan, arguments.out / PLOT)
    source = Embeddings.open(arguments.embeddings)
    setting = retune(arguments.out, source, plan)
    if setting:
        told = search_params_dict(plan.kind, effort=setting.effort, rerank=setting.rerank)
        summary = replace(summary, parameters=summary.parameters | told)
    index = Index.open(arguments.out)
    found = verify_plan(index, source, plan)
    index.close()
    if arguments.json:
        measured = {"setting": setting and asdict(setting), "confirmed": asdict(found)}
        show_json(asdict(summary) | {"plan": plan.evidence} | measured)
    else:
        facts = {name: value for name, value in asdict(found).items() if name != "breaks"}
        show_fields(facts, title=f"The finished index, asked {plan.direction}")
        _show(summary, arguments)
    if found.breaks:
        raise VlmError(
            f"{arguments.out} is whole, but does not keep the promise: {' and '.join(found.breaks)}. The sample misled "
            "the plan: remove the folder and build with more --plan-rows, or promise less."
        )


def _plan(arguments: Arguments) -> "Plan":
    from vlm.files import check_not_exists
    from vlm.index.autotune.autotuner import autotune
    from vlm.index.autotune.trial import TuningTarget, parse_bytes
    from vlm.index.embeddings import Embeddings

    given = [name for name in _NUMBERS if getattr(arguments, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} is for the plan to find; leave it out, or leave the promises out.")
    check_not_exists(arguments.out)
    promise = TuningTarget(
        recall=0.95 if arguments.recall is None else arguments.recall,
        at=arguments.recall_at,
        latency_ms=arguments.latency_ms,
        memory_bytes=None if arguments.memory is None else parse_bytes(arguments.memory),
    )
    return autotune(
        Embeddings.open(arguments.embeddings),
        Embeddings.open(arguments.texts) if arguments.texts else None,
        promise,
        images=Embeddings.open(arguments.images) if arguments.images else None,
        kinds=() if arguments.kind == "auto" else (arguments.kind,),
        max_rows=arguments.plan_rows,
        seed=arguments.seed,
    )


def _show(summary: "BuildSummary", arguments: Arguments) -> None:
    show_fields(asdict(summary))
    say(f'Next: vlm search {arguments.out} "what you look for"')
