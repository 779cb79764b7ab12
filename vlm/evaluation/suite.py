"""Suites: a TOML file that names sets, evaluators and their settings; what is measured of a model by one.

    title = "Objects and products"

    [data.cifar10]
    path = "cifar10/cifar10.tar"
    folder = "test"

    [[evaluate]]
    evaluator = "zero-shot"
    data = "cifar10"
    templates = ["openai"]

`[data.NAME]` is a `SuiteData`. An entry of `evaluate` names an evaluator of `EVALUATORS` and one set or several; its
other keys are the fields of the evaluator. Those that are sets themselves (training images) name one of these; one that
is an evaluator (whose robustness is measured) is its name, or a table of its name and its fields. `[[average]]` names a
mean over sets (`SuiteAverage`), which is reported as one
figure (BASIC's accuracy under five shifts).
"""

import importlib
import importlib.resources
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from vlm.config import from_values, read_toml, suggest
from vlm.data.pack import PackConfig, held_out_split
from vlm.data.shards import expand_shards
from vlm.data.sources.caption_files import SCENES
from vlm.data.sources.source import SceneOptions, SourceKind, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.errors import UsageError, VlmError
from vlm.evaluation.class_vectors import CLASS_NAMES_FILE
from vlm.evaluation.comparison import Comparison, ModelMeasurements, compare
from vlm.evaluation.evaluation_set import CLS_LABEL, NPY_LABEL, EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Evaluator, Measurement, Value
from vlm.files import compute_fingerprint, write_text
from vlm.results import Result
from vlm.storage import is_remote

logger = logging.getLogger(__name__)


DATASET_TYPE_FILE = "dataset_type.txt"
_LABELS_OF_TYPES = {"classification": CLS_LABEL, "multilabel": NPY_LABEL, "retrieval": ""}


@dataclass(frozen=True, kw_only=True)
class SuiteData:
    """The table `[data.NAME]` of a suite.

    path: below the folder of the user's data: shards, or anything `vlm pack` reads; `scenes` is drawn on the spot.
    layout: `clip-benchmark` is a folder with `classnames.txt`, `dataset_type.txt` and a folder of tars for each split.
    kind, folder, image_column, caption_column, captions: as of `vlm pack`. label, class_names, caption_lines, limit:
        as of `open_evaluation_set`.
    hold_out: only the pairs that `vlm pack --hold-out` of this number would hold out.
    hub: a data set of the Hugging Face Hub that is this set in this layout. fetch: else how to get it.
    not_evaluated: of a set that is named only to say so: why no evaluator takes it.
    """

    path: str
    layout: Literal["", "clip-benchmark"] = ""
    split: str = "test"
    kind: SourceKind | None = None
    folder: str = ""
    image_column: str | None = None
    caption_column: str | None = None
    captions: Literal["", "none", "optional"] = ""
    caption_lines: bool = False
    label: str = ""
    class_names: tuple[str, ...] = ()
    hold_out: int = 0
    limit: int = 0
    scenes: SceneOptions = field(default_factory=lambda: SceneOptions(split="val"))
    hub: str = ""
    fetch: str = ""
    not_evaluated: str = ""

    def address(self, root: Path) -> str:
        """Where it lies."""
        is_elsewhere = self.path == SCENES or is_remote(self.path)
        path = self.path if is_elsewhere else str(root.expanduser() / self.path)
        return f"{path}/{self.split}" if self.layout else path

    def how_to_fetch(self, root: Path) -> str:
        """What the user does to have it."""
        target = root / self.path
        if self.hub:
            return f"hf download {self.hub} --repo-type dataset --local-dir {target}"
        return self.fetch or f"put it at {target}"


@dataclass(frozen=True, kw_only=True)
class AbsentData:
    """A set that is left out. reason: why. fetch: how to get what is not there; empty where that would not help."""

    name: str
    reason: str
    fetch: str = ""


