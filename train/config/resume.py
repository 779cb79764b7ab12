"""What may change between the parts of a run."""

FREE_ON_RESUME = frozenset(
    {
        "loader.workers",
        "loader.max_bad",
        "loader.max_bad_in_a_row",
        "loader.cache",
        "loader.cache_gb",
        "evaluate_every",
        "log_every",
        "val",
        "val_captions_each",
        "run",
        "tensorboard",
        "peak_tflops",
        "objective.similarity_block",
        "safety.checkpoint_every",
        "safety.checkpoint_minutes",
        "safety.keep_checkpoints",
        "safety.keep_best",
        "safety.checkpoint_to",
        "safety.hang_minutes",
    }
)
"""Keys that may change when a run is resumed: they have no influence on the weights."""


def differences(one: dict, other: dict, prefix: str = "") -> list[str]:
    """The keys (dotted) in which two configurations differ, with both values."""
    found: list[str] = []
    for name in one:
        first, second = one[name], other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found += differences(first, second, f"{prefix}{name}.")
        elif first != second:
            found.append(f"{prefix}{name}: {first!r} → {second!r}")
    return found
