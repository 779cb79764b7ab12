"""The collection of an index: its schema, how a row becomes an entity and an entry again, and the catalogue read from
it.

    row         the row's number, the primary key
    uid_digest  by which a uid is found, whatever characters it holds
    born, died  the version that inserted the row, and the one that deleted it (`LATEST` while it is live)
    vector      of unit length, rounded to float16 as FAISS's rows are, so that both engines give the same cosines
    origin      what it was made from, as JSON
    terms       which fields and which of their values it has, as keys (`vlm.index.milvus.value_keys`)
    bounds      of each field the least and the greatest key, and its texts without case

Field number 3 of the index's list gives the terms `f3` (it has a value), `f3n` and `f3t` (a number, a text), `f3i` (a
time), `f3t_0` (a first text), and `f3n=KEY`, `f3t=KEY`, `f3i=KEY` for each value. No term is ever null, so a filter has
two outcomes and no third. A field has several values where its metadata is a list: a comparison asks for any of them,
which the least and the greatest answer.

Conditions of the filter language become boolean expressions of Milvus. Every comparison asks first whether the row has
such a value, by a term, and terms are never null. So each part is true or false of every row, and `not` is its
opposite: what Milvus makes of null, which differs between `n != 1` and `n not in [1]`, never comes up. Values appear as
keys of letters and digits, names as numbers: nothing of a filter's text reaches Milvus.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import content_digest
from vlm.index.catalog import LATEST
from vlm.index.embeddings_folder import Origin
from vlm.index.engine_base import EngineCatalogue, Entry, FilteredRows, RowSelection, row_numbers
from vlm.index.facets import MOST_DISTINCT, FieldSummary, ValueCount
from vlm.index.filter_language import (
    And,
    Compare,
    Condition,
    IsIn,
    IsNull,
    Like,
    Not,
    Or,
    check_fields,
    instant_of,
    times_with_zone,
)
from vlm.index.index_files import REBUILD_HINT
from vlm.index.metadata import FieldType, FieldValue, is_field, metadata_fields, sanitize_text
from vlm.index.milvus.connection import MilvusConnection, load_pymilvus
from vlm.index.milvus.value_keys import fold_ascii, folded_key, number_key, pattern_key, text_key, value_of
from vlm.tensor_types import Array, Float32, Int64

MOST_TEXTS = 32
"""Texts of a field that a row may have if the field is to be compared by `like`."""

# what a server takes
_LONGEST_TEXT = 65_535
_MOST_TERMS = 4096
_LONGEST_TERM = 8192

INDEX_TYPES = {"flat": "FLAT", "ivf": "IVF_FLAT", "ivfsq": "IVF_SQ8", "hnsw": "HNSW"}
"""The index types that this engine builds, by our name."""

REFUSED_TYPES = {
    "ivfpq": "milvus-lite has no product quantization, so that it cannot be tested here",
    "rabitq": "milvus-lite has no IVF_RABITQ, so that it cannot be tested here",
    "sq8": "Milvus quantizes to 8 bits only within IVF or HNSW: ivfsq",
}


# instants are those of texts, which have a term of their own
_VALUE_TERM = re.compile("f(?P<number>[0-9]+)(?P<kind>[nt])=(?P<key>.*)")


@dataclass(frozen=True, kw_only=True)
class StoredField:
    """A metadata field; its number is its place in the index's list.

    types: of the values that rows ever had; none if it was always null. most_texts: that one row had.
    """

    name: str
    types: tuple[FieldType, ...] = ()
    most_texts: int = 0


@dataclass(frozen=True)
class RowFacts:
    """What filters compare of a row: `terms` and `bounds` of its entity."""

    terms: tuple[str, ...]
    bounds: dict[str, str]


@dataclass
class FieldRegister:
    """The metadata fields of an index, to which new rows add theirs."""

    fields: list[StoredField] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Sequence[StoredField]) -> "FieldRegister":
        """Of the fields that a manifest lists."""
        return cls(list(fields), {stored.name: number for number, stored in enumerate(fields)})

    def facts(self, origin: Origin) -> RowFacts:
        """The facts of a row, whose fields are noted.

        Raises:
            UsageError: there are more or longer ones than Milvus takes.
        """
        values: defaultdict[str, set[FieldValue]] = defaultdict(set)
        for name, value in metadata_fields(origin):
            values[name].add(value)
        # a null gives no term, but its field must be known, or `is missing` would refuse its name
        for name, value in origin.metadata.items():
            if value is None and is_field(name):
                self._number(sanitize_text(name))
        terms = [shard_term(origin.shard)]
        bounds: dict[str, str] = {}
        for name, of_field in values.items():
            prefix = f"f{self._note(name, of_field)}"
            terms.append(prefix)
            numbers = {number_key(value) for value in of_field if not isinstance(value, str)}
            # sorted, so that the same metadata gives the same entity in every build
            texts = sorted(value for value in of_field if isinstance(value, str))
            instants = filter(None, map(instant_of, texts))
            for kind, keys in (("n", numbers), ("t", map(text_key, texts)), ("i", map(text_key, instants))):
                _add_keys(f"{prefix}{kind}", sorted(set(keys)), terms, bounds)
            # `like` has no term: it is compared with each text, so the first ones are stored one by one
            for position, text in enumerate(texts[:MOST_TEXTS]):
                terms.append(f"{prefix}t_{position}")
                bounds[f"{prefix}t_{position}"] = folded_key(text)
        _check_size(origin, terms, bounds)
        return RowFacts(tuple(terms), bounds)

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.fields)
            self.fields.append(StoredField(name=name))
        return self._numbers[name]

    def _note(self, name: str, values: Iterable[FieldValue]) -> int:
        """The number of a field, whose types and number of texts are brought up to date."""
        number = self._number(name)
        stored = self.fields[number]
        num_texts = sum(isinstance(value, str) for value in values)
        # types only ever grow: a deleted row may have had one, and an older version may still be open on it
        has_number = "number" in stored.types or any(not isinstance(value, str) for value in values)
        has_text = "text" in stored.types or num_texts > 0
        types: tuple[FieldType, ...] = ("number", "text") if has_number and has_text else ("number",)
        self.fields[number] = replace(
            stored,
            types=types if has_number else ("text",),
            most_texts=max(stored.most_texts, num_texts),
        )
        return number


def _add_keys(prefix: str, keys: Sequence[str], terms: list[str], bounds: dict[str, str]) -> None:
    if not keys:
        return
    terms.append(prefix)
    terms.extend(f"{prefix}={key}" for key in keys)
    bounds[f"{prefix}_low"] = keys[0]
    bounds[f"{prefix}_high"] = keys[-1]


def _check_size(origin: Origin, terms: Sequence[str], bounds: Mapping[str, str]) -> None:
    if len(terms) > _MOST_TERMS:
        raise UsageError(
            f"The metadata of {origin.uid!r} has {len(terms):,} values and fields; Milvus takes {_MOST_TERMS:,} of a "
            "row: leave out some columns, or long lists."
        )
    # refused here, since a server's own error names no row
    for what, text in (("metadata", json.dumps(bounds)), ("captions and metadata", origin_text(origin))):
        if len(text) > _LONGEST_TEXT:
            raise UsageError(
                f"The {what} of {origin.uid!r} take {len(text):,} bytes; Milvus takes {_LONGEST_TEXT:,} of a row: "
                "shorten the texts, or leave out some columns."
            )


def values_of_terms(terms: Iterable[str]) -> Iterator[tuple[int, FieldValue]]:
    """Each value that a row's terms name, with the number of its field."""
    for term in terms:
        if match := _VALUE_TERM.fullmatch(term):
            yield int(match["number"]), value_of(match["kind"], match["key"])