def find_absent(name: str, data: SuiteData, root: Path) -> AbsentData | None:
    """The set as one that is left out, None if it is there."""
    if data.not_evaluated:
        return AbsentData(name=name, reason=data.not_evaluated)
    address = data.address(root)
    if address == SCENES or is_remote(address):
        return None
    path = Path(address)
    is_there = path.is_file() or (path.is_dir() and any(path.iterdir()))
    # a pattern of shards such as {000..041}.tar is no path of its own
    if not is_there and not path.exists():
        try:
            is_there = bool(expand_shards(address))
        except UsageError:
            is_there = False
    return None if is_there else AbsentData(name=name, reason=f"not at {address}", fetch=data.how_to_fetch(root))


def open_suite_data(name: str, data: SuiteData, root: Path, *, cache: Path | None = None) -> EvaluationSet:
    """A set of a suite that is there.

    cache: folder in which is kept which pairs are held out, for which all images have to be decoded.

    Raises:
        UsageError: it cannot be read so, or lacks the label.
    """
    address = data.address(root)
    options = SourceOptions(
        kind=data.kind,
        folder=data.folder,
        image_column=data.image_column,
        caption_column=data.caption_column,
        captions=data.captions,
        scenes=data.scenes,
    )
    label = data.label
    caption_lines = data.caption_lines
    if data.layout:
        label, caption_lines = _clip_benchmark_labels(Path(address), data)
    # without options of its own an address may be shards, which are read in place instead of as a source
    is_plain = data.path != SCENES and options == SourceOptions(scenes=data.scenes)
    opened = open_evaluation_set(
        address,
        name=name,
        label=label,
        class_names=data.class_names,
        options=None if is_plain else options,
        caption_lines=caption_lines,
    )
    if data.hold_out:
        opened = _held_out(opened, data.hold_out, address, options, cache)
    return opened.select(range(data.limit)) if 0 < data.limit < len(opened) else opened


def _clip_benchmark_labels(split: Path, data: SuiteData) -> tuple[str, bool]:
    """The label of a set in CLIP_benchmark's layout, and whether each line of a text is a caption.

    Raises:
        UsageError: its type is not known.
    """
    type_file = split.parent / DATASET_TYPE_FILE
    # the file may be missing, and then it is classification
    kind = type_file.read_text(encoding="utf-8").strip().lower() if type_file.is_file() else "classification"
    if kind not in _LABELS_OF_TYPES:
        raise UsageError(f"{type_file} says {kind!r}; {suggest(kind, list(_LABELS_OF_TYPES))}")
    label = data.label or _LABELS_OF_TYPES[kind]
    if label == CLS_LABEL and not data.class_names and not (split.parent / CLASS_NAMES_FILE).is_file():
        logger.warning(f"{split.parent} has no {CLASS_NAMES_FILE}, so that its classes have numbers for names.")
    return label, kind == "retrieval" or data.caption_lines


def _held_out(
    opened: EvaluationSet, number: int, address: str, options: SourceOptions, cache: Path | None
) -> EvaluationSet:
    # named by the content: another version of the data must not be split by this one's list
    key = compute_fingerprint(opened.digest, str(number))
    kept = cache / f"held-out-{key}.json" if cache else None
    if kept is not None and kept.is_file():
        numbers = json.loads(kept.read_text(encoding="utf-8"))
    else:
        split = held_out_split(open_source(address, options), PackConfig(hold_out=number))
        numbers = sorted(split.numbers)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(numbers))
    return opened.select(np.flatnonzero(np.isin(opened.images.numbers, numbers)))


@dataclass(frozen=True, kw_only=True)
class SuiteAverage:
    """A mean over sets: of one value of one evaluator, by its name. value: empty takes each measurement's first."""

    name: str
    evaluator: str
    data: tuple[str, ...]
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class AverageFigure:
    """A mean of a model; None, with the sets that were not measured, where any is missing.

    value: with a 95% interval if each set has one; sets are independent of each other, so half its width is the root of
    the summed squares of theirs, divided by their number.
    """

    name: str
    model: str
    value: Value | None
    missing: tuple[str, ...] = ()


