"""A query and how people give one: its terms and options, its cursor, files of queries and of vectors; what embeds it.

A MODEL's ONNX export embeds queries where there is one that is up to date, which needs no torch; else torch does.
`VLM_BACKEND` says which of the two is meant: `onnx`, `torch`, or `auto`, the default.
"""

import base64
import binascii
import importlib.util
import json
import logging
import os
import shlex
import struct
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from vlm.config import number_list, suggest, text_list
from vlm.errors import UsageError, VlmError
from vlm.index.encoder import AnyEncoder, Encoder
from vlm.model_spec import MIRROR, export_folder, is_onnx_folder, split_model_spec
from vlm.models.onnx_encoder import OnnxEncoder, read_onnx_folder, stale_reason
from vlm.tensor_types import Array, Float32, Float64, UInt8

MAX_RERANK = 1000
"""Maximum number of images read to rerank one query."""

MIN_WEIGHT = 1e-6
MAX_WEIGHT = 1e6
"""Range of the absolute weights, in which single precision can sum the terms."""

MIN_PROBABILITY = 0.9
"""What `relevant` keeps by default: an unrelated query gets an answer one time in ten."""


_KINDS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("where", "words", "after"), ("a text", str)),
    **dict.fromkeys(("top", "rerank_top"), ("a whole number", Integral)),
    "diversity": ("a number", Real),
    **dict.fromkeys(("at_least", "duplicates", "relevant"), ("a number", Real | None)),
}
"""What each value of a query must be, in words and as a type."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to search for: the weighted sum of all texts, images, stored items and vectors, minus the `minus` texts.

    texts, items, minus: one or several; a single one needs no tuple.
    images: files, or encoded images as bytes. items: uids of rows of the index. vectors: .npy files of one vector, or
    its numbers; of the index's space, which cannot be checked. weights: one a term, in the order texts, images, items,
    vectors, minus; a negative one subtracts its term; empty weighs all equally. top: number of results.
    where: a filter (`vlm.index.filter_language`); empty searches all rows. at_least: minimum cosine of a result.
    words: captions with these words are boosted, by reciprocal rank fusion of the top results of full-text search and
        of the search by cosine; all others follow by cosine.
    duplicates: results whose cosine with a better one is at least this are counted, not shown; None shows all.
    diversity: from 0, relevance only, to 1, diversity only (`ranking.diversify`).
    rerank_top: number of top results ordered by likelihood (`ranking.Reranker`); 0 reranks none.
    relevant: results of at least this probability (`vlm.service.relevance`), which is a minimum cosine as `at_least`
        is, whatever boosts or orders them; True is `MIN_PROBABILITY`, None or False keeps all.
    after: the `next` of a result of this query, to get the next page.
    """

    texts: str | Sequence[str] = ()
    images: tuple[Path | bytes, ...] = ()
    items: str | Sequence[str] = ()
    vectors: tuple[Path | tuple[float, ...], ...] = ()
    minus: str | Sequence[str] = ()
    weights: tuple[float, ...] = ()
    top: int = 10
    where: str = ""
    at_least: float | None = None
    words: str = ""
    duplicates: float | None = None
    diversity: float = 0.0
    rerank_top: int = 0
    relevant: bool | float | None = None
    after: str = ""

    def __post_init__(self) -> None:
        """Make tuples of single terms: a text is a sequence too, of letters."""
        if isinstance(self.relevant, bool):
            object.__setattr__(self, "relevant", MIN_PROBABILITY if self.relevant else None)
        for name in ("texts", "items", "minus"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    @classmethod
    def of(cls, **values: Any) -> "Query":
        """A query of what people hand over, which may be of any kind.

        Raises:
            UsageError: a query has no value of that name, or it is of another kind.
        """
        names = [attribute.name for attribute in fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise UsageError(f"A query has no option {name!r}; {suggest(name, names)}")
            if name in ("texts", "items", "minus"):
                values[name] = tuple(text_list(value, name))
            elif name == "weights":
                values[name] = tuple(number_list(value, name))
            elif name in _KINDS:
                expected, kind = _KINDS[name]
                # bool is a subclass of int
                is_switch = name == "relevant" and isinstance(value, bool)
                if not is_switch and (isinstance(value, bool) or not isinstance(value, kind)):
                    raise UsageError(f"{name} = {value!r} is not {expected}.")
        return cls(**values)

    def check(self) -> None:
        """Refuse a query that cannot be searched for.

        Raises:
            UsageError: it has no positive term, or a value is out of range.
        """
        self.signed_weights()
        self._check_unicode()
        if self.top < 1:
            raise UsageError(f"top = {self.top} is out of range: request at least one result.")
        if self.words and not self.words.strip():
            raise UsageError("The words of the query are empty.")
        if not 0 <= self.diversity <= 1:
            raise UsageError(f"diversity = {self.diversity} is outside 0 to 1.")
        if self.at_least is not None and not -1 <= self.at_least <= 1:
            raise UsageError(f"at_least = {self.at_least}: the minimum cosine must be in -1 to 1.")
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise UsageError(f"duplicates = {self.duplicates}: the cosine must be above 0 and at most 1.")
        self._check_rerank()
        self._check_relevant()

    def signed_weights(self) -> list[float]:
        """The factor of each term in the order texts, images, items, vectors, minus; negative for minus terms.

        Raises:
            UsageError: there is no term to search for, or the weights do not fit the terms.
        """
        num_terms = self.num_terms
        num_plus = num_terms - len(self.minus)
        if not num_plus:
            raise UsageError("A query needs a text, image, item or vector to search for; minus alone is not enough.")
        if not all(map(str.strip, (*self.texts, *self.minus))):
            raise UsageError("A text of the query is empty.")
        weights = self.weights or (1.0,) * num_terms
        magnitudes = [abs(float(weight)) for weight in weights]
        if len(weights) != num_terms or not all(0 < magnitude < inf for magnitude in magnitudes):
            raise UsageError(f"{num_terms} terms need as many weights that are not 0, given: {list(weights)}.")
        if min(magnitudes) < MIN_WEIGHT or max(magnitudes) > MAX_WEIGHT:
            raise UsageError(
                f"Weights {list(weights)}: without its sign each must be from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}; only "
                "their ratios count."
            )
        plus_weights = list(weights[:num_plus])
        minus_weights = list(weights[num_plus:])
        # what is farthest from a text is arbitrary: at least one term must say what to look for
        if min(minus_weights, default=1.0) < 0 or max(plus_weights) < 0:
            raise UsageError(
                f"Weights {list(weights)}: those of minus terms must be above 0, and so must one of the others."
            )
        return plus_weights + [-weight for weight in minus_weights]

    @property
    def num_terms(self) -> int:
        """Texts, images, items, vectors and minus texts together."""
        return sum(map(len, (self.texts, self.images, self.items, self.vectors, self.minus)))

    @property
    def is_plain(self) -> bool:
        """Whether the results are the nearest rows in their order."""
        return not (self.words or self.diversity or self.duplicates is not None or self.rerank_top)

    def digest(self, *, reranker: str = "") -> int:
        """CRC-32 of all that determines the order of the results; images count by their bytes or by their names.

        reranker: fingerprint of the model that reranks.
        """
        images = [zlib.crc32(image) if isinstance(image, bytes) else str(image) for image in self.images]
        vectors = [str(vector) if isinstance(vector, Path) else list(vector) for vector in self.vectors]
        # top and after differ from page to page of one query
        values = self.to_json() | {"images": images, "vectors": vectors, "reranker": reranker, "top": 0, "after": ""}
        return zlib.crc32(json.dumps(values, sort_keys=True).encode())

    def describe(self) -> str:
        """The terms as a sum.

        >>> Query(texts=("a dog", "snow"), items=("a/7",), minus=("a cat",), weights=(1, -1, 1, 1)).describe()
        'a dog + a/7 − snow − a cat'
        """
        names = list(self.texts)
        for image in self.images:
            names.append("an image" if isinstance(image, bytes) else image.name)
        names += self.items
        for vector in self.vectors:
            names.append(vector.name if isinstance(vector, Path) else "a vector")
        names += self.minus
        plus: list[str] = []
        minus: list[str] = []
        for name, weight in zip(names, self.signed_weights(), strict=True):
            (plus if weight > 0 else minus).append(name)
        return " − ".join([" + ".join(plus), *minus])

    def to_json(self) -> dict[str, Any]:
        """Plain values; images given as bytes and vectors given as numbers are shown by their sizes."""
        images: list[str] = []
        for image in self.images:
            images.append(f"({len(image):,} bytes)" if isinstance(image, bytes) else str(image))
        vectors: list[str] = []
        for vector in self.vectors:
            vectors.append(str(vector) if isinstance(vector, Path) else f"({len(vector):,} numbers)")
        values = {
            "texts": list(self.texts),
            "images": images,
            "items": list(self.items),
            "vectors": vectors,
            "minus": list(self.minus),
            "weights": self.signed_weights(),
        }
        for name in ("top", "where", "at_least", "words", "duplicates", "diversity", "rerank_top", "after"):
            values[name] = getattr(self, name)
        # only where it is asked for, so that cursors of all other queries stay valid
        if self.relevant is not None:
            values["relevant"] = self.relevant
        return values

    def _check_unicode(self) -> None:
        for text in (*self.texts, *self.minus):
            # from a command line in another encoding; tokenizers and SQLite would fail without naming the text
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{text!r} is not Unicode text: its character {error.start + 1} is half of a surrogate pair, or a "
                    "byte that is not UTF-8; give the text as UTF-8."
                ) from error

    def _check_rerank(self) -> None:
        if not 0 <= self.rerank_top <= MAX_RERANK:
            raise UsageError(f"rerank_top = {self.rerank_top} is out of range: 0 to {MAX_RERANK:,} can be reranked.")
        if self.rerank_top and not self.texts:
            raise UsageError("Reranking needs a text, whose likelihood given an image it uses; this query has no text.")
        if self.rerank_top and self.diversity:
            raise UsageError("Reranking orders by likelihood, diversity by dissimilarity: use one of them.")

    def _check_relevant(self) -> None:
        if self.relevant is None:
            return
        if not 0 < self.relevant < 1:
            raise UsageError(f"relevant = {self.relevant}: the probability must be above 0 and below 1.")
        if self.vectors:
            raise UsageError(
                "What is relevant to a vector is unknown, since it does not say whether it is of a text or an image: "
                "omit relevant, or give a minimum cosine."
            )
        has_words = bool(self.texts or self.minus)
        if has_words and (self.images or self.items):
            raise UsageError(
                "What is relevant is calibrated for words and for images, not for a sum of both: use one of them, omit "
                "relevant, or give a minimum cosine."
            )


# big-endian without padding, so that a cursor is the same on every machine; the score has all bits of a float32
# cosine, since the next page compares it for equality
_CURSOR = struct.Struct(">IIIIfq")


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The last result shown, from which the next page starts.

    generation, first: version of the index, and page size, when the first page was shown.
    query_digest: of `Query.digest`. seen: results shown so far. score, row: of the last of them.
    """

    generation: int
    query_digest: int
    first: int
    seen: int
    score: float
    row: int

    def to_token(self) -> str:
        """As letters, digits, - and _.

        >>> cursor = Cursor(generation=1, query_digest=2, first=10, seen=10, score=0.5, row=7)
        >>> Cursor.from_token(cursor.to_token()) == cursor
        True
        """
        packed = _CURSOR.pack(self.generation, self.query_digest, self.first, self.seen, self.score, self.row)
        return base64.urlsafe_b64encode(packed).decode()

    @classmethod
    def from_token(cls, token: str) -> "Cursor":
        """The inverse of `to_token`.

        Raises:
            UsageError: the token is malformed.
        """
        try:
            packed = base64.b64decode(token, b"-_", validate=True)
            generation, query_digest, first, seen, score, row = _CURSOR.unpack(packed)
        except (binascii.Error, struct.error, ValueError) as error:
            raise UsageError(f"{token!r} is not a cursor; copy it from the page before, or omit it.") from error
        return cls(generation=generation, query_digest=query_digest, first=first, seen=seen, score=score, row=row)


def load_query_vector(vector: Path | Sequence[float], dimension: int) -> Float32[Array, " D"]:
    """The vector scaled to unit length; of a file the only row.

    Raises:
        UsageError: the file is not a vector, or the vector has another dimension, is zero or not finite.
    """
    if isinstance(vector, Path):
        name = str(vector)
        rows = read_vectors(vector)
        if len(rows) != 1:
            raise UsageError(f"{vector} holds {len(rows):,} vectors; a query takes one, --queries takes them all.")
        numbers = rows[0]
    else:
        name = "The vector"
        numbers = np.asarray(vector, np.float64)
    if len(numbers) != dimension:
        raise UsageError(f"{name} has {len(numbers)} numbers; the rows of this index have {dimension}.")
    largest = float(np.abs(numbers).max())
    if not (np.isfinite(largest) and largest > 0):
        raise UsageError(f"{name} has length {largest}: it must be finite and not zero.")
    # the square of a number such as 1e200 is not finite
    scaled = numbers / largest
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)


def read_vectors(path: Path) -> Float64[Array, "N D"]:
    """The rows of an .npy file, which is a matrix or one vector.

    Raises:
        UsageError: it cannot be read or holds something else.
    """
    try:
        # a pickle could run code of whoever sent the file
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npy: {error}.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise UsageError(f"{path} holds no vectors: a matrix of numbers or one row of them is needed.")
    return np.atleast_2d(array).astype(np.float64)


def queries_from_vectors(path: Path, defaults: Query) -> dict[str, Query]:
    """A query for each row of an .npy file, by the row's name; the other fields are those of `defaults`.

    Raises: as of `read_vectors`.
    """
    queries = {}
    for number, row in enumerate(read_vectors(path).tolist()):
        queries[f"Row {number} (from 0) of {path}"] = replace(defaults, vectors=(tuple(row),))
    return queries


def read_queries(lines: Iterable[str], defaults: Query) -> dict[str, Query]:
    """A query for each line that is not empty, by the line's name; missing fields are those of `defaults`.

    A line is a text, or a JSON object with the fields of a query.

    >>> read_queries(["a dog", "", '{"texts": ["a cat"], "top": 3}'], Query())["Line 3 of the queries"].top
    3

    Raises:
        UsageError: a line is not a query; its number is named.
    """
    queries = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"Line {number} of the queries"
        try:
            query = _parse_query(line.strip(), defaults)
            query.check()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        queries[name] = query
    return queries


def _parse_query(line: str, defaults: Query) -> Query:
    if not line.startswith("{"):
        return replace(defaults, texts=(line,))
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it begins like a JSON object but is not one ({error}).") from error
    values_set: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _FIELDS:
            raise UsageError(f"a query has no {name!r}; {suggest(name, list(_FIELDS))}")
        is_valid, expected, convert = _FIELDS[name]
        if not is_valid(value):
            raise UsageError(f"{name} must be {expected}, given: {value!r}.")
        values_set[name] = convert(value)
    return replace(defaults, **values_set)


def _is_number(value: Any) -> bool:
    # bool is a subclass of int; JSON has whole numbers too large for a float, and Python reads NaN and Infinity, which
    # no comparison with a finite number lets through
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _to_texts(texts: str | list[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


def _to_paths(names: list[str]) -> tuple[Path, ...]:
    return tuple(map(Path, names))


def _to_floats(numbers: list[float]) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def _to_vectors(vectors: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(_to_floats, vectors))


_TEXTS = (lambda value: _is_text(value) or _is_list_of(_is_text)(value), "a text or a list of texts", _to_texts)
_TEXT = (_is_text, "a text", str)
_NUMBER = (_is_number, "a number", float)
_INTEGER = (_is_integer, "a whole number", int)
_SWITCH = (lambda value: isinstance(value, bool) or _is_number(value), "true, false or a number", lambda value: value)

_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    "texts": _TEXTS,
    "images": (_is_list_of(_is_text), "a list of files", _to_paths),
    "items": _TEXTS,
    "vectors": (_is_list_of(_is_list_of(_is_number)), "a list of lists of numbers", _to_vectors),
    "minus": _TEXTS,
    "weights": (_is_list_of(_is_number), "a list of numbers", _to_floats),
    "top": _INTEGER,
    "where": _TEXT,
    "at_least": _NUMBER,
    "words": _TEXT,
    "duplicates": _NUMBER,
    "diversity": _NUMBER,
    "rerank_top": _INTEGER,
    "relevant": _SWITCH,
    "after": _TEXT,
}
"""For each field of a query in JSON: whether a value is valid, what is expected, and how it is converted."""


logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "onnx"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "onnx")
BACKEND_VARIABLE = "VLM_BACKEND"


def chosen_backend(option: str = "") -> Backend:
    """The backend of an option, else of the environment, else auto.

    Raises:
        UsageError: it is none of them.
    """
    name = option or os.environ.get(BACKEND_VARIABLE, "") or "auto"
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise UsageError(f"There is no backend {name!r} ({BACKEND_VARIABLE}); {suggest(name, BACKENDS)}.")


def load_encoder(spec: str, *, device: str = "auto", precision: str = "fp32") -> Encoder:
    """A MODEL by torch; arguments and errors as of `load_model`."""
    # here, since most searches need no torch, which takes seconds to load
    from vlm.models.load import load_model

    return cast(Encoder, load_model(spec, device=device, precision=precision))


def load_query_encoder(
    spec: str,
    *,
    backend: str = "",
    prefers_gpu: bool = False,
    load: Callable[[str], Encoder] = load_encoder,
    verify: bool = False,
) -> AnyEncoder:
    """What embeds the queries of a MODEL on this machine.

    prefers_gpu: torch is taken where there is a GPU: for many queries or images at once. load: the model by torch.
    verify: read the export's files and compare their checksums, which a search has no time for.

    Raises:
        UsageError: there is no such model, or the backend is `onnx` and there is no export that is up to date.
        VlmError: the model, or the export that was asked for, is damaged.
    """
    choice = chosen_backend(backend)
    if choice == "torch" or (choice == "auto" and prefers_gpu and has_gpu()):
        return load(spec)
    try:
        return open_export(spec, verify=verify)
    except VlmError as error:
        if choice == "onnx":
            raise
        reason = error
    encoder = load(spec)
    # after the model: where there is none, that is all there is to say
    log_unused_export(reason)
    return encoder


def log_unused_export(reason: VlmError) -> None:
    """Say why torch is used: a damaged export is a warning, one that was never made is not."""
    if isinstance(reason, UsageError):
        logger.info(str(reason))
    else:
        logger.warning(f"Torch is used instead of the ONNX export: {reason}")


def export_or_torch(backend: str, *, device: str, precision: str, needs_network: bool = False) -> Backend:
    """The backend for many rows: `torch` where an export cannot do what is asked, `onnx` where one must be used.

    `auto` is left where an export may be used if there is one. An export runs on the CPU, in float32.
    needs_network: more than unit vectors is asked of the model.

    Raises:
        UsageError: there is no such backend, or `onnx` is asked for and cannot do the rest.
    """
    choice = chosen_backend(backend)
    is_elsewhere = device not in ("auto", "cpu")
    if choice == "onnx" and is_elsewhere:
        raise UsageError(f"An ONNX export runs on the CPU: leave --device {device} out, or choose --backend torch.")
    if choice == "onnx" and precision != "fp32":
        raise UsageError(
            f"An ONNX export computes in float32: leave --precision {precision} out, or choose --backend torch."
        )
    if choice == "onnx":
        return choice
    takes_gpu = is_elsewhere or (device == "auto" and has_gpu())
    return "torch" if takes_gpu or needs_network or precision != "fp32" else choice


def load_bulk_encoder(
    spec: str, *, device: str, precision: str, backend: Backend | Literal[""], needs_network: bool
) -> AnyEncoder:
    """What embeds many images and texts of a MODEL: its ONNX export where that gives the same figures or is asked for.

    An export runs on the CPU, in float32, and gives unit vectors alone; for anything else (a device, a precision, or
    `needs_network`: more is asked of the model) torch is taken.

    Raises: as of `load_query_encoder` and `export_or_torch`.
    """
    from_torch = partial(load_encoder, device=device, precision=precision)
    choice = export_or_torch(backend, device=device, precision=precision, needs_network=needs_network)
    encoder = load_query_encoder(spec, backend=choice, load=from_torch, verify=True)
    if not isinstance(encoder, OnnxEncoder):
        return encoder
    is_rounded = encoder.export.details.precision != "float32"
    # the figures are those of the model itself unless its int8 export was asked for
    if is_rounded and choice == "auto" and not is_onnx_folder(Path(spec)):
        return from_torch(spec)
    logger.info(f"{spec} is run by its ONNX export ({encoder.export.details.precision}).")
    return replace(encoder, is_bulk=True)


def query_loader(*, backend: str = "", prefers_gpu: bool = False) -> "partial[AnyEncoder]":
    """`load_query_encoder` with its options set.

    Raises:
        UsageError: there is no such backend.
    """
    return partial(load_query_encoder, backend=chosen_backend(backend), prefers_gpu=prefers_gpu)


def open_export(spec: str, *, verify: bool = False) -> OnnxEncoder:
    """The ONNX export of a MODEL; with `verify` the checksums of its files are compared, not only sizes.

    Raises:
        UsageError: there is none, it is out of date, or onnxruntime is missing. VlmError: it is damaged.
    """
    model, variants = _split_variants(spec)
    is_mirrored = variants[:1] == [MIRROR]
    cuts = variants[is_mirrored:]
    # of vectors that are cut before something else is done to them: another space than #mirror#64
    if len(cuts) > 1:
        raise UsageError(
            f"An ONNX export serves {model}, {model}#64, {model}#mirror and {model}#mirror#64; {spec} is embedded by "
            "torch."
        )
    folder = export_folder(model)
    command = f"vlm export {shlex.quote(model)} --to onnx"
    if not is_onnx_folder(folder):
        raise UsageError(
            f"{model} has no ONNX export, with which embed, search and eval start without torch: {command}"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(f"The ONNX export of {model} needs onnxruntime: pip install 'vlm-pipeline[onnx]'.")
    export = read_onnx_folder(folder, verify=verify)
    if reason := stale_reason(export):
        raise UsageError(
            f"The ONNX export of {model} is not used: {reason} since it was made. Make it again: {command}"
        )
    dimensions = int(cuts[0]) if cuts else None
    return OnnxEncoder(name=model, export=export, dimensions=dimensions, is_mirrored=is_mirrored)


def _split_variants(spec: str) -> tuple[str, list[int | Literal["mirror"]]]:
    """The model and its variants, in the order in which they are made of each other."""
    variants: list[int | Literal["mirror"]] = []
    model, variant = split_model_spec(spec)
    while variant is not None:
        variants.insert(0, variant)
        model, variant = split_model_spec(model)
    return model, variants


def open_bulk_export(spec: str) -> OnnxEncoder:
    """The ONNX export of a MODEL, for many rows; its files are read once to compare their checksums.

    Raises: as of `open_export`.
    """
    return replace(open_export(spec, verify=True), is_bulk=True)


def embed_pixels(encoder: AnyEncoder, pixels: UInt8[Array, "B 3 H W"]) -> Float32[Array, "B D"]:
    """Unit vectors of images as the encoder's `view` gives them."""
    if isinstance(encoder, OnnxEncoder):
        return encoder.embed_images(pixels)
    import torch

    return encoder.embed_images(torch.from_numpy(pixels)).numpy()


def embed_query_texts(encoder: AnyEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
    """Unit vectors of texts."""
    return np.asarray(encoder.embed_texts(texts))


def has_gpu() -> bool:
    """Whether this machine has a GPU, as far as can be told without torch."""
    # without torch, whose answer would cost more than the GPU saves
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and Path("/dev/nvidia0").exists()


class TextCache:
    """The vectors of the last texts that were embedded; the same text is embedded once. Several threads may share it.

    hits, misses: texts found and not found.
    """

    def __init__(self, size: int) -> None:
        self.hits = 0
        self.misses = 0
        self._size = size
        self._vectors: OrderedDict[str, Float32[Array, " D"]] = OrderedDict()
        self._lock = threading.Lock()

    def embed(self, encoder: AnyEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """Unit vectors of texts; always of the same encoder."""
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
            for text in known:
                self._vectors.move_to_end(text)
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        self.hits += len(texts) - len(missing)
        self.misses += len(missing)
        if missing:
            rows = embed_query_texts(encoder, missing)
            known |= zip(missing, rows, strict=True)
            self._remember(missing, rows)
        return np.stack([known[text] for text in texts])

    def _remember(self, texts: Sequence[str], rows: Float32[Array, "T D"]) -> None:
        with self._lock:
            for text, row in zip(texts, rows, strict=True):
                # a view would keep the vectors of its whole batch for as long
                self._vectors[text] = row.copy()
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)
