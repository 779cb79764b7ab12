"""The effort of a finished index, set by all of its rows where the plan knew a sample of them."""

from copy import copy
from dataclasses import replace
from pathlib import Path

from vlm.console import say
from vlm.index.embeddings import Embeddings
from vlm.index.kinds import KINDS, settings_of
from vlm.index.kinds.searching import most_effort, set_effort
from vlm.index.planner.choice import Plan
from vlm.index.planner.recall import exact_scores, lower_bound, recall_of_each
from vlm.index.planner.tuning import Setting, settled
from vlm.index.read import Index
from vlm.index.search_plan import Selected, nearest
from vlm.index.segments import OpenSegment
from vlm.index.writer import IndexWriter


def settle(folder: Path, source: Embeddings, plan: Plan) -> Setting | None:
    """Give a new index of all rows of `source` the least effort that keeps the plan's promise, by its tuning questions.

    None, and nothing changes, if the kind has nothing to set, nothing it can be set to is enough, or so many answers
    are promised that a search compares all rows: by these any effort would do, and shorter answers need the plan's.
    """
    index = Index.open(folder)
    try:
        (selected,) = index.generation.selected
        start = _setting_of(selected.segment)
        if start.effort is None and not start.rerank:
            return None
        at, questions = plan.promise.at, plan.tuning_questions
        if selected.is_scanned(at):
            return None
        truth = exact_scores(source.blocks(), questions, at)

        def holds(setting: Setting) -> bool:
            scores, _ = nearest([_asked_with(selected, setting)], questions, at)
            return lower_bound(recall_of_each(scores, truth, at)) >= plan.promise.recall

        found = settled(start, holds, most=most_effort(selected.segment.index))
    finally:
        index.close()
    if found is not None and found != start:
        told, planned = (_in_words(plan.kind, setting) for setting in (found, start))
        say(f"Measured on all {len(source):,} rows: {told}; the plan had {planned}.")
        with IndexWriter(folder) as writer:
            writer.set_search(effort=found.effort, rerank=found.rerank)
    return found


def _setting_of(segment: OpenSegment) -> Setting:
    name = KINDS[segment.described.kind].effort
    effort = segment.described.parameters[name] if name else None
    return Setting(effort=effort, rerank=segment.described.rerank)


def _asked_with(selected: Selected, setting: Setting) -> Selected:
    """The same segment, searched with a setting."""
    segment = copy(selected.segment)
    described = segment.described
    told = settings_of(described.kind, effort=setting.effort, rerank=0)
    segment.described = replace(described, rerank=setting.rerank, parameters=described.parameters | told)
    if setting.effort is not None:
        set_effort(segment.index, setting.effort)
    return Selected(segment)


def _in_words(kind: str, setting: Setting) -> str:
    told = settings_of(kind, effort=setting.effort, rerank=setting.rerank)
    return ", ".join(f"{name} {value}" for name, value in told.items())