def shard_term(address: str) -> str:
    """The term of the rows of a shard or image file."""
    return f"s={content_digest(address.encode(errors='surrogatepass')).hex()}"


def uid_digest(uid: str) -> str:
    """By which a uid is found: hex digits, so that nothing has to be quoted."""
    return content_digest(uid.encode(errors="surrogatepass")).hex()


def origin_text(origin: Origin) -> str:
    """What a row was made from, as JSON of ASCII; NaN and halves of surrogate pairs come back as they were."""
    values = asdict(origin)
    # the number is the primary key already, and an edit inserts the same origin under another number
    values.pop("row", None)
    return json.dumps(values)


def entity_of(row: int, origin: Origin, vector: Float32[Array, " D"], facts: RowFacts, *, born: int) -> dict[str, Any]:
    """A row as Milvus takes it."""
    return {
        "row": row,
        "uid_digest": uid_digest(origin.uid),
        "born": born,
        "died": LATEST,
        "vector": vector,
        "origin": origin_text(origin),
        "terms": list(facts.terms),
        "bounds": facts.bounds,
    }


def entry_of(entity: Mapping[str, Any]) -> Entry:
    """The entry of an entity with `row` and `origin`."""
    values = json.loads(entity["origin"])
    values["captions"] = {language: tuple(texts) for language, texts in values["captions"].items()}
    return Entry(row=entity["row"], **values)


