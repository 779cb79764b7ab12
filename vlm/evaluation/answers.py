"""What models answered, sample by sample, from the tables of all evaluators: which rows are wrong, and how badly."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.evaluation.comparison import KEY, sample_outcomes
from vlm.evaluation.measurement import Measurement, Value
from vlm.tensor_types import Array, Bool, Float64

# captions of all languages together, beside those of each language
_ALL_CAPTIONS = "all"
_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Rows that one kind of question was asked of.

    title: the direction of retrieval; empty where there is one kind only.
    table: `key`, and of `query`, `truth`, `prediction`, `prediction_key`, `rank`, `probability`, `reason` some.
    is_wrong: rows that are wrong, in words `noun`; badness: how much, larger is worse.
    """

    title: str
    table: pa.Table
    is_wrong: Bool[Array, " N"]
    badness: Float64[Array, " N"]
    noun: str = "wrong"

    @property
    def ranks(self) -> Float64[Array, " M"]:
        """Expected ranks of the best right answers, of the rows that have one; empty where none is known."""
        if "rank" not in self.table.column_names:
            return np.zeros(0)
        return self.table["rank"].drop_null().cast(pa.float64()).to_numpy()


def answers_of(measurement: Measurement) -> list[Answers]:
    """The answers of each direction of retrieval, or of a classifier, or the captions that were written."""
    table = measurement.samples
    if table is None or not table.num_rows:
        return []
    if "direction" in table.column_names:
        return [_of_direction(table, direction) for direction in table["direction"].unique().to_pylist()]
    if "truth" in table.column_names and "prediction" in table.column_names:
        return [_of_classifier(table)]
    if "caption" in table.column_names:
        return _of_captioner(measurement, table)
    if {"true", "false"} <= set(table.column_names):
        return _of_sentence_pairs(measurement, table)
    return []


def classified(measurement: Measurement) -> pa.Table | None:
    """The samples with a true class and a prediction; None for what is no classification.

    Its column `is_right` says whether the prediction is (one of) the true class(es).
    """
    table = measurement.samples
    if table is None or not {"truth", "prediction"} <= set(table.column_names) or "direction" in table.column_names:
        return None
    is_right = _is_right(table)
    known = pa.array(is_right, mask=~np.asarray(table["truth"].is_valid()))
    return table.append_column("is_right", known).filter(pc.field("is_right").is_valid())


def split_by_language(values: Mapping[str, Value]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The values of all languages together; and by language the names of its own, under the name of the former.

    >>> half = Value(value=0.5)
    >>> split_by_language({"recall@1": half, "de/recall@1": half, "top1": half, "top1/fr": half})
    (['recall@1', 'top1'], {'de': {'recall@1': 'de/recall@1'}, 'fr': {'top1': 'top1/fr'}})
    """
    plain: list[str] = []
    by_language: dict[str, dict[str, str]] = {}
    for name in values:
        before, _, after = name.partition("/")
        if after in values:
            by_language.setdefault(before, {})[after] = name
        elif before in values and after:
            by_language.setdefault(after, {})[before] = name
        else:
            plain.append(name)
    return plain, by_language


def _of_direction(table: pa.Table, direction: str) -> Answers:
    rows = table.filter(pc.field("direction") == direction)
    if "captions" in rows.column_names:
        rows = rows.filter(pc.field("captions") == _ALL_CAPTIONS)
    columns: dict[str, pa.ChunkedArray] = {KEY: rows[KEY]}
    # the best wrong candidate is the one ranked first where the right one is not
    names = {"query": "caption", "rank": f"{direction}_rank"}
    names |= {"prediction_key": "wrong_key"} if direction == "text_to_image" else {"prediction": "wrong_caption"}
    for name, column in names.items():
        if column in rows.column_names:
            columns[name] = rows[column]
    ranks = columns["rank"].cast(pa.float64()).fill_null(0.0).to_numpy()
    return Answers(
        title=_DIRECTIONS.get(direction, direction.replace("_", " ")),
        table=pa.table(columns),
        # a tie for the first rank has the expected rank 1.5
        is_wrong=np.asarray(ranks > 1),
        badness=ranks,
    )


def _of_classifier(table: pa.Table) -> Answers:
    known = [name for name in (KEY, "truth", "prediction", "rank", "probability") if name in table.column_names]
    is_wrong = ~_is_right(table) & np.asarray(table["truth"].is_valid())
    badness = np.zeros(table.num_rows)
    # the surest mistakes say more than the farthest ones
    for name in ("rank", "probability"):
        if name in known:
            badness = table[name].cast(pa.float64()).fill_null(0.0).to_numpy()
    return Answers(title="", table=table.select(known), is_wrong=is_wrong, badness=badness)


def _of_captioner(measurement: Measurement, table: pa.Table) -> list[Answers]:
    """Captions that are false, or where the main value is a degree the lower half by it."""
    outcomes = sample_outcomes(measurement, next(iter(measurement.values), ""))
    if outcomes is None or len(outcomes[1]) != table.num_rows:
        return []
    figures = outcomes[1]
    columns = {KEY: table[KEY], "prediction": table["caption"]}
    if "reason" in table.column_names:
        columns["reason"] = table["reason"]
    is_verdict = set(np.unique(figures)) <= {0.0, 1.0}
    is_wrong = figures < 1 if is_verdict else figures <= np.median(figures)
    noun = "wrong" if is_verdict else "in the lower half"
    return [Answers(title="", table=pa.table(columns), is_wrong=np.asarray(is_wrong), badness=-figures, noun=noun)]


def _of_sentence_pairs(measurement: Measurement, table: pa.Table) -> list[Answers]:
    """The false sentence was preferred to the true one."""
    outcomes = sample_outcomes(measurement, next(iter(measurement.values), ""))
    if outcomes is None or len(outcomes[1]) != table.num_rows:
        return []
    # a tie is half right
    columns = {KEY: table[KEY], "truth": table["true"], "prediction": table["false"]}
    return [Answers(title="", table=pa.table(columns), is_wrong=outcomes[1] < 1, badness=1 - outcomes[1])]


def _is_right(table: pa.Table) -> Bool[Array, " N"]:
    """Of several true classes any is right, as the column `correct` says where there is one."""
    if "correct" in table.column_names:
        return np.asarray(table["correct"].fill_null(False).to_numpy()).astype(bool)
    return np.asarray(table["truth"].to_numpy() == table["prediction"].to_numpy()).astype(bool)
