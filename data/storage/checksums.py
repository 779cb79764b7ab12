"""SHA-256 of remote shards, as far as somebody wrote it down."""

import json
from functools import lru_cache
from typing import Any

from vlm.data.storage.addresses import base_name, is_remote, neighbour
from vlm.data.storage.remote import Identity, read_small
from vlm.data.storage.retry import Patience
from vlm.manifest import MANIFEST

_MAX_MANIFEST_BYTES = 256 << 20


def known_sha256(address: str, identity: Identity, patience: Patience) -> str:
    """The checksum of a remote shard in hex, or empty if nobody knows it.

    It is taken from the server where that has one, else from the `manifest.json` that `vlm pack` wrote into the folder,
    if what is said there is about a file of this size.
    """
    if identity.sha256 or not is_remote(address):
        return identity.sha256
    record = _manifest_files(neighbour(address, MANIFEST), patience).get(base_name(address))
    if not isinstance(record, dict) or record.get("bytes") != identity.size:
        return ""
    return str(record.get("sha256", ""))


@lru_cache(maxsize=256)
def _manifest_files(address: str, patience: Patience) -> dict[str, Any]:
    """What a folder's manifest says of its files, asked once per process; nothing if it has none."""
    data = read_small(address, max_bytes=_MAX_MANIFEST_BYTES, patience=patience)
    try:
        manifest = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("kind") == "shards" else None
    return files if isinstance(files, dict) else {}
