"""Settings of both sides of the quality benchmark: the one place where its recipes are tuned.

The options are those of `vlm train` (ours) or of `open_clip_train.main` (theirs), with placeholders {tokenizer}: the
vocabulary trained on the data set; {first_captions}: its training shards with only the first caption of each image;
{warmup}: a tenth of the steps.
"""

from dataclasses import dataclass

EPOCHS: dict[str, int] = {"fashion": 4, "flickr8k": 12}
"""Epochs on each data set, the same for both sides."""

BATCH_SIZE = 256

LABELS: dict[str, str] = {"fashion": "articleType"}
"""Metadata field whose values are classified zero-shot, from bare class names."""

OURS: dict[str, list[str]] = {
    "fashion": ["--architecture", "small", "--ema-decay", "0", "--warmup-steps", "{warmup}", "--flip", "0"],
    "flickr8k": [],
}
"""Options added to `vlm train PRESET` by data set: open_clip does not have fashion's own text tower, and so few
steps need a shorter warm-up, no EMA and no flips."""

OPEN_CLIP: list[str] = ["--warmup", "{warmup}", "--beta2", "0.98", "--eps", "1e-6"]
"""Changes to open_clip's defaults: its warm-up of 10,000 steps is longer than the whole run, and its AdamW is
that of CLIP (the default where a network's name holds "vit"; for other names it is 0.999 and 1e-8)."""

_ONE_RATE = ["--embedding-lr-mult", "1", "--norm-lr-mult", "1", "--conv-lr-mult", "1", "--logit-scale-lr-mult", "1"]
_ADAMW_WORDS = "--optimizer adamw --weight-decay 0.2 --beta1 0.9 --beta2 0.98 --epsilon 1e-6 --learning-rate 5e-4"
_ADAMW = [*_ADAMW_WORDS.split(), *_ONE_RATE]

ABLATIONS: dict[str, list[str]] = {
    "learning rate 5e-4": ["--learning-rate", "5e-4"],
    "AdamW as CLIP's": _ADAMW,
    "one learning rate for all weights": _ONE_RATE,
    "warm-up of a tenth": ["--warmup-steps", "{warmup}"],
    "no gradient clipping": ["--grad-clip-norm", "0"],
    "no EMA": ["--ema-decay", "0"],
    "crops of nine tenths": ["--crop-scale", "0.9", "1.0"],
    "no flips": ["--flip", "0"],
    "first caption only": ["--data", "{first_captions}"],
    "CLIP's BPE": ["--tokenizer", "clip"],
    "CLIP's loss": ["--objective", "clip"],
    "same pairs as negatives": ["--same-pairs", "negative"],
    "no dropout": ["--dropout", "0", "--drop-path", "0", "--patch-dropout", "0"],
}
"""Each reverts one of our defaults to open_clip's; settings unchanged by a recipe are omitted from its table."""

EVERYTHING = "all of these at once"
"""Ours with all of the above reverted: the remaining difference is due to the trainers."""

THEIR_VARIANTS: dict[str, list[str]] = {"learning rate 2e-3": ["--lr", "2e-3"]}
"""open_clip with one of our settings, to show how much a tuned baseline would gain."""

LINEAR: dict[str, dict[str, tuple[float, float, float, float | None]]] = {
    "fashion": {
        "linear (linear_baseline.py)": (0.310, 0.589, 0.743, 0.580),
        "linear (README, other split)": (0.202, 0.522, 0.690, 0.517),
    }
}
"""Text→image recall@1, 5, 10 and zero-shot top-1 of linear baselines, from docs/benchmarks.md."""


@dataclass(frozen=True, kw_only=True)
class OwnChoice:
    """Ours where each side trains the network it likes (time to quality): the preset, and options added to it.

    short_words: added in runs too short for the preset's own warm-up, average and flips. full_words: added in the run
    of `full_epochs`, which is meant to take open_clip's time on two cores. pretrained: the preset, batch size and
    epochs of a run that begins with weights trained by others.
    """

    preset: str
    words: tuple[str, ...] = ()
    short_words: tuple[str, ...] = ("--warmup-steps", "{warmup}", "--ema-decay", "0")
    full_words: tuple[str, ...] = ()
    full_epochs: int
    pretrained: tuple[str, int, int] | None = None


_SMALL_KERNELS = "timm:test_convnext3,overrides={'kernel_sizes':(3,3,3,3)}+bag@192"
_FIELDS = ("gender", "baseColour", "articleType", "usage", "season", "year")
_TWICE_AS_WIDE = "timm:test_convnext3,overrides={'kernel_sizes':(3,3,3,3),'dims':(64,128,192,256)}+bag@192"

OWN_CHOICE: dict[str, OwnChoice] = {
    "fashion": OwnChoice(
        preset="fashion",
        words=("--architecture", _SMALL_KERNELS, "--channels-last"),
        short_words=("--warmup-steps", "{warmup}", "--ema-decay", "0", "--flip", "0"),
        full_words=("--architecture", _TWICE_AS_WIDE, "--languages", "en", "tags", "--tag-fields", *_FIELDS),
        full_epochs=36,
        pretrained=("lit-words", 512, 10),
    ),
    "flickr8k": OwnChoice(preset="flickr8k-words", full_epochs=20),
}
"""By data set; fashion has the preset's network with 3×3 kernels, which a CPU does in three quarters of the time, and
at full time its fields as captions beside the titles."""