def read_averages(listed: Any, data: Sequence[str], evaluators: Sequence[str], where: str) -> tuple[SuiteAverage, ...]:
    """The tables [[average]] of a suite.

    Raises:
        UsageError: a key does not fit, a set or an evaluator is not the suite's, or there is one set only.
    """
    averages: list[SuiteAverage] = []
    for number, table in enumerate(listed if isinstance(listed, list) else [listed], 1):
        place = f"{where}, average {number}"
        if not isinstance(table, dict):
            raise UsageError(f"{place} is {table!r}; write a table [[average]] with name, evaluator and data.")
        average = from_values(SuiteAverage, table, where=place)
        for name in average.data:
            if name not in data:
                raise UsageError(f"{place}: there is no data {name!r}; {suggest(name, list(data))}")
        if average.evaluator not in evaluators:
            raise UsageError(
                f"{place}: no entry evaluates by {average.evaluator!r}; {suggest(average.evaluator, list(evaluators))}"
            )
        # a set named twice would count twice in the mean, and its variance as if independent
        if len(set(average.data)) < max(2, len(average.data)):
            raise UsageError(f"{place}: data = {list(average.data)} is no list of at least two different sets.")
        averages.append(average)
    return tuple(averages)


def average_figures(averages: Sequence[SuiteAverage], models: Sequence[ModelMeasurements]) -> tuple[AverageFigure, ...]:
    """Each mean of each model.

    Raises:
        UsageError: a measurement has no value of the name that a mean is of.
    """
    figures: list[AverageFigure] = []
    for average in averages:
        for model in models:
            values: dict[str, Value] = {}
            for name in average.data:
                measurement = model.find(average.evaluator, name)
                if measurement is not None:
                    values[name] = _value_of(measurement.values, average)
            # a mean over fewer sets is another figure, so it is not given at all
            missing = tuple(name for name in average.data if name not in values)
            mean = None if missing else _mean(list(values.values()))
            figures.append(AverageFigure(name=average.name, model=model.model, value=mean, missing=missing))
    return tuple(figures)


def _value_of(values: Mapping[str, Value], average: SuiteAverage) -> Value:
    name = average.value or next(iter(values))
    if name not in values:
        raise UsageError(
            f"average {average.name!r}: {average.evaluator} has no value {name!r}; {suggest(name, list(values))}"
        )
    return values[name]


def _mean(values: Sequence[Value]) -> Value:
    mean = math.fsum(value.value for value in values) / len(values)
    squares: list[float] = []
    for value in values:
        # an interval that leaves out one set's uncertainty would look too narrow
        if value.low is None or value.high is None:
            return Value(value=mean)
        # half the width is proportional to the standard error, and variances of independent sets add up
        squares.append(((value.high - value.low) / 2) ** 2)
    half_width = math.sqrt(math.fsum(squares)) / len(values)
    return Value(value=mean, low=mean - half_width, high=mean + half_width)


EVALUATORS = {
    "zero-shot": "vlm.evaluation.zero_shot:ZeroShotClassification",
    "rejection": "vlm.evaluation.reject_evaluator:Rejection",
    "retrieval": "vlm.evaluation.retrieval:Retrieval",
    "captions": "vlm.evaluation.caption_evaluator:CaptionMetrics",
    "scene-captions": "vlm.evaluation.caption_evaluator:CaptionAccuracy",
    "linear-probe": "vlm.evaluation.linear_probe:LinearProbe",
    "nearest-neighbours": "vlm.evaluation.few_shot:NearestNeighbours",
    "nearest-class-mean": "vlm.evaluation.few_shot:NearestClassMean",
    "few-shot": "vlm.evaluation.few_shot:FewShot",
    "robustness": "vlm.evaluation.robustness:Robustness",
    "sentence-pairs": "vlm.evaluation.sentence_pairs:SentencePairs",
}
"""The evaluators by the name that suites give them: module and class. They are imported when they are used."""

