"""Results in files: a Parquet table of samples for each model, evaluator and set, and all figures as JSON."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm import __version__
from vlm.errors import UsageError
from vlm.evaluation.comparison import KEY, ModelMeasurements
from vlm.evaluation.measurement import Measurement, Value
from vlm.files import atomic_write, json_text

FORMAT = 1
SUFFIX = ".parquet"
_METADATA_KEY = b"vlm"
# letters of any script stay, and so does what names of sets and evaluators are made of
_UNSAFE = re.compile(r"[^\w.@+=-]+")
_NAME_LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class SavedSamples:
    """A table of samples as it was read, with the model it was measured of; its measurement has no details."""

    model: str
    fingerprint: str
    measurement: Measurement


def write_samples(folder: Path, models: Sequence[ModelMeasurements]) -> list[Path]:
    """Write MODEL.EVALUATOR.SET.parquet for each measurement that has samples; the files, in order.

    Each is written atomically, and complete by itself: its metadata has the names, the digest of the set and the
    values. A file of the same name is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for model in models:
        for measurement in model.measurements:
            if measurement.samples is not None:
                path = folder / _unlike(_file_name(model, measurement), written)
                _write(path, model, measurement)
                written.append(path)
    return written


def read_samples(path: Path) -> SavedSamples:
    """A table that `write_samples` wrote.

    Raises:
        UsageError: there is no such file, or it is none of ours, or one of a newer version.
    """
    if not path.is_file():
        raise UsageError(f"There is no table of samples at {str(path)!r}.")
    try:
        table = pq.read_table(path)
        described = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no table of samples that vlm eval wrote: {error}.") from error
    if described["format"] > FORMAT:
        raise UsageError(
            f"{str(path)!r} has format {described['format']} of vlm {described['made_by']}, and this version reads "
            f"{FORMAT}: update vlm."
        )
    measurement = Measurement(
        evaluator=described["evaluator"],
        data=described["data"],
        data_digest=described["data_digest"],
        num_images=described["num_images"],
        values={name: _value(figures) for name, figures in described["values"].items()},
        samples=table.replace_schema_metadata(None),
        warnings=tuple(described["warnings"]),
    )
    return SavedSamples(model=described["model"], fingerprint=described["fingerprint"], measurement=measurement)


def _value(figures: dict[str, Any]) -> Value:
    # JSON has null for a figure that is not finite
    return Value(**(figures | {"value": float("nan") if figures["value"] is None else figures["value"]}))


def _write(path: Path, model: ModelMeasurements, measurement: Measurement) -> None:
    assert measurement.samples is not None
    if KEY not in measurement.samples.column_names:
        raise ValueError(f"The samples of {measurement.evaluator} have no column {KEY!r}.")
    described: dict[str, Any] = measurement.to_json()
    del described["details"]
    described |= {"format": FORMAT, "made_by": __version__, "model": model.model, "fingerprint": model.fingerprint}
    metadata = {_METADATA_KEY: json_text(described).encode()}
    table = measurement.samples.replace_schema_metadata(metadata)
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")


def _file_name(model: ModelMeasurements, measurement: Measurement) -> str:
    parts = (model.model, measurement.evaluator, measurement.data)
    return ".".join(_safe(part) for part in parts)


def _safe(name: str) -> str:
    """The end of a name, which tells paths apart, without what file systems dislike."""
    return _UNSAFE.sub("-", name).strip("-.")[-_NAME_LENGTH:].lstrip("-.") or "unnamed"


def _unlike(name: str, written: Sequence[Path]) -> str:
    """A file name that none of those written has."""
    names = {path.name.casefold() for path in written}
    candidate = name + SUFFIX
    number = 2
    while candidate.casefold() in names:
        candidate = f"{name}-{number}{SUFFIX}"
        number += 1
    return candidate
