"""New addresses for the shards and image files of an index that were moved: by their folder, or by their names."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from vlm.data.shards import is_remote
from vlm.errors import UsageError
from vlm.storage import is_compressed

_NUM_NAMED = 3


def addresses_below(addresses: Sequence[str], old: str, new: str) -> dict[str, str]:
    """The new address of each that is `old` or lies in this folder.

    >>> addresses_below(["/a/x/0.tar", "/b/1.tar"], "/a", "s3://bucket/a")
    {'/a/x/0.tar': 's3://bucket/a/x/0.tar'}

    Raises:
        UsageError: none does.
    """
    old_folder = old.rstrip("/")
    # absolute, since the index is opened from other working directories too
    new_folder = new if is_remote(new) else str(Path(new).expanduser().absolute())
    moved: dict[str, str] = {}
    for address in addresses:
        # with the slash: /data/ab does not lie in /data/a
        if address == old_folder or address.startswith(f"{old_folder}/"):
            moved[address] = new_folder.rstrip("/") + address.removeprefix(old_folder)
    if not moved:
        folders = sorted({address.rpartition("/")[0] for address in addresses})
        raise UsageError(f"No image of the index lies at {old}; they lie in {_listing(folders)}.")
    return moved


def addresses_by_name(addresses: Sequence[str], shards: Sequence[str]) -> dict[str, str]:
    """The shard that each address is now, found by its file name, and by its folders where several have that name.

    >>> addresses_by_name(["/old/a/0.tar", "/old/b/0.tar"], ["/new/a/0.tar", "/new/b/0.tar"])
    {'/old/a/0.tar': '/new/a/0.tar', '/old/b/0.tar': '/new/b/0.tar'}

    Raises:
        UsageError: an address has none, or more than one.
    """
    moved: dict[str, str] = {}
    lacking: list[str] = []
    for address in addresses:
        # of shards with the same file name, those that share most folders before it: train/0.tar and val/0.tar
        nearest: list[str] = []
        most_common = 1
        for shard in shards:
            depth = _common_depth(address, shard)
            if depth > most_common:
                nearest.clear()
                most_common = depth
            if depth == most_common:
                nearest.append(shard)
        if len(nearest) > 1:
            raise UsageError(f"{address} may be {nearest[0]} or {nearest[1]} now; name its folder: OLD NEW.")
        if nearest:
            moved[address] = nearest[0] if is_remote(nearest[0]) else str(Path(nearest[0]).absolute())
        else:
            lacking.append(address)
    if lacking:
        raise UsageError(
            f"{len(lacking):,} of {len(addresses):,} shards of the index are not among the {len(shards):,} given, the "
            f"first of them {lacking[0]}; nothing was changed."
        )
    return moved


def check_addresses(addresses: Mapping[str, str], ends: Mapping[str, int]) -> None:
    """Refuse new addresses on this machine where there is no file, or one too short for the images in it.

    ends: the byte at which the last image of each old address ends.

    Raises:
        UsageError: the first such is named; those of other machines are not looked at.
    """
    for old, new in addresses.items():
        if is_remote(new):
            continue
        path = Path(new)
        if not path.is_file():
            raise UsageError(f"{new} does not exist, where {old} should be now; nothing was changed.")
        # the offsets in a compressed tar are those of the plain one
        if not is_compressed(new) and path.stat().st_size < ends[old]:
            raise UsageError(
                f"{new} has {path.stat().st_size:,} bytes, and the images of {old} end at {ends[old]:,}: it is another "
                "file; nothing was changed."
            )


def _common_depth(address: str, shard: str) -> int:
    """How many names at the ends of two addresses are the same."""
    depth = 0
    for name, other in zip(reversed(PurePosixPath(address).parts), reversed(PurePosixPath(shard).parts), strict=False):
        if name != other:
            break
        depth += 1
    return depth


def _listing(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_NUM_NAMED]) + (" …" if len(shown) > _NUM_NAMED else "")
