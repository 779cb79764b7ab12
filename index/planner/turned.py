"""The other way round: rows of the questions' modality, asked with rows held out of the index."""

from vlm.errors import UsageError
from vlm.index.planner.drawing import DrawnRows, Questions
from vlm.index.planner.ladder import Rung
from vlm.index.planner.trial import Built, Turned
from vlm.index.planner.tuning import Setting


def turn(rung: Rung, setting: Setting, rows: DrawnRows, questions: Questions, at: int, *, seed: int) -> Turned | None:
    """Build and ask; None if the kind needs more rows."""
    try:
        built = Built(rung, rows, seed=seed)
    except UsageError:
        return None
    effort = None if setting.effort is None or built.most is None else min(setting.effort, built.most)
    tried = Setting(effort=effort, rerank=setting.rerank if built.is_reranked else 0)
    recalls = built.judge(tried, [questions], at)[questions.direction]
    return Turned(
        rows=len(rows),
        recall={count: float(each.mean()) for count, each in recalls.items()},
        latency=built.time(tried, questions.vectors, at),
    )