def vector_of(entity: Mapping[str, Any]) -> Float32[Array, " D"]:
    """The vector of an entity that has it."""
    return np.asarray(entity["vector"], np.float32)


def create_collection(
    connection: MilvusConnection, name: str, *, dimension: int, kind: str, parameters: Mapping[str, int]
) -> None:
    """An empty collection, indexed and loaded."""
    pymilvus = load_pymilvus()
    types = pymilvus.DataType
    schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", types.INT64, is_primary=True)
    schema.add_field("uid_digest", types.VARCHAR, max_length=64)
    schema.add_field("born", types.INT64)
    schema.add_field("died", types.INT64)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=dimension)
    schema.add_field("origin", types.VARCHAR, max_length=_LONGEST_TEXT)
    schema.add_field(
        "terms", types.ARRAY, element_type=types.VARCHAR, max_capacity=_MOST_TERMS, max_length=_LONGEST_TERM
    )
    schema.add_field("bounds", types.JSON)
    indexes = connection.client.prepare_index_params()
    indexes.add_index("vector", index_type=INDEX_TYPES[kind], metric_type="COSINE", params=dict(parameters))
    # milvus-lite has no index of arrays and reads every row anyway; each index costs pymilvus half a second of waiting
    if not connection.address.is_local:
        for name in ("uid_digest", "died", "terms"):
            indexes.add_index(name, index_type="INVERTED")
    # strong consistency: the manifest is written next, and its readers must see every row
    with connection.explained(f"cannot create {name}"):
        connection.client.create_collection(
            name, schema=schema, index_params=indexes, consistency_level="Strong", timeout=120.0
        )


NO_ROW = "row < 0"
"""An expression that is false of every row: their numbers are not negative."""


def expression_of(condition: Condition, fields: Sequence[StoredField], *, optional_fields: Collection[str] = ()) -> str:
    """The expression that selects the rows of a condition.

    fields: of the index. optional_fields: may be named although no row has them, and then match none.

    Raises:
        UsageError: the condition names a field that no row has, compares numbers with texts, or asks by `like` for a
            field of which a row has too many texts.
    """
    numbers = {stored.name: number for number, stored in enumerate(fields)}
    types = {stored.name: stored.types for stored in sorted(fields, key=lambda stored: stored.name) if stored.types}
    # every row has a key, so without fields there are no rows
    if not types:
        return NO_ROW
    check_fields(condition, types, numbers, optional_fields)
    return _expression(condition, fields, numbers)


def _expression(condition: Condition, fields: Sequence[StoredField], numbers: dict[str, int]) -> str:
    match condition:
        case Not(inner):
            return f"not ({_expression(inner, fields, numbers)})"
        case And(parts):
            return " and ".join(f"({_expression(part, fields, numbers)})" for part in parts)
        case Or(parts):
            return " or ".join(f"({_expression(part, fields, numbers)})" for part in parts)
    number = numbers.get(condition.field)
    if number is None:
        # an optional field that no row has: only `is missing` is true of it
        return f"not ({NO_ROW})" if isinstance(condition, IsNull) else NO_ROW
    prefix = f"f{number}"
    match condition:
        case IsNull():
            return f"not ({_has(prefix)})"
        case IsIn(values=values):
            instants = times_with_zone(condition)
            # a time with a zone is looked for among instants, all else as it stands
            keys = ", ".join(f'"{_value_term(prefix, value, value in instants)}"' for value in values)
            return f"array_contains_any(terms, [{keys}])"
        case Compare():
            return _comparison(condition, prefix)
        case Like(pattern=pattern):
            return _like(pattern, prefix, fields[number])
    raise AssertionError(f"{condition!r} is no condition")


def _has(term: str) -> str:
    return f'array_contains(terms, "{term}")'


