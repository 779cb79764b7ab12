"""What evaluators give: named values with intervals, and the outcome of each sample they were computed from.

An evaluator is a frozen dataclass with a name and `run(model, data)`; it is used alone, during training, and by suites.
"""

from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.sample_statistics import SampleStatistic
from vlm.results import Result, json_values


@dataclass(frozen=True, kw_only=True)
class Value:
    """A figure with its 95% interval and what chance gives; None where there is no such thing."""

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement(Result):
    """What an evaluator says of a model on a set.

    evaluator, data: their names. data_digest: identity of the images.
    values: by name; the first is the one that stands for all where there is room for one.
    samples: rows with a `key`, the unit of resampling: rows of the same key are drawn together. A value that has the
        name of a column is the mean of that column over the rows in which it is not null; all other columns say more
        of a row (a prediction, its score) and have names of their own.
    statistics: of values that are no such means, how they follow from the rows; for differences between models.
    details: the evaluator's own result, a dataclass. warnings: what the reader should know before he trusts the values.
    """

    evaluator: str
    data: str
    data_digest: str
    num_images: int
    values: dict[str, Value]
    samples: pa.Table | None = None
    statistics: dict[str, SampleStatistic] = field(default_factory=dict, repr=False, compare=False)
    details: Any = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the samples, which are kept in tables (Parquet)."""
        is_record = is_dataclass(self.details) and not isinstance(self.details, type)
        return json_values(
            {
                "evaluator": self.evaluator,
                "data": self.data,
                "data_digest": self.data_digest,
                "num_images": self.num_images,
                "values": {name: asdict(value) for name, value in self.values.items()},
                "warnings": self.warnings,
                "details": asdict(self.details) if is_record else None,  # pyright: ignore[reportArgumentType]
            }
        )


@runtime_checkable
class Evaluator(Protocol):
    """One kind of measurement, with its settings.

    name: what its values are filed under, unlike those of the other evaluators of a suite on the same data.
    """

    @property
    def name(self) -> str:
        """As it stands in reports."""
        ...

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the set lacks what it needs: labels, captions.
        """
        ...
