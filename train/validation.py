"""What a run measures while it trains: opened with the run, every so many steps, shared by all its processes.

Each process embeds its share of the batches of images and texts, and all get the whole. Batches are the same whatever
the number of processes, and ranks do not depend on how they are computed (`vlm.evaluation.rank_counts`), so that the
figures are bit for bit those of one process.
"""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlm.console import without_progress
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, Part, PixelMemory
from vlm.evaluation.retrieval import Retrieval
from vlm.evaluation.suite import FailedEvaluation, OpenSets, measure_model, read_suite
from vlm.models.model import VisionLanguageModel
from vlm.train.distributed import gather_objects, num_processes, process_rank
from vlm.train.feature_cache import LockedFeatures, evaluated_paths, keep_evaluated_features
from vlm.train.run_config import TrainConfig

logger = logging.getLogger(__name__)

# of a process: 5,000 images of 256 px; more are read again each time
_PIXEL_BYTES = 1 << 30
_LARGEST_SHARE = 0.02
_CAPTIONED_IMAGES = 64
OTHER = "other/"
"""Before the names of what is measured on other data."""


class TrainingProcesses:
    """The processes of a run, for features that they compute together."""

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return process_rank()

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return num_processes()

    def gather(self, parts: list[Part]) -> list[Part]:
        """The parts of all."""
        return gather_objects(parts)


@dataclass(kw_only=True, eq=False)
class StepModel(VisionLanguageModel):
    """A model while it trains. Its identity is its step: that of its weights would have to be computed each time."""

    step: int = 0

    @classmethod
    def at_step(cls, model: VisionLanguageModel, step: int) -> "StepModel":
        """With the network of the model itself."""
        values: dict[str, Any] = {}
        for entry in fields(model):
            # what a model computes of itself is no argument
            if entry.init:
                values[entry.name] = getattr(model, entry.name)
        return cls(**values, step=step)

    @property
    def fingerprint(self) -> str:
        """The step."""
        return f"step {self.step}"


@dataclass(kw_only=True)
class Validation:
    """What is measured: retrieval on a set and on other data, the evaluators of a suite; pixels are kept for the next
    time, and so is what locked trunks give, in files where features are cached."""

    retrieval: Retrieval | None = None
    data: EvaluationSet | None = None
    other: EvaluationSet | None = None
    suite: OpenSets | None = None
    pixels: PixelMemory = field(default_factory=lambda: PixelMemory(max_bytes=_PIXEL_BYTES))
    trunks: tuple[LockedFeatures, ...] = ()

    def measure(self, model: VisionLanguageModel, step: int) -> dict[str, float]:
        """Values by name, those of a suite behind set and evaluator (`cifar10/zero-shot/top1`); all processes call it,
        and all get the same.

        Raises:
            VlmError: the model has diverged, or the suite measures nothing.
        """
        evaluated = EvaluatedModel(StepModel.at_step(model, step), sharing=TrainingProcesses(), pixels=self.pixels)
        values: dict[str, float] = {}
        # bars of its own would break the run's
        with without_progress():
            if self.retrieval and self.data:
                values |= self._retrieve(evaluated, self.retrieval, self.data, step)
            if self.retrieval and self.other:
                result, _ = self.retrieval.measure(evaluated, self.other)
                values |= {OTHER + name: value for name, value in result.metrics().items()}
            if self.suite:
                values |= _run_suite(evaluated, self.suite, step)
        # several processes have a share each, and would write it over one another's
        if num_processes() == 1:
            for trunk in self.trunks:
                trunk.save()
        return values

    def check_captions(self, model: VisionLanguageModel) -> int | None:
        """How many different captions a trained captioner writes for the first images; warns where they are the same.

        None where there are no images to caption.
        """
        if self.data is None or not model.can_caption:
            return None
        # here, since most models write no captions, and their metrics take time to load
        from vlm.evaluation.caption_evaluator import sameness

        data = self.data.select(range(min(len(self.data), _CAPTIONED_IMAGES)))
        captions: list[str] = []
        for batch in data.iter_images(model.view):
            images: Any = batch.images
            captions += model.caption_images(images)
        logger.info(f"The captioner writes {len(set(captions)):,} different captions for {len(captions):,} images.")
        if warning := sameness(captions):
            logger.warning(warning)
        return len(set(captions))

    def _retrieve(
        self, model: EvaluatedModel, retrieval: Retrieval, data: EvaluationSet, step: int
    ) -> dict[str, float]:
        result, warnings = retrieval.measure(model, data)
        # all have the same figures, and one says them
        if process_rank() == 0:
            for warning in warnings:
                logger.warning(warning)
            _log_retrieval(result.metrics(), step, result.num_images)
        return result.metrics()


