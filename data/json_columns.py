"""The JSON of samples as columns: every key in every sample, null where empty, the numbers of a column of one type.

Other readers of shards take JSON as a table whose types the first samples decide: Hugging Face datasets looks at five,
drops keys that come later and reads 6.9 as 6 in a column that began with whole numbers. Captions are a list in all
samples or lists by language in all.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm.data.samples import UNNAMED, Captions, DroppedValue, Words

# an object with more keys than this is a map of its own, such as scores by name, and no set of columns
MAX_KEYS = 1000
# a double holds every whole number up to it
_MAX_EXACT = 2**53
# columns that lost values are named up to so many
_NUM_NAMED = 5


@dataclass
class _Column:
    """What the values of one key have in common: fields if there are objects, items if there are lists."""

    has_whole: bool = False
    has_fraction: bool = False
    has_flag: bool = False
    has_text: bool = False
    smallest: int = 0
    largest: int = 0
    fields: "dict[str, _Column] | None" = None
    items: "_Column | None" = None

    def add(self, value: Any) -> None:
        """Take in one value."""
        if isinstance(value, str):
            self.has_text = True
        elif isinstance(value, bool):
            self.has_flag = True
        elif isinstance(value, float):
            self.has_fraction = True
        elif isinstance(value, int):
            self.has_whole = True
            self.smallest = min(self.smallest, value)
            self.largest = max(self.largest, value)
        elif isinstance(value, dict):
            self.fields = self.fields or {}
            for name, inner in value.items():
                # one more than the limit tells that it was passed; others are of no use
                if len(self.fields) <= MAX_KEYS or name in self.fields:
                    self.fields.setdefault(name, _Column()).add(inner)
        elif isinstance(value, list):
            self.items = self.items or _Column()
            for item in value:
                self.items.add(item)

    def merge(self, later: "_Column") -> None:
        """Take in the values of another one, which come after these."""
        self.has_whole |= later.has_whole
        self.has_fraction |= later.has_fraction
        self.has_flag |= later.has_flag
        self.has_text |= later.has_text
        self.smallest = min(self.smallest, later.smallest)
        self.largest = max(self.largest, later.largest)
        if later.fields is not None:
            self.fields = self.fields or {}
            for name, column in later.fields.items():
                if len(self.fields) <= MAX_KEYS or name in self.fields:
                    self.fields.setdefault(name, _Column()).merge(column)
        if later.items is not None:
            self.items = self.items or _Column()
            self.items.merge(later.items)

    @property
    def is_beyond_double(self) -> bool:
        """Whether some whole number is none that a float holds."""
        return max(self.largest, -self.smallest) > _MAX_EXACT

    def conform(self, value: Any) -> Any:
        """The value with all keys of the column's objects and its numbers as floats where some have a fraction."""
        if isinstance(value, int) and self.has_fraction and not self.is_beyond_double:
            return value if isinstance(value, bool) else float(value)
        if isinstance(value, dict) and self.fields:
            inner: dict[str, Any] = {}
            for name, item in value.items():
                inner[name] = self.fields[name].conform(item) if name in self.fields else item
            return inner | self._missing(inner)
        if isinstance(value, list) and self.items:
            return list(map(self.items.conform, value))
        return value

    def _missing(self, inner: Mapping[str, Any]) -> dict[str, Any]:
        if not self.fields or len(self.fields) > MAX_KEYS:
            return {}
        return dict.fromkeys(name for name in self.fields if name not in inner)

    @property
    def is_capped(self) -> bool:
        """Whether some object has more keys than are looked at."""
        fields = self.fields or {}
        inner = [*fields.values(), self.items] if self.items else fields.values()
        return len(fields) > MAX_KEYS or any(column.is_capped for column in inner)

    def feature(self) -> dict[str, Any] | None:
        """The type in the words of Hugging Face's dataset cards; None if no type holds all values."""
        kinds = (self.has_whole or self.has_fraction, self.has_flag, self.has_text, self.fields, self.items)
        if sum(kind not in (False, None) for kind in kinds) > 1 or self.differing(""):
            return None
        if self.fields is not None:
            return self._struct()
        if self.items is not None:
            return self._list()
        if self.has_fraction:
            return {"dtype": "float64"}
        if self.has_whole:
            is_signed = self.smallest >= -(2**63) and self.largest < 2**63
            is_unsigned = not self.smallest and self.largest < 2**64
            return {"dtype": "int64" if is_signed else "uint64"} if is_signed or is_unsigned else None
        if self.has_text:
            return {"dtype": "string"}
        return {"dtype": "bool" if self.has_flag else "null"}

    def _struct(self) -> dict[str, Any] | None:
        struct: list[dict[str, Any]] = []
        for name, column in (self.fields or {}).items():
            feature = column.feature()
            if feature is None:
                return None
            struct.append({"name": name} | feature)
        return {"struct": struct}

    def _list(self) -> dict[str, Any] | None:
        inner = self.items.feature() if self.items else None
        if inner is None:
            return None
        # a list of plain values or of objects names the type itself
        return {"list": next(iter(inner.values())) if "list" not in inner else inner}

    def differing(self, name: str) -> list[str]:
        """Names of columns, this one's and below, whose values stay of several types or have keys of their own."""
        names: list[str] = []
        if self.fields and len(self.fields) > MAX_KEYS:
            names.append(f"{name or 'the JSON'} (more than {MAX_KEYS:,} keys)")
        elif self.has_whole and self.has_fraction and self.is_beyond_double:
            names.append(f"{name} (fractions beside whole numbers that no float holds)")
        for inner, column in (self.fields or {}).items():
            names += column.differing(f"{name}.{inner}" if name else inner)
        return names + (self.items.differing(f"{name}[]") if self.items else [])


