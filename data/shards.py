"""Where shards are: from what a person types to a list of tars."""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar

from braceexpand import braceexpand

from vlm.console import track
from vlm.data.shard_cache import ShardCache
from vlm.data.tar import TarIndex, open_index
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.manifest import MANIFEST, PROGRESS
from vlm.storage import (
    SHARD_SUFFIXES,
    is_remote,
    is_shard,
    list_files,
    local_path,
    needs_cache,
    split_urls,
    url_basename,
)

__all__ = [
    "Shards",
    "absolute_shard",
    "count_samples",
    "expand_shards",
    "is_remote",
    "join_shards",
    "shards_fingerprint",
    "track_indexing",
]

INDEXING_DELAY_SECONDS = 2.0
"""Opening the indexes of shards shows no progress before so many seconds."""

Shards: TypeAlias = str | Path | Sequence[str | Path]
"""Shards as a folder, a pattern, a URL, or several of these."""

Item = TypeVar("Item")

_THREADS = 8
_MANY_REMOTE = 4


def join_shards(shards: Shards) -> str:
    """As one address, whose parts `::` separates.

    Raises:
        UsageError: none is given.
    """
    parts = [str(shards)] if isinstance(shards, str | Path) else [str(part) for part in shards]
    if not any(parts):
        raise UsageError("No shards are given: name a folder, a tar, a pattern or a URL.")
    return "::".join(parts)


def expand_shards(url: str) -> list[str]:
    """The tars named by a folder, a pattern, an fsspec address, or several joined with `::`.

    A pattern may hold `{a,b}`, `{00..12}`, `*` and `**` (any number of folders), and may name folders; `~` is home.

    Tars end in .tar, .tar.gz or .tgz. The order is that of the address, sorted inside folders and globs: it is part of
    a run's identity.

    Raises:
        UsageError: a part of the address names no tar, or asks for a protocol that is not allowed.
        VlmError: a remote folder cannot be reached.
    """
    shards: list[str] = []
    for part in split_urls(url):
        if part.endswith(".toml"):
            raise UsageError(f"{part!r} is not shards: a mixture file is read by vlm train alone; name the data in it.")
        found = _expand_remote(part) if is_remote(part) else _expand_local(local_path(part))
        if not found:
            raise UsageError(
                f"No shards (*.tar) at {part!r}; give a folder, a tar, or a pattern as {{000..099}}.tar."
                f"{'' if is_remote(part) else deeper_tars_hint(local_path(part))}"
            )
        shards += found
    return shards


def deeper_tars_hint(folder: str) -> str:
    """How to name the tars in the folders of a folder, as a sentence to append; empty if there are none."""
    for tar in Path(folder).glob("**/*.tar"):
        if tar.is_file():
            return f" Its tars lie deeper; name them by a pattern: '{folder.rstrip('/')}/**/*.tar'."
    return ""


def _expand_local(part: str) -> list[str]:
    # a name that exists is used unchanged: folders may be called `parts{1}` or `set [new]`
    if Path(part).is_dir():
        return _shards_in_folder(Path(part))
    paths: list[str] = []
    for pattern in [part] if Path(part).is_file() else braceexpand(part):
        shards: list[str] = []
        for match in _matches(Path(pattern).expanduser()):
            shards += [str(match)] if match.is_file() else _shards_in_folder(match)
        if not shards:
            raise UsageError(f"There is no shard {pattern!r}.")
        paths += shards
    return paths


def _shards_in_folder(folder: Path) -> list[str]:
    return _shards_among(list(map(str, folder.iterdir())), str(folder))


def _matches(pattern: Path) -> list[Path]:
    """The files and folders of a name or glob pattern, sorted; of a pattern that names tars, the tars alone.

    Hidden ones are left out unless the pattern names the dot: other systems leave `._NAME` next to files.
    """
    if pattern.exists() or not any(sign in str(pattern) for sign in "*?["):
        return [pattern] if pattern.exists() else []
    names_hidden = pattern.name.startswith(".")
    files: list[Path] = []
    folders: list[Path] = []
    # glob gives them in the order of the disk, and the order of shards is part of a run's identity
    for match in sorted(map(Path, glob.glob(str(pattern), recursive=True))):
        if match.name.startswith(".") and not names_hidden:
            continue
        if match.is_file():
            files.append(match)
        elif match.is_dir():
            folders.append(match)
    # `parts/*` names the tars of a folder, not what lies in folders next to them, nor manifests, tables and statistics
    tars = [file for file in files if is_shard(str(file))]
    return tars or folders or files


