"""How captions are written: greedily, by beam search, or sampled."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How captions are written; by default greedily, one for each image.

    Raises:
        UsageError: an option is out of range, or does not go with another.
    """

    prompt: str = ""
    """Prefix of every caption, e.g. "a picture of"."""

    captions: int = 1
    """Captions for each image, the best first; without --sample at most as many as there are beams."""

    beams: int = 1
    """Width of beam search; 1 is greedy."""

    beam_groups: int = 1
    """Groups of beams that are pushed apart (diverse beam search, Vijayakumar et al. 2016)."""

    diversity_penalty: float = 0.5
    """What a token costs each time an earlier group wrote it at the same place."""

    length_penalty: float = 1.0
    """A beam is worth its log-probability over its length to this power: 1 is the mean, 0 prefers short captions."""

    sample: bool = False
    """Draw tokens at random instead of the likeliest; what is drawn depends on the image and --seed alone."""

    temperature: float = 1.0
    """Sampling: below 1 likely tokens become likelier."""

    top_k: int = 0
    """Sampling: draw from the K likeliest tokens; 0 from all."""

    top_p: float = 1.0
    """Sampling: draw from the fewest tokens that hold this probability (nucleus sampling, Holtzman et al. 2020)."""

    min_length: int = 0
    """Fewest tokens of a caption, start and end token counted."""

    max_length: int = 0
    """Most tokens of a caption, start and end token counted; 0 is the model's context length."""

    repetition_penalty: float = 1.0
    """Factor for log-probabilities of tokens that the caption holds already (CTRL, Keskar et al. 2019)."""

    no_repeat_ngram: int = 0
    """Never write this many tokens in a row twice; 0 allows it."""

    seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        for name, least in (
            ("captions", 1),
            ("beams", 1),
            ("beam_groups", 1),
            ("top_k", 0),
            ("no_repeat_ngram", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)} is out of range: give {least} or more.")
        for name in ("temperature", "repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)} is out of range: give a number above 0.")
        if not 0 <= self.diversity_penalty < math.inf:
            raise UsageError(f"diversity_penalty = {self.diversity_penalty} is out of range: give 0 or more.")
        if not math.isfinite(self.length_penalty):
            raise UsageError(f"length_penalty = {self.length_penalty} is out of range: give a finite number.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} is out of range: give a probability above 0, at most 1.")
        self._check_lengths()
        self._check_search()

    def _check_lengths(self) -> None:
        if self.max_length and self.max_length < 2:
            raise UsageError(f"max_length = {self.max_length} holds no token after the start token; give 2 or more.")
        if self.min_length < 0 or self.max_length < 0:
            raise UsageError(f"min_length = {self.min_length}, max_length = {self.max_length}: give 0 or more.")
        if self.max_length and self.min_length > self.max_length:
            raise UsageError(f"min_length = {self.min_length} is above max_length = {self.max_length}.")

    def _check_search(self) -> None:
        if self.sample and self.beams > 1:
            raise UsageError(f"beams = {self.beams} and sample exclude each other; give one of them.")
        # refused rather than ignored: the captions would not be what was asked for
        if not self.sample and (self.temperature != 1 or self.top_k or self.top_p < 1):
            raise UsageError("temperature, top_k and top_p are of sampling; give sample (--sample), too.")
        if not self.sample and self.captions > self.beams:
            raise UsageError(
                f"captions = {self.captions} need as many beams, and there are {self.beams}: give beams = "
                f"{self.captions} (--beams {self.captions}), or sample."
            )
        # groups are advanced as one tensor, so they are of one size
        if self.beams % self.beam_groups:
            raise UsageError(f"beams = {self.beams} are not {self.beam_groups} groups of one size; change one of them.")

    def to_values(self) -> dict[str, Any]:
        """Plain values, as a manifest records them."""
        return asdict(self)
