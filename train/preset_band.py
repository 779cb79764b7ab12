"""Whether a finished run of a preset ended where the preset's runs end: said in words, with the data they were on.

Only a run with the preset's settings on the very data is compared; what the data were, `baselines.toml` says: how many
samples were trained on, and a fingerprint of the captions held out, which packing the same data again leaves as it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache

from vlm.files import compute_fingerprint
from vlm.train.history import format_metric
from vlm.train.recipes import Lines, find_recipe, matching_recipe, read_baselines, value_at
from vlm.train.run_config import TrainConfig

_DATA = "measured-on"


@dataclass(frozen=True, kw_only=True)
class MeasuredData:
    """What a preset's runs were on. samples: trained on. held_out: fingerprint of the captions held out."""

    name: str
    samples: int
    held_out: str


@dataclass(frozen=True, kw_only=True)
class BandFigure:
    """A figure of a run beside the band of its preset: where one more run of it ends with a probability of 95%."""

    metric: str
    value: float
    low: float
    high: float
    is_better: bool

    @property
    def is_inside(self) -> bool:
        """Whether the figure is in the band."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        value, low, high = (format_metric(self.metric, number) for number in (self.value, self.low, self.high))
        name = self.metric.replace("_", " ")
        if self.is_inside:
            return f"{name} {value} (band {low} to {high})"
        return f"{name} {value} is {'better' if self.is_better else 'worse'} than the band {low} to {high}"


@dataclass(frozen=True, kw_only=True)
class BandReport:
    """A run beside its preset's band."""

    preset: str
    data: str
    figures: tuple[BandFigure, ...]

    @property
    def is_inside(self) -> bool:
        """Whether all figures are in their bands."""
        return all(figure.is_inside for figure in self.figures)

    def summary(self) -> str:
        """For people."""
        shown = "; ".join(map(str, self.figures))
        if self.is_inside:
            return f"As preset {self.preset} is expected to end on {self.data}: {shown}."
        return (
            f"Outside what preset {self.preset} is expected to end with on {self.data}: {shown}. With the same "
            "settings and data each figure is outside in one run of twenty by chance; else the code, a library or the "
            f"hardware differs (docs/recipes.md; vlm runs compare RUN --to {self.preset})."
        )


def held_out_fingerprint(captions: Iterable[Mapping[str, Iterable[str]]]) -> str:
    """The identity of what is held out: all captions of its images by language, whatever their order."""
    texts: list[str] = []
    for by_language in captions:
        for language, own in by_language.items():
            texts += [f"{language}\t{text}" for text in own]
    return compute_fingerprint(*sorted(texts))


@cache
def measured_data() -> dict[str, MeasuredData]:
    """What the reference curves of each preset were measured on."""
    entries = read_baselines().get(_DATA, {})
    return {preset: MeasuredData(**entry) for preset, entry in entries.items()}


def compare_with_band(
    config: TrainConfig, lines: Lines, *, steps: int, samples: int, held_out: str
) -> BandReport | None:
    """The run's figures at its end beside its preset's; None for other settings, other data, or a preset without.

    samples: of an epoch. held_out: as `held_out_fingerprint`.
    """
    preset = matching_recipe(asdict(config))
    data = measured_data().get(preset)
    if data is None or (data.samples, data.held_out) != (samples, held_out):
        return None
    figures: list[BandFigure] = []
    for reference in find_recipe(preset).reference_curves:
        share, low, high = reference.points[-1]
        # a loss is compared over its last tenth, a recall where it was last measured
        width = reference.width if reference.metric == "loss" else 0.0
        value = value_at(lines, reference.metric, share=share, steps=steps, width=width)
        if reference.kind == "measured" and value is not None:
            is_better = (value < low) == reference.lower_is_better
            figures.append(BandFigure(metric=reference.metric, value=value, low=low, high=high, is_better=is_better))
    return BandReport(preset=preset, data=data.name, figures=tuple(figures)) if figures else None
