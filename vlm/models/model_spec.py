"""MODEL as people write it: a folder or a name, which may end in `#64`. Loads no model, and no torch."""

from pathlib import Path

from vlm.errors import UsageError
from vlm.files import compute_fingerprint

CONFIG = "open_clip_config.json"
RUN_MODEL = "model"
CHECKPOINTS = "checkpoints"
LOCAL_PREFIX = "local-dir:"
DIMENSIONS_SEPARATOR = "#"


def split_model_spec(spec: str) -> tuple[str, int | None]:
    """The model, and how many dimensions are kept; None without a number, or if a path has this name.

    >>> split_model_spec("runs/mine#64"), split_model_spec("ViT-B-32:openai")
    (('runs/mine', 64), ('ViT-B-32:openai', None))

    Raises:
        UsageError: what follows the sign is not a number.
    """
    model, sign, kept = spec.rpartition(DIMENSIONS_SEPARATOR)
    # a folder may have a # in its name
    if not sign or Path(spec).exists():
        return spec, None
    if not (kept.isascii() and kept.isdecimal()):
        raise UsageError(
            f"{spec!r}: {kept!r} is not a number of dimensions; write MODEL{DIMENSIONS_SEPARATOR}64 to keep "
            "the first 64."
        )
    return model, int(kept)


def absolute_spec(spec: str) -> str:
    """A model's folder as an absolute path, so that it is found from anywhere; a name unchanged."""
    model, dimensions = split_model_spec(spec)
    if Path(model).exists():
        model = str(Path(model).resolve())
    return model if dimensions is None else f"{model}{DIMENSIONS_SEPARATOR}{dimensions}"


def truncated_fingerprint(fingerprint: str, dimensions: int) -> str:
    """Identity of the space of the first `dimensions` numbers of another space's embeddings."""
    return compute_fingerprint(fingerprint, "prefix", str(dimensions))


def model_folder(folder: Path) -> Path:
    """The model folder that a run (its final model, else its newest checkpoint) or model folder names.

    Raises:
        UsageError: it holds no model.
    """
    if (folder / CONFIG).is_file():
        return folder
    if (folder / RUN_MODEL / CONFIG).is_file():
        return folder / RUN_MODEL
    checkpoints = sorted((folder / CHECKPOINTS).glob("step-*"))
    if not checkpoints:
        raise UsageError(
            f"{folder} holds no model: neither {CONFIG}, nor {RUN_MODEL}/, nor {CHECKPOINTS}/step-*, nor a "
            "config.json of Hugging Face."
        )
    # a run in progress has no final model yet; names sort by step
    return checkpoints[-1]
