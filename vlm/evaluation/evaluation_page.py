"""An evaluation as a page: figures with intervals, models side by side, curves, classes, and the worst mistakes."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from vlm.evaluation.comparison import (
    Comparison,
    ValueDifference,
    format_difference,
    format_figure,
    format_range,
    format_spread,
    format_value,
    is_share,
)
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.mistakes import Explain, Mistake, Thumbnails, answers_of, split_by_language, worst_mistakes
from vlm.evaluation.report_charts import (
    ClassRow,
    ConditionRow,
    ConfusionRow,
    LineChart,
    class_rows,
    condition_rows,
    confusion_rows,
    is_drawn,
    line_charts,
)
from vlm.files import write_text
from vlm.pages import Provenance, render

# of images, in base64; with tables and curves a page stays below some 6 MB
_IMAGE_BYTES = 4_000_000
_CLASSES_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A model's value: the figure with its interval, its share of a bar, and how it differs from the first model's."""

    figure: str = "–"
    interval: str = ""
    share: float | None = None
    difference: str = ""
    difference_interval: str = ""
    p: str = ""
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class _ValueRow:
    """A value of all models. section: number of the section it is from."""

    name: str
    cells: tuple[_Cell, ...]
    chance: str = ""
    section: int = 0
    heading: str = ""
    is_drawn: bool = False


@dataclass(frozen=True, kw_only=True)
class _Confusions:
    model: str
    rows: list[ConfusionRow]


@dataclass(frozen=True, kw_only=True)
class _Mistakes:
    model: str
    title: str
    shown: list[Mistake]
    num_wrong: int
    noun: str


@dataclass(frozen=True, kw_only=True)
class _Languages:
    """Values by language or category (`noun`): a column for each value of each model, a row for each of them."""

    noun: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def display_name(value: str) -> str:
    """A value's name as people write it.

    >>> display_name("text_to_image_recall@1"), display_name("mean_per_class"), display_name("top1")
    ('text → image recall@1', 'mean per class', 'top1')
    """
    return value.replace("_to_", " → ").replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class _Section:
    """What an evaluator says of all models on one set. drawn_rows: values that stand in curves and conditions, too."""

    evaluator: str
    data: str
    num_images: int
    rows: list[_ValueRow]
    drawn_rows: list[_ValueRow]
    languages: "_Languages | None"
    charts: list[LineChart]
    classes: list[ClassRow]
    confusions: list[_Confusions]
    conditions: list[ConditionRow]
    mistakes: list[_Mistakes]

    @property
    def heading(self) -> str:
        """Evaluator and set."""
        return f"{self.evaluator} · {self.data}"


@dataclass(frozen=True, kw_only=True)
class _Warning:
    model: str
    heading: str
    text: str


def write_evaluation_page(
    comparison: Comparison,
    path: Path,
    *,
    sets: Mapping[str, EvaluationSet] | None = None,
    provenance: Provenance | None = None,
    explainers: Mapping[str, Explain] | None = None,
    seed: int = 0,
) -> None:
    """Write `evaluation_page` to a file, atomically."""
    page = evaluation_page(comparison, sets=sets, provenance=provenance, explainers=explainers, seed=seed)
    write_text(path, page)


def evaluation_page(
    comparison: Comparison,
    *,
    sets: Mapping[str, EvaluationSet] | None = None,
    provenance: Provenance | None = None,
    explainers: Mapping[str, Explain] | None = None,
    seed: int = 0,
) -> str:
    """The page of one or several models: warnings, main values side by side, and a section for each measurement.

    comparison: of `compare`. sets: by the name that measurements give as their data, for the images of mistakes; a
    page without them has their texts. explainers: by model; what makes heat maps of its mistakes. seed: of the
    intervals of classes.
    """
    names = short_names([model.model for model in comparison.models])
    thumbnails = Thumbnails(sets=sets or {}, bytes_left=_IMAGE_BYTES)
    by_model = explainers or {}
    explain = {name: by_model.get(model.model) for name, model in zip(names, comparison.models, strict=True)}
    rng = np.random.default_rng(seed)
    sections: list[_Section] = []
    for number, (evaluator, data) in enumerate(comparison.measured()):
        sections.append(_section(comparison, names, number, evaluator, data, thumbnails, explain, rng))
    # figures differ in the last digits between versions, so a reader needs these to repeat them
    libraries = f"Python {platform.python_version()}, torch {_torch_version()}, numpy {np.__version__}"
    return render(
        "evaluation_page.html",
        provenance=provenance,
        title=_title(names),
        names=names,
        models=comparison.models,
        warnings=_warnings(comparison, names),
        sections=sections,
        main_rows=_main_rows(sections),
        sets=_described_sets(comparison),
        libraries=libraries,
        max_classes=_CLASSES_SHOWN,
        format_figure=format_figure,
        format_spread=format_spread,
        format_difference=format_difference,
    )


