"""The interface of a curation filter, its notation on the command line (`size:min=200`), and what filters share."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_origin, get_type_hints

import numpy as np

from vlm.config import from_values, lookup
from vlm.data.curation.sample_table import RequiredColumn, SampleTable
from vlm.data.curation.score_columns import ScoreColumns
from vlm.errors import UsageError

# a comma only separates parameters if a name follows: a path may hold commas
_PARAMETER = re.compile(r",(?=[a-z_]+=)")

Scan = Callable[[Sequence[str], frozenset[RequiredColumn]], SampleTable]
"""Scans further shards, those of an evaluation set."""


@dataclass(frozen=True, kw_only=True)
class FilterContext:
    """What a filter decides on.

    sample_table: of all N samples; is_remaining (bool [N]): those the earlier filters left and nothing is wrong with.
    Only on these it decides: what it says of others does not count, and they must not influence it either.
    """

    sample_table: SampleTable
    is_remaining: np.ndarray
    columns: ScoreColumns
    rng: np.random.Generator
    scan: Scan

    @property
    def remaining(self) -> np.ndarray:
        """int64: positions of the remaining samples."""
        return np.flatnonzero(self.is_remaining)


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """What a filter decided.

    weights (float64 [N]): expected times; 0 drops, 1 keeps, 0.25 keeps with that probability, 2 repeats.
    why: the reason of the decision on a sample (by position), in a few words.
    duplicates_of (int64 [N]): the sample each one repeats, -1 for none.
    without_value: samples dropped because their stored column has no value.
    record: for the lineage; curve: for the report, a plain JSON object each.
    """

    weights: np.ndarray
    why: Callable[[int], str]
    duplicates_of: np.ndarray | None = None
    without_value: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Filter:
    """A filter: its line of help, the dataclass of its parameters, the columns it requires, and the function itself.

    score: the stored column without which it cannot decide.
    """

    help: str
    parameters: type[Any]
    apply: Callable[[FilterContext, Any], FilterResult]
    required_columns: frozenset[RequiredColumn] = frozenset()
    score: str = ""

    def usage(self, name: str) -> str:
        """Its notation.

        >>> Filter(help="", parameters=NoParameters, apply=print).usage("usable")
        'usable'
        """
        names = [parameter.name.replace("_", "-") for parameter in dataclasses.fields(self.parameters)]
        parameters = ",".join(f"{name}=…" for name in names)
        return f"{name}:{parameters}" if parameters else name


@dataclass(frozen=True, kw_only=True)
class NoParameters:
    """Of a filter without parameters."""


@dataclass(frozen=True, kw_only=True)
class ConfiguredFilter:
    """A filter with the parameters a person gave."""

    name: str
    sample_filter: Filter
    parameters: Any

    def described(self) -> dict[str, Any]:
        """Its name and parameters as plain JSON."""
        values = {name: _plain(value) for name, value in asdict(self.parameters).items()}
        return {"rule": self.name, "parameters": values}

    def shown(self) -> str:
        """In the notation of the command line, defaults included."""
        parameters: list[str] = []
        for name, value in asdict(self.parameters).items():
            if value not in (None, ()):
                parameters.append(f"{name.replace('_', '-')}={_written(value)}")
        return f"{self.name}:{','.join(parameters)}" if parameters else self.name


def parse_filter(text: str, filters: Mapping[str, Filter]) -> ConfiguredFilter:
    """A filter from `name:parameter=value,parameter=value`; several values of one parameter are joined by `+`.

    Raises:
        UsageError: there is no such filter or parameter (the nearest is named), or a value does not fit.
    """
    name, _, rest = text.partition(":")
    sample_filter = lookup(dict(filters), name.strip(), "filter")
    values: dict[str, Any] = {}
    hints = get_type_hints(sample_filter.parameters)
    for part in _PARAMETER.split(rest) if rest.strip() else []:
        parameter, equals, value = part.partition("=")
        parameter = parameter.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--filter {text!r}: {part!r} lacks a value; it is written {sample_filter.usage(name)}")
        if parameter in values:
            raise UsageError(f"--filter {text!r} gives {parameter}= twice; give it once.")
        # a path or a number may hold a plus: only parameters that are lists are split
        is_list = get_origin(hints.get(parameter)) is tuple
        values[parameter] = list(filter(None, value.split("+"))) if is_list else value.strip()
    try:
        parameters = from_values(sample_filter.parameters, values, where=f"--filter {text!r}")
    except UsageError as error:
        raise UsageError(f"{error} It is written {sample_filter.usage(name)}: {sample_filter.help}.") from error
    return ConfiguredFilter(name=name.strip(), sample_filter=sample_filter, parameters=parameters)


def require_one_of(parameters: Any, *names: str) -> None:
    """Refuse parameters of which none of `names` was given.

    Raises:
        UsageError: none was.
    """
    # None or an empty tuple is a default; 0 is a value that was given
    if all(getattr(parameters, name) in (None, ()) for name in names):
        raise UsageError(f"Nothing to decide by; give {' or '.join(f'{name}=…' for name in names)}.")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, int | float | str) else str(value)


def keep_one_per_group(
    context: FilterContext, positions: np.ndarray, groups: np.ndarray, why: Callable[[str], str]
) -> FilterResult:
    """Of each group keep the largest image, of equally large ones the first.

    positions: the samples that are grouped; groups (int64, parallel): their groups.
    why: the reason for dropping a sample, given the key of the one it repeats.
    """
    sample_table = context.sample_table
    # sorted by group, then the sample to keep first: each sample repeats the last "first" at or before it
    order = np.lexsort((positions, -sample_table.areas[positions], groups))
    # groups are at least 0, so the first row always begins one
    is_first = np.diff(groups[order], prepend=-1) != 0
    group_starts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    ordered = positions[order]
    kept = ordered[group_starts]
    duplicates_of = np.full(len(sample_table), -1, dtype=np.int64)
    duplicates_of[ordered[~is_first]] = kept[~is_first]

    def reason(position: int) -> str:
        original = int(duplicates_of[position])
        return why(sample_table.key(original)) if original >= 0 else "kept"

    # the numbers of groups may have gaps, as stored columns do
    sizes = np.unique(groups, return_counts=True)[1]
    return FilterResult(
        weights=(duplicates_of < 0).astype(np.float64),
        why=reason,
        duplicates_of=duplicates_of,
        record={"groups": int((sizes > 1).sum()), "largest_group": int(sizes.max(initial=0))},
    )
