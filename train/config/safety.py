"""What a run saves, and what it does when something goes wrong."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Checkpoints, bad steps, hanging processes."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints besides; 0 goes by steps alone."""

    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""

    keep_best: str = ""
    """Metric of val whose best checkpoint is kept too, e.g. text_to_image_recall@10; empty keeps none."""

    checkpoint_to: str = ""
    """Address (fsspec: s3://…, gs://…, a folder) that every checkpoint is copied to in the background."""

    spike_factor: float = 0.0
    """A step whose loss rises above the running median by this many times its usual deviation is skipped; 0 never."""

    skip_limit: int = 5
    """Skipped steps in a row at which the run goes back to the last good checkpoint and passes over these samples."""

    rewind_limit: int = 3
    """Times a run may go back before it ends."""

    hang_minutes: float = 30.0
    """A step that takes longer ends the run with what each process was doing; 0 waits for ever."""