def _expand_remote(part: str) -> list[str]:
    shards: list[str] = []
    for url in braceexpand(part):
        # named outright, so taken as it is: listing may be forbidden, or slow, where reading is not
        if is_shard(url) and "*" not in url:
            shards.append(url)
        else:
            shards += _shards_among(list_files(url), url)
    return shards


def _shards_among(files: Sequence[str], folder: str) -> list[str]:
    """The tars among the files of a folder, sorted; hidden ones are left out."""
    names = {url_basename(file): file for file in files}
    if PROGRESS in names and MANIFEST not in names:
        raise UsageError(f"{folder} is unfinished: run the command that makes it again.")
    shards = sorted(file for name, file in names.items() if is_shard(name) and not name.startswith("."))
    # a.tar next to a.tar.gz is most likely the same shard twice, whose samples would be seen twice an epoch
    num_with_stem = Counter(map(shard_stem, shards))
    for shard in shards:
        if num_with_stem[shard_stem(shard)] > 1:
            raise UsageError(
                f"{folder} holds {url_basename(shard)} in more than one form; keep one, or name the ones to read."
            )
    return shards


def shard_stem(shard: str) -> str:
    """The file name of a shard without its ending, `.tar.gz` as a whole."""
    name = url_basename(shard)
    return next(name[: -len(suffix)] for suffix in SHARD_SUFFIXES[::-1] if name.lower().endswith(suffix))


def absolute_shard(shard: str) -> str:
    """The address from anywhere; a link to a tar stays a link, because its target need not be named `.tar`."""
    path = Path(shard)
    return shard if is_remote(shard) else str(path.parent.resolve() / path.name)


def count_samples(shards: list[str], *, allow_damage: bool = False, cache: ShardCache | None = None) -> list[int]:
    """Number of samples of each shard, from its index; remote shards are asked several at a time.

    Raises:
        VlmError: a shard is cut short (unless allowed) or holds no sample.
    """
    if sum(map(needs_cache, shards)) < _MANY_REMOTE:
        return _counts(shards, (open_index(shard, cache) for shard in shards), allow_damage=allow_damage)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlm-count") as pool:
        indexes = pool.map(lambda shard: open_index(shard, cache), shards)
        try:
            return _counts(shards, indexes, allow_damage=allow_damage)
        except BaseException:
            # an error or an interrupt must not wait for the shards still queued to be fetched
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def track_indexing(items: Iterable[Item], *, total: int) -> Iterator[Item]:
    """Yield something for each shard whose index is opened; a bar shows once it takes long."""
    # an index takes a millisecond if cached, but the scan of a new tar of 10,000 samples a second
    return track(items, total=total, what="indexing shards", unit="shard", delay=INDEXING_DELAY_SECONDS)


def _counts(shards: Sequence[str], indexes: Iterable[TarIndex], *, allow_damage: bool) -> list[int]:
    shown = track_indexing(zip(shards, indexes, strict=True), total=len(shards))
    return [_count(shard, index, allow_damage=allow_damage) for shard, index in shown]


def _count(shard: str, index: TarIndex, *, allow_damage: bool) -> int:
    if index.damage and not allow_damage:
        raise VlmError(
            f"{shard} is damaged: {index.damage}; whole samples before it: at least {max(len(index) - 1, 0):,}. "
            "Fetch or pack the shard again, or use the samples before the damage by --allow-damage."
        )
    if not len(index):
        raise VlmError(f"{shard} holds no samples (key.jpg, .png, .webp … with key.txt or key.json); leave it out.")
    return len(index)


def shards_fingerprint(shards: Sequence[str], cache: ShardCache | None = None) -> str:
    """Identity of an ordered list of shards: the keys and the sizes of all parts, from the indexes alone.

    It stays the same when the files are moved or renamed; new bytes of just the same size go unnoticed.
    """
    return compute_fingerprint(*(open_index(shard, cache).fingerprint for shard in shards))
