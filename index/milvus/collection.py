"""The collection of an index: its schema, and how a row with its metadata becomes an entity and an entry again.

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
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vlm.errors import UsageError
from vlm.files import content_digest
from vlm.index.catalog import LATEST
from vlm.index.embeddings_folder import Origin
from vlm.index.engine_base import Entry
from vlm.index.filter_language import instant_of
from vlm.index.metadata import FieldType, FieldValue, is_field, metadata_fields, sanitize_text
from vlm.index.milvus.connection import MilvusConnection, load_pymilvus
from vlm.index.milvus.value_keys import folded_key, number_key, text_key, value_of
from vlm.tensor_types import Array, Float32

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
        for name, value in origin.metadata.items():
            if value is None and is_field(name):
                self._number(sanitize_text(name))
        terms = [shard_term(origin.shard)]
        bounds: dict[str, str] = {}
        for name, of_field in values.items():
            prefix = f"f{self._note(name, of_field)}"
            terms.append(prefix)
            numbers = {number_key(value) for value in of_field if not isinstance(value, str)}
            texts = sorted(value for value in of_field if isinstance(value, str))
            instants = filter(None, map(instant_of, texts))
            for kind, keys in (("n", numbers), ("t", map(text_key, texts)), ("i", map(text_key, instants))):
                _add_keys(f"{prefix}{kind}", sorted(set(keys)), terms, bounds)
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
    with connection.explained(f"cannot create {name}"):
        connection.client.create_collection(
            name, schema=schema, index_params=indexes, consistency_level="Strong", timeout=120.0
        )