_OF_CAPTIONERS = frozenset({"captions", "scene-captions"})

_KEYS = ("title", "data", "evaluate", "average")


@dataclass(frozen=True, kw_only=True)
class SuiteEntry:
    """One evaluator of a suite. data: the sets it is run on. main: the value that stands for all, shown first."""

    evaluator: str
    data: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    main: str = ""

    def build(self, sets: Mapping[str, EvaluationSet]) -> Evaluator:
        """The evaluator, with the sets it names among its settings.

        Raises:
            UsageError: a setting does not fit.
        """
        # sets and inner evaluators are named in the TOML and become objects only now, when the data is open
        evaluator_type = evaluator_class(self.evaluator)
        values = dict(self.settings)
        for name in _set_fields(evaluator_type):
            if isinstance(values.get(name), str):
                values[name] = sets[values[name]]
        for name, value in values.items():
            if isinstance(value, SuiteEntry):
                values[name] = value.build(sets)
        return evaluator_type(**values)

    @property
    def needs_network(self) -> bool:
        """Whether it reads more of a model than unit vectors: captions, or features before the projection."""
        layer = self.settings.get("layer", getattr(evaluator_class(self.evaluator), "layer", ""))
        # robustness reads of a model what the evaluator inside it reads
        is_inner = any(isinstance(value, SuiteEntry) and value.needs_network for value in self.settings.values())
        return self.evaluator in _OF_CAPTIONERS or layer == "pooled" or is_inner

    def named_sets(self) -> list[str]:
        """The sets among its settings."""
        names = [self.settings.get(name) for name in _set_fields(evaluator_class(self.evaluator))]
        for value in self.settings.values():
            names += value.named_sets() if isinstance(value, SuiteEntry) else []
        return [name for name in names if isinstance(name, str)]

    def needed_sets(self) -> list[str]:
        """The sets among its settings, and those that it is run on."""
        return [*self.named_sets(), *self.data]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Sets by name, and the evaluators in the order in which they run."""

    name: str
    title: str
    data: dict[str, SuiteData]
    entries: tuple[SuiteEntry, ...]
    averages: tuple[SuiteAverage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FailedEvaluation:
    """An evaluator that could not measure a model on a set, and why."""

    model: str
    evaluator: str
    data: str
    error: str


@dataclass(kw_only=True)
class OpenSets:
    """The sets of a suite below a folder, each opened once. absent: those that are not there, by name."""

    suite: Suite
    root: Path
    cache: Path | None = None
    absent: dict[str, AbsentData] = field(default_factory=dict)
    _open: dict[str, EvaluationSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, data in self.suite.data.items():
            if absent := find_absent(name, data, self.root):
                self.absent[name] = absent

    def get(self, name: str) -> EvaluationSet:
        """A set that is there; raises as `open_suite_data`."""
        if name not in self._open:
            self._open[name] = open_suite_data(name, self.suite.data[name], self.root, cache=self.cache)
        return self._open[name]

    @property
    def opened(self) -> dict[str, EvaluationSet]:
        """Those that have been opened."""
        return dict(self._open)


def suite_names() -> list[str]:
    """The suites that come with the package."""
    folder = importlib.resources.files("vlm.evaluation").joinpath("suites")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_suite(name_or_file: str) -> Suite:
    """A suite of the package by its name, or of a file.

    Raises:
        UsageError: there is neither, the file is not TOML, a key is unknown, or a value does not fit.
    """
    # a name of the package wins over a file of the same name: write ./NAME for the file
    if name_or_file in suite_names():
        folder = importlib.resources.files("vlm.evaluation").joinpath("suites")
        with importlib.resources.as_file(folder.joinpath(f"{name_or_file}.toml")) as path:
            return parse_suite(read_toml(path), name_or_file)
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise UsageError(
            f"There is no suite {name_or_file!r}: no such file, and {suggest(name_or_file, suite_names())}"
        )
    return parse_suite(read_toml(path), path.stem)


def parse_suite(values: dict[str, Any], name: str) -> Suite:
    """A suite from the values of its TOML; raises as `read_suite`."""
    where = f"Suite {name}"
    for key in values:
        if key not in _KEYS:
            raise UsageError(f"{where}: unknown key {key!r}; {suggest(key, list(_KEYS))}")
    data: dict[str, SuiteData] = {}
    for set_name, table in _table(values.get("data", {}), f"{where}: data").items():
        data[set_name] = from_values(SuiteData, _table(table, f"{where}: data"), where=f"{where}, data {set_name!r}")
    entries: list[SuiteEntry] = []
    listed = values.get("evaluate", [])
    for number, table in enumerate(listed if isinstance(listed, list) else [listed], 1):
        entries.append(_entry(_table(table, f"{where}: evaluate"), data, f"{where}, evaluate {number}"))
    if not entries:
        raise UsageError(f"{where} evaluates nothing; it needs tables [data.NAME] and [[evaluate]].")
    evaluators = [entry.evaluator for entry in entries]
    averages = read_averages(values.get("average", []), list(data), evaluators, where)
    title = str(values.get("title", name))
    return Suite(name=name, title=title, data=data, entries=tuple(entries), averages=averages)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds {value!r}; a table is needed: [data.NAME] or [[evaluate]].")
    return value


def _entry(values: dict[str, Any], data: Mapping[str, SuiteData], where: str) -> SuiteEntry:
    settings = dict(values)
    evaluator = str(settings.pop("evaluator", ""))
    names = settings.pop("data", ())
    main = str(settings.pop("main", ""))
    names = [names] if isinstance(names, str) else list(names)
    settings = _settings(evaluator, settings, data, where)
    for name in names:
        _check_set(name, data, where)
    if not names:
        raise UsageError(f"{where} names no data; give data = NAME or a list of them.")
    return SuiteEntry(evaluator=evaluator, data=tuple(names), settings=settings, main=main)


def _settings(evaluator: str, values: Mapping[str, Any], data: Mapping[str, SuiteData], where: str) -> dict[str, Any]:
    """The fields of an evaluator, checked: sets by their names, evaluators as entries of their own."""
    evaluator_type = evaluator_class(evaluator, where)
    set_fields = _set_fields(evaluator_type)
    hints = get_type_hints(evaluator_type)
    known = [field.name for field in fields(evaluator_type)]
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; {suggest(key, ['evaluator', 'data', 'main', *known])}")
        if key in set_fields:
            _check_set(value, data, where)
            settings[key] = value
        # an evaluator within another is checked like an entry, but it gets its data from the outer one
        elif hints[key] is Evaluator:
            inner = {"evaluator": value} if isinstance(value, str) else dict(_table(value, f"{where}: {key}"))
            name = str(inner.pop("evaluator", ""))
            settings[key] = SuiteEntry(
                evaluator=name, data=(), settings=_settings(name, inner, data, f"{where}, {key}")
            )
        else:
            settings[key] = _checked(hints[key], value, f"{where}: {key}")
    return settings


def _check_set(name: Any, data: Mapping[str, SuiteData], where: str) -> None:
    if name not in data:
        raise UsageError(f"{where}: there is no data {name!r}; {suggest(str(name), list(data))}")


def _checked(hint: Any, value: Any, where: str) -> Any:
    # imported here: it is slow to load, and most evaluations name no suite
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticUserError as error:
        raise UsageError(f"{where} is an object of Python, which no suite can name.") from error
    except ValidationError as error:
        raise UsageError(f"{where} = {value!r} does not fit: {error.errors()[0]['msg']}.") from error


def evaluator_class(name: str, where: str = "evaluators") -> Any:
    """The class of an evaluator by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in EVALUATORS:
        raise UsageError(f"{where}: there is no evaluator {name!r}; {suggest(name, list(EVALUATORS))}")
    module, _, attribute = EVALUATORS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _set_fields(evaluator_type: Any) -> list[str]:
    """The fields of an evaluator that are sets."""
    names: list[str] = []
    for name, hint in get_type_hints(evaluator_type).items():
        if EvaluationSet in (hint, *get_args(hint)):
            names.append(name)
    return names


