"""Where the inputs of the terms come from: the batches, or models that make them while training."""

from collections.abc import Sequence

from vlm.errors import UsageError
from vlm.models.encoder import VisionLanguageModel
from vlm.models.loading import load_model
from vlm.train.averaging.running_mean import RunningMean
from vlm.train.config import TrainConfig
from vlm.train.inputs import Provider
from vlm.train.objectives.table import WeightedTerm
from vlm.train.student import Student
from vlm.train.teachers import AverageTeacher, LiveTeacher

_TEACHER = frozenset({"teacher_image", "teacher_text"})
_AVERAGE = frozenset({"global_target"})
_CURES = {
    "sub_tokens": "--sub-captions N, the sentences shown of each sample",
    "local_pixels": "--local-views N, the small crops of each picture",
    "teacher_image": "--teacher MODEL, or --arrays teacher_image teacher_text of shards made by vlm reinforce",
    "teacher_text": "--teacher MODEL, or --arrays teacher_image teacher_text of shards made by vlm reinforce",
    "text_embedding": "--arrays text_embedding of shards made by vlm reinforce --text-model",
}
_ALWAYS = frozenset({"pixels", "tokens", "rows", "same"})


def needs_average(config: TrainConfig, terms: Sequence[WeightedTerm]) -> bool:
    """Whether a running mean of the weights is kept.

    Raises:
        UsageError: a term learns from it, and it has no decay.
    """
    learns = any(_AVERAGE & set(part.term.inputs) for part in terms)
    if learns and not config.optimizer.average_decay:
        raise UsageError(
            f"objective = {config.objective.objective!r} learns from the running mean of the weights; give its decay, "
            "e.g. --average-decay 0.996."
        )
    return bool(config.optimizer.average_decay)


def open_providers(
    config: TrainConfig, model: VisionLanguageModel, terms: Sequence[WeightedTerm], average: RunningMean | None
) -> dict[str, Provider]:
    """Models that make inputs while training, by the inputs they make.

    Raises:
        UsageError: a teacher is named and no term learns from it, or there is no such model.
    """
    read = {name for part in terms for name in part.term.inputs}
    found: dict[str, Provider] = {}
    if config.objective.teacher:
        if not _TEACHER & read:
            raise UsageError(
                f"teacher = {config.objective.teacher!r}, but the objective {config.objective.objective!r} learns from "
                "none; add a term, e.g. 'clip + distill'."
            )
        teacher = LiveTeacher(load_model(config.objective.teacher, device=str(model.device)))
        found |= dict.fromkeys(_TEACHER & read, teacher)
    if average and _AVERAGE & read:
        if config.sharding == "fsdp":
            raise UsageError("local_to_global learns from the whole mean of the weights; leave out --sharding fsdp.")
        found |= dict.fromkeys(_AVERAGE, AverageTeacher(average.weights, model))
    return found


def check_inputs(
    config: TrainConfig, terms: Sequence[WeightedTerm], student: Student, providers: dict[str, Provider]
) -> None:
    """Refuse terms whose inputs nothing gives.

    Raises:
        UsageError: naming the input and what gives it.
    """
    if {part.name for part in terms} == {"local_to_global"}:
        raise UsageError(
            "objective = 'local_to_global' alone is least where all pictures are alike; add a term that tells them "
            "apart, e.g. 'clip + local_to_global'."
        )
    given = _ALWAYS | providers.keys() | set(config.loader.arrays)
    given |= {"sub_tokens"} if config.objective.sub_captions else set[str]()
    given |= {"local_pixels"} if config.objective.local_views else set[str]()
    wanted = {name for part in terms for name in part.term.inputs} | student.inputs
    for name in sorted(wanted - given):
        raise UsageError(f"objective = {config.objective.objective!r} needs {name}: give {_CURES.get(name, name)}.")