def short_names(names: Sequence[str]) -> list[str]:
    """The parts of paths in which models differ; of a single one its last part, or the folder of one called model.

    >>> short_names(["/runs/fashion/model", "/runs/emoji/model"]), short_names(["/runs/fashion/model"])
    (['fashion', 'emoji'], ['fashion'])
    """
    parts = [list(filter(None, name.split("/"))) or [name] for name in names]
    if len(parts) == 1:
        (only,) = parts
        return [only[-2] if only[-1] == "model" and len(only) > 1 else only[-1]]
    shortest = min(map(len, parts))
    skipped = 0
    # at least one part must stay of each name, even where all of them are equal
    while skipped < shortest - 1 and len({tuple(part[: skipped + 1]) for part in parts}) == 1:
        skipped += 1
    parts = [part[skipped:] for part in parts]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _title(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"Evaluation of {names[0]}"
    return f"{', '.join(names[:-1])} and {names[-1]} compared" if len(names) < 4 else f"{len(names)} models compared"


def _torch_version() -> str:
    """By its package, since an evaluation by an ONNX export imports no torch, nor needs one that is installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "not installed"


def _section(
    comparison: Comparison,
    names: Sequence[str],
    number: int,
    evaluator: str,
    data: str,
    thumbnails: Thumbnails,
    explainers: Mapping[str, Explain | None],
    rng: np.random.Generator,
) -> _Section:
    measurements = [model.find(evaluator, data) for model in comparison.models]
    by_name = list(zip(names, measurements, strict=True))
    measured = [(name, measurement) for name, measurement in by_name if measurement is not None]
    rows = _value_rows(comparison, measurements, number, evaluator, data)
    confusions: list[_Confusions] = []
    for name, measurement in measured:
        pairs = confusion_rows(measurement)
        if pairs:
            confusions.append(_Confusions(model=name, rows=pairs))
    return _Section(
        evaluator=evaluator,
        data=data,
        num_images=measured[0][1].num_images,
        rows=[row for row in rows if not row.is_drawn],
        drawn_rows=[row for row in rows if row.is_drawn],
        languages=_languages(by_name),
        charts=line_charts(by_name),
        classes=class_rows(by_name, rng=rng),
        confusions=confusions,
        conditions=condition_rows(by_name),
        mistakes=_mistakes(measured, thumbnails, explainers),
    )


def _mistakes(
    measured: Sequence[tuple[str, Measurement]], thumbnails: Thumbnails, explainers: Mapping[str, Explain | None]
) -> list[_Mistakes]:
    answers_by_model = [(name, measurement.data, answers_of(measurement)) for name, measurement in measured]
    num_galleries = sum(len(all_answers) for _, _, all_answers in answers_by_model)
    # full rows of five tiles on a wide screen
    limit = 20 if num_galleries == 1 else 10 if num_galleries <= 4 else 5
    galleries: list[_Mistakes] = []
    for name, data, all_answers in answers_by_model:
        for answers in all_answers:
            shown = worst_mistakes(answers, data, thumbnails, limit=limit, explain=explainers.get(name))
            if shown:
                galleries.append(
                    _Mistakes(
                        model=name,
                        title=answers.title,
                        shown=shown,
                        num_wrong=int(answers.is_wrong.sum()),
                        noun=answers.noun,
                    )
                )
    return galleries


def _value_rows(
    comparison: Comparison, measurements: Sequence[Measurement | None], number: int, evaluator: str, data: str
) -> list[_ValueRow]:
    value_names: dict[str, bool] = {}
    for measurement in measurements:
        for name in split_by_language(measurement.values)[0] if measurement else ():
            value_names[name] = measurement is not None and is_drawn(name, measurement)
    rows: list[_ValueRow] = []
    for name, is_curve in value_names.items():
        cells: list[_Cell] = []
        chance: float | None = None
        for model, measurement in zip(comparison.models, measurements, strict=True):
            value = measurement.values.get(name) if measurement else None
            if value is None:
                cells.append(_Cell())
                continue
            # chance belongs to the set, not to the model: the first one that has it speaks for all
            chance = value.chance if chance is None else chance
            cells.append(_cell(name, value, comparison.find(evaluator, data, name, model.model)))
        shown_chance = "" if chance is None else format_figure(name, chance)
        rows.append(
            _ValueRow(
                name=display_name(name), cells=tuple(cells), chance=shown_chance, section=number, is_drawn=is_curve
            )
        )
    return rows


def _languages(models: Sequence[tuple[str, Measurement | None]]) -> _Languages | None:
    """The main value, and its like in other directions, of each language; None where there is one language only."""
    columns: list[str] = []
    cells: dict[str, dict[int, str]] = {}
    for model, measurement in models:
        plain, by_language = split_by_language(measurement.values) if measurement else ([], {})
        in_languages = set[str]().union(*by_language.values())
        main = next(filter(in_languages.__contains__, plain), "")
        if not main:
            continue
        # recall in one direction also stands for the other one
        ending = main[main.find("recall@") :] if "recall@" in main else main
        for name in plain:
            if not name.endswith(ending):
                continue
            shown = display_name(name)
            columns.append(shown if len(models) == 1 else f"{shown}, {model}")
            for language, names in by_language.items():
                if measurement and name in names:
                    value = measurement.values[names[name]]
                    cells.setdefault(language, {})[len(columns) - 1] = format_value(name, value)
    rows: list[tuple[str, list[str]]] = []
    for language, of_columns in cells.items():
        rows.append((language, [of_columns.get(number, "–") for number in range(len(columns))]))
    noun = "language"
    for _, measurement in models:
        if measurement and measurement.samples is not None and "category" in measurement.samples.column_names:
            noun = "category"
    return _Languages(noun=noun, columns=columns, rows=rows) if rows else None


def _cell(name: str, value: Value, difference: ValueDifference | None) -> _Cell:
    cell = _Cell(
        figure=format_value(name, value),
        interval=format_range(name, value.low, value.high),
        share=value.value if is_share(name) and np.isfinite(value.value) else None,
    )
    if difference is None:
        return cell
    return replace(
        cell,
        difference=format_difference(name, difference.difference),
        difference_interval=format_range(name, difference.low, difference.high),
        p="" if difference.adjusted_p is None else format_p(difference.adjusted_p),
        verdict=_verdict(name, difference),
    )


def format_p(p: float) -> str:
    """A p value in two digits, the smallest as a bound.

    >>> format_p(0.0312), format_p(0.00004)
    ('p = 0.031', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _verdict(name: str, difference: ValueDifference) -> str:
    """better or worse where the difference is significant, else nothing."""
    if not difference.is_significant:
        return ""
    lowered = name.lower()
    # by name, since a value does not say its direction: mean_reciprocal_rank grows, mean_rank falls
    is_lower_better = (lowered.endswith("rank") and "reciprocal" not in lowered) or any(
        word in lowered for word in ("error", "drop", "attack")
    )
    return "better" if (difference.difference > 0) != is_lower_better else "worse"


def _warnings(comparison: Comparison, names: Sequence[str]) -> list[_Warning]:
    warnings: list[_Warning] = []
    for name, model in zip(names, comparison.models, strict=True):
        for measurement in model.measurements:
            heading = f"{measurement.evaluator} · {measurement.data}"
            warnings += [_Warning(model=name, heading=heading, text=text) for text in measurement.warnings]
    return warnings


def _main_rows(sections: Sequence[_Section]) -> list[_ValueRow]:
    """The first value of each section."""
    rows: list[_ValueRow] = []
    for section in sections:
        first = [*section.rows, *section.drawn_rows][:1]
        rows += [replace(row, heading=section.heading) for row in first]
    return rows


def _described_sets(comparison: Comparison) -> list[dict[str, str | int]]:
    sets: dict[tuple[str, str], int] = {}
    for model in comparison.models:
        for measurement in model.measurements:
            sets.setdefault((measurement.data, measurement.data_digest), measurement.num_images)
    return [{"data set": data, "images": number, "digest": digest} for (data, digest), number in sets.items()]