def _value_term(prefix: str, value: FieldValue, is_instant: bool) -> str:
    if not isinstance(value, str):
        return f"{prefix}n={number_key(value)}"
    return f"{prefix}i={text_key(str(instant_of(value)))}" if is_instant else f"{prefix}t={text_key(value)}"


def _comparison(condition: Compare, prefix: str) -> str:
    """Any value compares so if the least or the greatest does."""
    kind, _, key = _value_term(prefix, condition.value, bool(times_with_zone(condition))).partition("=")
    end = "low" if condition.operator.startswith("<") else "high"
    return f'{_has(kind)} and bounds["{kind}_{end}"] {condition.operator} "{key}"'


def _like(pattern: str, prefix: str, field: StoredField) -> str:
    if field.most_texts > MOST_TEXTS:
        raise UsageError(
            f"A row has {field.most_texts:,} texts of the field {field.name!r}; in a Milvus index, like compares at "
            f"most {MOST_TEXTS} of a row: use has or in, or a FAISS index."
        )
    key = pattern_key(pattern)
    if key == "%":
        return _has(f"{prefix}t")
    operator = "like" if "%" in key else "=="
    # only as many positions as any row ever had texts, to keep the expression short
    parts: list[str] = []
    for position in range(field.most_texts):
        name = f"{prefix}t_{position}"
        parts.append(f'({_has(name)} and bounds["{name}"] {operator} "{key}")')
    return " or ".join(parts) or NO_ROW


