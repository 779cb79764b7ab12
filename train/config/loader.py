"""How samples are read, shuffled and seen."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are read, shuffled and seen."""

    workers: int = 1
    """Processes that read, decode and tokenize; does not change what is read."""

    shuffle_window: int = 65536
    """Samples that are shuffled together after the shards are."""

    selection: str = ""
    """File of `vlm curate` that says which samples are seen, and how often; empty sees each once an epoch."""

    languages: tuple[str, ...] = ()
    """Languages captions are drawn from; empty takes the first of each sample. `tags` stands for its tags."""

    language_weights: tuple[float, ...] = ()
    """How often each of them is drawn, in proportion; empty draws evenly."""

    sentences: bool = False
    """Show one sentence, drawn, of a long caption; cut after . ! ? before a space ("Dr. Smith" too), after 。！？."""

    arrays: tuple[str, ...] = ()
    """Arrays stored in the shards that batches carry: teacher_image, teacher_text, text_embedding."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's share of the picture's area."""

    flip: float = 0.0
    """Probability of mirroring a picture; leave at 0 where captions say left and right."""

    decode_on_device: bool = False
    """Decode JPEGs on the GPU instead of in the workers; workers then read, draw and tokenize only."""

    allow_damage: bool = False
    """Read the whole samples of shards that are cut short instead of refusing them."""

    max_bad: float = 0.01
    """Share of unusable samples past which the run fails; the first ten never count as too many, unless it is 0."""

    max_bad_in_a_row: int = 100
    """Unusable samples one after the other at which the run fails."""

    cache: str = ""
    """Folder in which remote and compressed shards are kept; empty takes $VLM_CACHE or ~/.cache/vlm/shards."""

    cache_gb: float = 0.0
    """Bound of that folder in 10⁹ bytes; 0 takes $VLM_CACHE_GB or 50."""

    trim_text: bool = True
    """Cut a batch's tokens to its longest caption, where the text tower gives the same vectors and is not compiled."""