@dataclass(frozen=True, kw_only=True)
class SuiteEvaluation(Result):
    """What a suite says of one or several models: their measurements side by side, and what is missing and why."""

    suite: str
    title: str
    comparison: Comparison
    absent: tuple[AbsentData, ...] = ()
    failed: tuple[FailedEvaluation, ...] = ()
    averages: tuple[AverageFigure, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the samples."""
        absent = [asdict(entry) for entry in self.absent]
        failed = [asdict(entry) for entry in self.failed]
        averages = [asdict(entry) for entry in self.averages]
        names = {"suite": self.suite, "title": self.title}
        return names | self.comparison.to_json() | {"averages": averages, "absent": absent, "failed": failed}


def evaluate_models(models: Iterable[EvaluatedModel], sets: OpenSets, *, seed: int = 0) -> SuiteEvaluation:
    """Each model by the whole suite, one after the other; the first is the baseline of the others.

    models: may be loaded as they are asked for. seed: of the resampling for intervals.

    Raises:
        UsageError: no set of the suite is there, or two models have the same name.
        VlmError: nothing at all could be measured.
    """
    # nothing could be measured at all: said before a model is loaded
    runnable = [entry for entry in sets.suite.entries if sets.absent.keys().isdisjoint(entry.needed_sets())]
    if not runnable:
        first = next(iter(sets.absent.values()))
        raise UsageError(
            f"No set of the suite {sets.suite.name} is below {sets.root} ({first.name}: {first.reason}). Name "
            f"the folder of the data by --data-root, or fetch it: {first.fetch}"
        )
    measured: list[ModelMeasurements] = []
    failed: list[FailedEvaluation] = []
    for model in models:
        measurements: list[Measurement] = []
        for outcome in measure_model(model, sets):
            if isinstance(outcome, FailedEvaluation):
                failed.append(outcome)
            else:
                measurements.append(outcome)
        measured.append(
            ModelMeasurements(model=model.name, fingerprint=model.fingerprint, measurements=tuple(measurements))
        )
        # let go of before the next one is loaded
        del model
    if not any(model.measurements for model in measured):
        raise VlmError(f"Nothing could be measured: {failed[0].evaluator} on {failed[0].data}: {failed[0].error}")
    return SuiteEvaluation(
        suite=sets.suite.name,
        title=sets.suite.title,
        comparison=compare(measured, rng=np.random.default_rng(seed)),
        absent=tuple(sets.absent.values()),
        failed=tuple(failed),
        averages=average_figures(sets.suite.averages, measured),
    )


def measure_model(model: EvaluatedModel, sets: OpenSets) -> Iterator[Measurement | FailedEvaluation]:
    """What a suite says of a model: a measurement for each evaluator and set that is there, as soon as it is made.

    An evaluator that fails is named and ends no other. Raises VlmError where the model itself has diverged.
    """
    for entry in sets.suite.entries:
        for name in entry.data:
            needed = [name, *entry.named_sets()]
            if any(other in sets.absent for other in needed):
                continue
            logger.info(f"{model.name}: {entry.evaluator} on {name}")
            try:
                evaluator = entry.build({other: sets.get(other) for other in needed[1:]})
                yield _main_first(evaluator.run(model, sets.get(name)), entry.main)
            # hours of other measurements must not be lost to one set that cannot be read
            except VlmError as error:
                logger.warning(f"{entry.evaluator} on {name}: {error}")
                yield FailedEvaluation(model=model.name, evaluator=entry.evaluator, data=name, error=str(error))


def _main_first(measurement: Measurement, main: str) -> Measurement:
    if not main:
        return measurement
    if main not in measurement.values:
        raise UsageError(
            f"main = {main!r} is no value of {measurement.evaluator}; {suggest(main, list(measurement.values))}"
        )
    return replace(measurement, values={main: measurement.values[main]} | measurement.values)