class MilvusCatalogue(EngineCatalogue):
    """The rows of one version.

    visible: gives the expression that selects them, or refuses a version that was compacted away.
    num_rows: their number.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        collection: str,
        fields: Sequence[StoredField],
        visible: Callable[[], str],
        num_rows: int,
    ) -> None:
        self._connection = connection
        self._collection = collection
        self._fields = tuple(fields)
        self._numbers = {stored.name: number for number, stored in enumerate(fields)}
        self._visible = visible
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def close(self) -> None:
        """Let go of the server."""
        self._connection.close()

    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of the given rows, in their order, live or deleted.

        Raises:
            VlmError: one is missing.
        """
        # by number alone, without the version: results of a search may be read after a row was deleted
        entities = self._connection.fetch(
            self._collection, "row", sorted(set(rows)), ["row", "origin"], where="row >= 0"
        )
        by_row = {entity["row"]: entry_of(entity) for entity in entities}
        for row in rows:
            if row not in by_row:
                raise VlmError(
                    f"The collection {self._collection} at {self._connection.uri} has no row {row:,}, which the index "
                    f"has; {REBUILD_HINT}."
                )
        return [by_row[row] for row in rows]

    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""
        rows = self.rows_by_uid([uid])
        return self.entries([rows[uid]])[0] if rows else None

    def rows_by_uid(self, uids: Iterable[str]) -> dict[str, int]:
        """The row of each of these uids that exists."""
        by_digest = {uid_digest(uid): uid for uid in uids}
        entities = self._connection.fetch(
            self._collection, "uid_digest", list(by_digest), ["row", "uid_digest"], where=self._visible()
        )
        return {by_digest[entity["uid_digest"]]: entity["row"] for entity in entities}

    def rows(self) -> Int64[Array, " N"]:
        """All row numbers, ascending."""
        return self._connection.rows(self._collection, self._visible())

    def where(self, condition: Condition, *, optional_fields: Collection[str] = ()) -> RowSelection:
        """The rows that a condition selects, evaluated by the server in each search.

        Raises: as of `EngineCatalogue.where`, and UsageError: Milvus cannot evaluate it (`expression_of`).
        """
        return self._selection(expression_of(condition, self._fields, optional_fields=optional_fields))

    def _selection(self, expression: str) -> FilteredRows:
        # asked anew each time: the version's own expression refuses one that was compacted away meanwhile
        def whole() -> str:
            return f"{self._visible()} and ({expression})"

        return FilteredRows(
            expression=expression,
            count=lambda: self._connection.count(self._collection, whole()),
            list_rows=lambda: self._connection.rows(self._collection, whole()),
        )

    def rank_text(self, words: str, top: int) -> list[tuple[int, float]]:
        """Refused: the words of captions are in no index that Milvus could search as SQLite does.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "An index of the engine milvus has no full-text search of captions: leave --words out, use a filter as "
            "--where \"caption like '%word%'\", or a FAISS index."
        )

    def field_names(self) -> list[str]:
        """The metadata fields that have values, by name, those of deleted rows among them."""
        return sorted(stored.name for stored in self._fields if stored.types)

    def field_values(self, field: str) -> list[tuple[FieldValue, int]]:
        """Each value of a field with its row."""
        return list(self._values(field, "row >= 0"))

    def _values(self, field: str, expression: str) -> Iterator[tuple[FieldValue, int]]:
        """Each value of a field among the live rows that an expression selects; reads the terms of all of these."""
        number = self._numbers.get(field)
        if number is None:
            return
        whole = f'{self._visible()} and array_contains(terms, "f{number}") and ({expression})'
        for entity in self._connection.iterate(self._collection, whole, ["row", "terms"]):
            for of_field, value in values_of_terms(entity["terms"]):
                if of_field == number:
                    yield value, entity["row"]

    def distinct_values(self, field: str, limit: int) -> list[FieldValue]:
        """The first values of a field in their order, numbers before texts."""
        values = {value for value, _ in self._values(field, "row >= 0")}
        return sorted(values, key=_in_order)[:limit]

    def values_like(self, field: str, text: str, limit: int) -> list[str]:
        """The texts of a field that differ from this one at most in the case of A to Z; reads the whole field."""
        folded = fold_ascii(text)
        texts: dict[str, None] = {}
        for value, _ in self._values(field, "row >= 0"):
            if isinstance(value, str) and fold_ascii(value) == folded:
                texts[value] = None
        return list(texts)[:limit]

    def field_summaries(self) -> list[FieldSummary]:
        """The columns of the metadata, by name; reads the terms of every row."""
        values: defaultdict[str, set[FieldValue]] = defaultdict(set)
        numbers: defaultdict[str, list[int | float]] = defaultdict(list)
        for entity in self._connection.iterate(self._collection, self._visible(), ["row", "terms"]):
            for number, value in values_of_terms(entity["terms"]):
                name = self._fields[number].name
                # beyond that the column is no category, and its values would fill the memory
                if len(values[name]) <= MOST_DISTINCT:
                    values[name].add(value)
                if not isinstance(value, str):
                    ends = (*numbers[name], value)
                    numbers[name] = [min(ends), max(ends)]
        summaries: list[FieldSummary] = []
        for stored in sorted(self._fields, key=lambda stored: stored.name):
            if stored.name not in values:
                continue
            ends = numbers[stored.name]
            summaries.append(
                FieldSummary(
                    name=stored.name,
                    types=stored.types,
                    distinct=len(values[stored.name]),
                    minimum=ends[0] if ends else None,
                    maximum=ends[1] if ends else None,
                )
            )
        return summaries

    def count_values(self, field: str, *, top: int, rows: RowSelection | None = None) -> list[ValueCount]:
        """The `top` most frequent values of a column, ties by value; reads the terms of the rows that count."""
        if rows is None or isinstance(rows, FilteredRows):
            values = self._values(field, rows.expression if rows is not None else "row >= 0")
            counts = Counter(value for value, _ in values)
        else:
            # a list of rows can be too long for an expression, so these are counted here
            counted = set(row_numbers(rows).tolist())
            counts = Counter(value for value, row in self._values(field, "row >= 0") if row in counted)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], _in_order(item[0])))
        return [ValueCount(value=value, rows=number) for value, number in ordered[:top]]

    def image_ends(self) -> dict[str, int]:
        """By the address of each shard or image file the byte at which its last image ends, 0 without images."""
        ends: dict[str, int] = {}
        for entity in self._connection.iterate(self._collection, self._visible(), ["row", "origin"]):
            entry = entry_of(entity)
            ends[entry.shard] = max(ends.get(entry.shard, 0), entry.image_offset + entry.image_size)
        return ends

    def sample_numbers(self, address: str) -> list[int]:
        """The positions in a shard of the samples that have a row."""
        whole = f'{self._visible()} and array_contains(terms, "{shard_term(address)}")'
        entities = self._connection.iterate(self._collection, whole, ["row", "origin"])
        return [entry_of(entity).number for entity in entities]


def _in_order(value: FieldValue) -> tuple[bool, float | str]:
    """By which values sort: numbers before texts."""
    return isinstance(value, str), value


def as_row_list(rows: Int64[Array, " N"]) -> str:
    """Row numbers as an expression lists them."""
    return f"row in [{', '.join(map(str, np.asarray(rows).tolist()))}]"
