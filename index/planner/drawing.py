"""The sample a plan is made on: rows to index, and questions that are not among them."""

from dataclasses import dataclass

import numpy as np

from vlm.errors import UsageError
from vlm.index.embeddings import Embeddings, unit_rows
from vlm.index.parts import open_vectors
from vlm.index.planner.recall import exact_scores
from vlm.tensors import Array, Float, Float32, Int64

# of the sample's rows, at most so large a part is kept out of the index to ask with
_HELD_OUT_SHARE = 0.1
# answers whose recall is shown
SHOWN = (1, 10, 100)


class DrawnRows:
    """Rows in memory, in the form a kind asks for them. stored: the same as float16, as an index folder keeps them."""

    def __init__(self, vectors: Float32[Array, "N D"]) -> None:
        self.vectors, self.stored = vectors, vectors.astype(np.float16)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """Distinct rows drawn evenly."""
        return self.vectors[np.sort(np.random.default_rng(seed).permutation(len(self))[:count])]

    def part(self, share: float) -> "DrawnRows":
        """The first rows; as the rows are in random order, any of them are as good."""
        return DrawnRows(self.vectors[: max(1, round(len(self) * share))])


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions with the truth about the rows. scores: exact cosines of the nearest rows, best first."""

    direction: str
    vectors: Float32[Array, "Q D"]
    scores: Float32[Array, "Q K"]

    @classmethod
    def ask(cls, direction: str, vectors: Float32[Array, "Q D"], rows: DrawnRows, top: int) -> "Questions":
        """The truth by comparing with every row."""
        blocks = (rows.vectors[first : first + 65_536] for first in range(0, len(rows), 65_536))
        return cls(direction=direction, vectors=vectors, scores=exact_scores(blocks, vectors, top))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Rows to index, questions to tune with, and questions of each direction to judge by.

    judge: the first direction is the one the promise is about, whose questions are none of those tuned with.
    """

    rows: DrawnRows
    tune: Float32[Array, "Q D"]
    judge: dict[str, Float32[Array, "P D"]]

    @property
    def promised(self) -> str:
        """The direction the promise is about."""
        return next(iter(self.judge))


def draw(source: Embeddings, texts: Embeddings | None, *, max_rows: int, max_questions: int, seed: int) -> Drawn:
    """A random sample of the rows, some of them held out to ask with, and the questions of `texts` in two halves.

    All texts of one sample come into the same half. Without texts the held-out rows are tuned with and judged by.

    Raises:
        UsageError: texts of another model or dimension, or too few rows or texts to hold any out.
    """
    generator = np.random.default_rng(seed)
    sample = generator.permutation(source.sample(max_rows, seed=seed))
    held = min(max_questions, int(len(sample) * _HELD_OUT_SHARE))
    if held < 2:
        raise UsageError(f"{len(sample)} rows are too few to plan with; name the kind flat, which is exact.")
    own = f"{source.space.modality}→{source.space.modality}"
    asked, rows = sample[:held], DrawnRows(sample[held:])
    if texts is None:
        return Drawn(rows=rows, tune=asked[::2], judge={own: asked[1::2]})
    _check_space(source, texts)
    tune, judge = _two_halves(texts, max_questions, generator)
    across = f"{texts.space.modality}→{source.space.modality}"
    if across == own:
        across = f"other {own}"
    return Drawn(rows=rows, tune=tune, judge={across: judge, own: asked})


def vectors_at(embeddings: Embeddings, numbers: Int64[Array, " N"]) -> Float32[Array, "N D"]:
    """The rows of these numbers, which must ascend."""
    starts = np.cumsum([0, *(part.rows for part in embeddings.parts)])
    cuts = np.searchsorted(numbers, starts)
    taken: list[Float[Array, "N D"]] = [
        open_vectors(embeddings.folder, part)[numbers[low:high] - start]
        for part, start, low, high in zip(embeddings.parts, starts[:-1], cuts[:-1], cuts[1:], strict=True)
    ]
    return unit_rows(np.concatenate(taken))


def _two_halves(
    texts: Embeddings, count: int, generator: np.random.Generator
) -> tuple[Float32[Array, "Q D"], Float32[Array, "P D"]]:
    places: dict[tuple[str, int], int] = {}
    samples = np.fromiter(
        (places.setdefault((origin.shard, origin.number), len(places)) for origin in texts.origins()),
        np.int64,
        len(texts),
    )
    half_of = generator.permutation(len(places)) % 2
    halves = []
    for half in (0, 1):
        numbers = np.flatnonzero(half_of[samples] == half)
        if not len(numbers):
            raise UsageError(f"{texts.folder} has texts of {len(places)} sample; two at least are needed to plan with.")
        halves.append(vectors_at(texts, np.sort(generator.permutation(numbers)[: max(1, count)])))
    return halves[0], halves[1]


def _check_space(source: Embeddings, texts: Embeddings) -> None:
    if texts.space.fingerprint != source.space.fingerprint:
        raise UsageError(
            f"{texts.folder} was embedded by {texts.space.model} (fingerprint {texts.space.fingerprint}), "
            f"{source.folder} by {source.space.model} (fingerprint {source.space.fingerprint}); "
            "embed both with one model."
        )
    if texts.dimension != source.dimension:
        raise UsageError(f"{texts.folder} has {texts.dimension} dimensions, {source.folder} {source.dimension}.")