def _shortened(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


@dataclass
class JsonColumns:
    """The columns of the JSON of all samples that were added; without any, each sample is written as it is."""

    _metadata: _Column = field(default_factory=_Column)
    _languages: dict[str, None] = field(default_factory=dict)
    # some samples have captions in named languages only, which a list under `captions` cannot say
    _are_by_language: bool = False
    _dropped: Counter[str] = field(default_factory=Counter)
    _num_rows_cut: int = 0
    _first_dropped: DroppedValue | None = None

    def add(self, words: Words) -> None:
        """Take in one sample."""
        self._metadata.add(words.metadata)
        self._languages |= dict.fromkeys(words.captions)
        self._are_by_language |= bool(words.captions) and UNNAMED not in words.captions
        if words.dropped:
            self._dropped.update(words.dropped.columns)
            self._num_rows_cut += words.dropped.num_rows
            self._first_dropped = self._first_dropped or words.dropped.first

    def merge(self, later: "JsonColumns") -> None:
        """Take in the samples of another one, which come after these."""
        self._metadata.merge(later._metadata)
        self._languages |= later._languages
        self._are_by_language |= later._are_by_language
        self._dropped.update(later._dropped)
        self._num_rows_cut += later._num_rows_cut
        self._first_dropped = self._first_dropped or later._first_dropped

    @property
    def is_capped(self) -> bool:
        """Whether some object has so many keys that it matters in which order samples were added and merged."""
        return self._metadata.is_capped

    def warnings(self) -> tuple[str, ...]:
        """What could not be made alike, and for whom that matters; what was dropped."""
        return self._dropped_values() + self._differing_columns()

    def _dropped_values(self) -> tuple[str, ...]:
        first = self._first_dropped
        if first is None:
            return ()
        columns = ", ".join(f"{column} ({count:,})" for column, count in self._dropped.most_common(_NUM_NAMED))
        more = f" and {len(self._dropped) - _NUM_NAMED} more columns" if len(self._dropped) > _NUM_NAMED else ""
        rows = "1 row lost a value" if self._num_rows_cut == 1 else f"{self._num_rows_cut:,} rows lost values"
        return (
            f"{rows} because rows of one image become one sample, which has the metadata of the first: {columns}{more}"
            f"; {first.row} has {_shortened(first.value)} as {first.column}, and {first.image} keeps "
            f"{_shortened(first.first_value)}. To keep them, put the values of an image into one row, or name a copy "
            "of the image in each row.",
        )

    def _differing_columns(self) -> tuple[str, ...]:
        names = self._metadata.differing("")
        if not names:
            return ()
        return (
            f"{', '.join(names[:3])} differ from sample to sample and stay as they are; readers that make a table of "
            "the JSON, such as Hugging Face datasets, may change or drop their values.",
        )

    def feature(self) -> dict[str, Any] | None:
        """The type of the JSON in the words of Hugging Face's dataset cards; None if there is no single one.

        None as well if no samples were added.
        """
        if self._metadata.fields is None:
            return None
        whole = _Column(fields=dict(self._metadata.fields))
        # the texts do not matter, only that there are some under each language
        words = Words(dict.fromkeys(self._languages or {UNNAMED: None}, ("",)), {})
        whole.add(self.conform(words))
        return whole.feature()

    def conform(self, words: Words) -> dict[str, Any]:
        """The JSON of a sample.

        A column with fractions holds floats alone, unless one of its whole numbers is none that a float holds.
        """
        return self._metadata.conform(words.metadata) | self._conform_captions(words.captions)

    def _conform_captions(self, captions: Captions) -> dict[str, Any]:
        # its own languages first: the first one is the language of a sample that is asked for none
        texts = {language: list(captions.get(language, ())) for language in (*captions, *self._languages)}
        if self._are_by_language or (captions and UNNAMED not in captions):
            return {"captions": texts}
        unnamed = texts.pop(UNNAMED, [])
        return {"captions": unnamed} | {f"captions_{language}": named for language, named in texts.items()}