def open_validation(config: TrainConfig) -> Validation:
    """What the configuration asks for; errors in it come now rather than at the first evaluation.

    Raises:
        UsageError: the shards do not exist, or hold no sample that can be used; or there is no such suite, or a set of
            it is not there.
    """
    validation = Validation()
    if config.val:
        validation.data = open_evaluation_set(config.val, limit=config.val_limit)
    if config.val_other:
        validation.other = open_evaluation_set(config.val_other, limit=config.val_limit)
    if config.val or config.val_other:
        validation.retrieval = Retrieval(languages=config.loader.languages, captions_each=config.val_captions_each)
    if config.val_suite:
        validation.suite = OpenSets(suite=read_suite(config.val_suite), root=Path(config.val_suite_root))
        # a table of results marks a set that is absent, a run of days would not
        for absent in validation.suite.absent.values():
            raise UsageError(
                f"--val-suite {config.val_suite}: {absent.name} is left out ({absent.reason}). Fetch it, name the "
                "folder of the data by --val-suite-root, or a suite without it."
            )
    return validation


def keep_features(validation: Validation, config: TrainConfig, model: VisionLanguageModel) -> None:
    """Let locked trunks run once for each image and text that is evaluated; once for all runs that share a folder."""
    folder = Path(config.loader.feature_folder or Path(config.run) / "features")
    paths = evaluated_paths(folder, model) if config.loader.cache_features else {}
    validation.trunks = tuple(keep_evaluated_features(model.network, paths))


def _run_suite(model: EvaluatedModel, sets: OpenSets, step: int) -> dict[str, float]:
    values: dict[str, float] = {}
    for measurement in measure_model(model, sets):
        if isinstance(measurement, FailedEvaluation):
            # said by the suite
            continue
        prefix = f"{measurement.data}/{measurement.evaluator}"
        for name, value in measurement.values.items():
            values[f"{prefix}/{name}"] = value.value
        if process_rank() == 0 and measurement.values:
            main, value = next(iter(measurement.values.items()))
            logger.info(f"step {step:,}: {prefix} {main} {value.value:.4g}")
    return values


def _log_retrieval(metrics: dict[str, float], step: int, num_images: int) -> None:
    logger.info(
        f"step {step:,}: text→image recall@1 {metrics['text_to_image_recall@1']:.1%} "
        f"@10 {metrics['text_to_image_recall@10']:.1%}, image→text @1 {metrics['image_to_text_recall@1']:.1%} "
        f"@10 {metrics['image_to_text_recall@10']:.1%} ({num_images:,} images)"
    )


@dataclass(kw_only=True)
class EvaluationClock:
    """How much of a run's time its evaluations take.

    budget: the share of the time that they may take in all; 0 only says so once where it is above 2%.
    """

    evaluate_every: int
    budget: float = 0.0
    started: float = 0.0
    is_main: bool = True
    _spent: float = 0.0
    _last_seconds: float = 0.0
    _last_end: float | None = None
    _has_warned: bool = False

    def allows(self, now: float) -> bool:
        """Whether one more evaluation, if it takes as long as the last one, is within the budget at this time.

        The first one always is, since it tells how long they take.
        """
        if not self.budget or self._last_end is None:
            return True
        expected = self._last_seconds
        # the share after it: its own seconds count as spent and as time of the run
        is_within = self._spent + expected <= self.budget * (now + expected - self.started)
        if not is_within and not self._has_warned and self.is_main:
            self._has_warned = True
            logger.info(
                f"An evaluation takes {expected:,.1f} s: it waits for a later multiple of {self.evaluate_every:,} "
                f"steps, so that evaluations stay within {self.budget:.1%} of the time (--evaluate-budget)."
            )
        return is_within

    def add(self, began: float, ended: float) -> None:
        """One more evaluation, from one time in seconds to another."""
        self._last_seconds = ended - began
        self._spent += self._last_seconds
        # the first is not judged: it reads the images, which are then kept
        if self._last_end is not None and not self.budget:
            self._judge(self._last_seconds / max(ended - self._last_end, 1e-9))
        self._last_end = ended

    def _judge(self, share: float) -> None:
        if share > _LARGEST_SHARE and self.is_main and not self._has_warned:
            self._has_warned = True
            cadence = round(self.evaluate_every * share / _LARGEST_SHARE, -1)
            logger.warning(
                f"Evaluating takes {share:.0%} of the time of the run ({self._last_seconds:,.1f} s every "
                f"{self.evaluate_every:,} steps): --evaluate-every {cadence:,.0f} would make it "
                f"{_LARGEST_SHARE:.0%}, --evaluate-budget {_LARGEST_SHARE} keeps it there, and --val-limit evaluates "
                "on fewer images."
            )
