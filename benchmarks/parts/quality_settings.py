"""What both sides of the quality benchmark are told: the one place where its recipes are tuned.

Words are options of `vlm train` (ours) or of `open_clip_train.main` (theirs). In them stand {tokenizer}: the vocabulary
trained on the data set; {first_captions}: its training shards with the first caption of each picture alone; {warmup}:
a tenth of the steps.
"""

EPOCHS: dict[str, int] = {"fashion": 4, "flickr8k": 12}
"""Passes over each data set, the same for both sides."""

BATCH_SIZE = 256

LABELS: dict[str, str] = {"fashion": "articleType"}
"""Metadata field whose values are classified zero-shot, from the bare names."""

OURS: dict[str, list[str]] = {
    "fashion": ["--architecture", "small", "--ema-decay", "0", "--warmup-steps", "{warmup}", "--flip", "0"],
    "flickr8k": [],
}
"""Per data set, what is added to `vlm train PRESET`: fashion's own text tower is none that open_clip has,
and so few steps want a shorter warm-up, no mean of the weights and no flips."""

OPEN_CLIP: list[str] = ["--warmup", "{warmup}", "--beta2", "0.98", "--eps", "1e-6"]
"""What is changed of open_clip's defaults: its warm-up of 10,000 steps is longer than the whole run, and its AdamW is
that of CLIP (the default where a network's name holds "vit"; for other names it is 0.999 and 1e-8)."""

_ONE_RATE = ["--embedding-lr-mult", "1", "--norm-lr-mult", "1", "--conv-lr-mult", "1", "--logit-scale-lr-mult", "1"]
_ADAMW_WORDS = "--optimizer adamw --weight-decay 0.2 --beta1 0.9 --beta2 0.98 --epsilon 1e-6 --learning-rate 5e-4"
_ADAMW = [*_ADAMW_WORDS.split(), *_ONE_RATE]

ABLATIONS: dict[str, list[str]] = {
    "learning rate 5e-4": ["--learning-rate", "5e-4"],
    "AdamW as CLIP's": _ADAMW,
    "one rate for all weights": _ONE_RATE,
    "warm-up of a tenth": ["--warmup-steps", "{warmup}"],
    "no gradient clipping": ["--grad-clip-norm", "0"],
    "no mean of weights": ["--ema-decay", "0"],
    "crops of nine tenths": ["--crop-scale", "0.9", "1.0"],
    "no flips": ["--flip", "0"],
    "first caption only": ["--data", "{first_captions}"],
    "CLIP's BPE": ["--tokenizer", "clip"],
    "CLIP's loss": ["--objective", "clip"],
    "same pairs as negatives": ["--same-pairs", "negative"],
    "no dropout": ["--dropout", "0", "--drop-path", "0", "--patch-dropout", "0"],
}
"""Each switches one default of ours back to open_clip's; what a recipe has not changed is left out of its table."""

EVERYTHING = "all of these at once"
"""Ours with every one of the above switched back: what is left of the difference is the trainers'."""

THEIR_VARIANTS: dict[str, list[str]] = {"learning rate 2e-3": ["--lr", "2e-3"]}
"""open_clip with one of our settings, for whoever asks how much a tuned baseline would gain."""

LINEAR: dict[str, dict[str, tuple[float, float, float, float | None]]] = {
    "fashion": {
        "linear (linear_baseline.py)": (0.310, 0.589, 0.743, 0.580),
        "linear (README, other split)": (0.202, 0.522, 0.690, 0.517),
    }
}
"""Text→image recall@1, 5, 10 and zero-shot top-1 of linear methods, as docs/benchmarks.md has them."""
