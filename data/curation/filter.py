"""What a rule is, and a rule as a person writes it: `size:min=200`.

Groups of samples that show the same thing, and the one of each that stays.
"""

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

_PARAMETER = re.compile(r",(?=[a-z_]+=)")

Scan = Callable[[Sequence[str], frozenset[RequiredColumn]], SampleTable]
"""Looks at further shards, those of an evaluation set."""


@dataclass(frozen=True, kw_only=True)
class FilterContext:
    """What a rule decides on.

    facts: of all N samples; is_left (bool [N]): those the earlier rules left and nothing is wrong with. Only of these
    it decides: what it says of others does not count, and they are to be no example for it either.
    """

    sample_table: SampleTable
    is_remaining: np.ndarray
    columns: ScoreColumns
    rng: np.random.Generator
    scan: Scan

    @property
    def left(self) -> np.ndarray:
        """int64: places of the samples left."""
        return np.flatnonzero(self.is_remaining)


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """What a rule decided.

    weights (float64 [N]): expected times; 0 drops, 1 keeps, 0.25 keeps with that probability, 2 repeats.
    why: says of a sample (by place), in a few words, what decided.
    twins (int64 [N]): the sample each was found to repeat, -1 for none.
    without_value: samples dropped because their stored column has no value.
    record: for the lineage; curve: for the report, a plain JSON object each.
    """

    weights: np.ndarray
    why: Callable[[int], str]
    duplicates_of: np.ndarray | None = None
    without_value: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A rule: its line of help, the dataclass of its parameters, what it needs to know, and the function itself.

    signal: the stored column without which it cannot decide.
    """

    help: str
    parameters: type[Any]
    apply: Callable[[FilterContext, Any], FilterResult]
    required_columns: frozenset[RequiredColumn] = frozenset()
    score: str = ""

    def usage(self, name: str) -> str:
        """How it is written.

        >>> Filter(help="", parameters=NoParameters, apply=print).usage("usable")
        'usable'
        """
        parameters = ",".join(f"{each.name.replace('_', '-')}=…" for each in dataclasses.fields(self.parameters))
        return f"{name}:{parameters}" if parameters else name


@dataclass(frozen=True, kw_only=True)
class NoParameters:
    """Of a rule that takes none."""


@dataclass(frozen=True, kw_only=True)
class ConfiguredFilter:
    """A rule with the parameters a person gave."""

    name: str
    sample_filter: Filter
    parameters: Any

    def described(self) -> dict[str, Any]:
        """Its name and parameters as plain JSON."""
        values = {name: _plain(value) for name, value in asdict(self.parameters).items()}
        return {"rule": self.name, "parameters": values}

    def shown(self) -> str:
        """As a person would write it, defaults included."""
        parameters = [
            f"{name.replace('_', '-')}={_written(value)}"
            for name, value in asdict(self.parameters).items()
            if value not in (None, ())
        ]
        return f"{self.name}:{','.join(parameters)}" if parameters else self.name


def parse_filter(text: str, filters: Mapping[str, Filter]) -> ConfiguredFilter:
    """A rule from `name:parameter=value,parameter=value`; several values of one parameter are joined by `+`.

    Raises:
        UsageError: there is no such rule or parameter (the nearest is named), or a value does not fit.
    """
    name, _, rest = text.partition(":")
    sample_filter = lookup(dict(filters), name.strip(), "rule")
    values: dict[str, Any] = {}
    hints = get_type_hints(sample_filter.parameters)
    for part in _PARAMETER.split(rest) if rest.strip() else []:
        parameter, equals, value = part.partition("=")
        parameter = parameter.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--filter {text!r}: {part!r} lacks a value; it is written {sample_filter.usage(name)}")
        if parameter in values:
            raise UsageError(f"--filter {text!r} gives {parameter}= twice; give it once.")
        is_list = get_origin(hints.get(parameter)) is tuple
        values[parameter] = [each for each in value.split("+") if each] if is_list else value.strip()
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
    """Of each group keep the largest picture, of equally large ones the first.

    places: the samples that are grouped; groups (int64, parallel): their groups.
    why: says of a dropped sample what it repeats, given the key of that.
    """
    sample_table = context.sample_table
    order = np.lexsort((positions, -sample_table.areas[positions], groups))
    is_first = np.diff(groups[order], prepend=-1) != 0
    kept = positions[order][np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    duplicates_of = np.full(len(sample_table), -1, dtype=np.int64)
    duplicates_of[positions[order][~is_first]] = kept[~is_first]
    weights = (duplicates_of < 0).astype(np.float64)
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1]) if len(groups) else np.zeros(0, np.int64)
    return FilterResult(
        weights=weights,
        why=lambda position: (
            why(sample_table.key(int(duplicates_of[position]))) if duplicates_of[position] >= 0 else "kept"
        ),
        duplicates_of=duplicates_of,
        record={"groups": int((sizes > 1).sum()), "largest_group": int(sizes.max(initial=0))},
    )
