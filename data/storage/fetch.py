"""Fetching one shard whole: resumed after a cut or a kill, checked, and unpacked on the way if it is compressed."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlm.data.storage.addresses import is_compressed
from vlm.data.storage.inflate import Inflater
from vlm.data.storage.remote import Identity, ask_identity, read_blocks
from vlm.data.storage.retry import Patience, Retry, Stopped
from vlm.errors import VlmError
from vlm.files import sha256_of

_WHOLE_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be fetched, and under which conditions.

    identity: the version that is wanted. sha256: of the file as it lies there, in hex; empty if unknown.
    make_room: told how many bytes the plain tar of a compressed shard comes to, before they are written.
    stop: set to call the work off.
    """

    address: str
    identity: Identity
    sha256: str = ""
    patience: Patience = field(default_factory=Patience)
    make_room: Callable[[int], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)


def fetch(order: Order, path: Path, *, rng: np.random.Generator) -> str:
    """Bring a shard to `path` as a plain tar; returns why its compressed form ends early, or an empty string.

    Bytes that an earlier fetch of the same version left at `path` are kept, and only the rest is asked for, unless the
    shard is compressed; so `path` must stand for this version alone.
    rng: chance of the waits between tries.

    Raises:
        UsageError: there is no such shard.
        VlmError: it cannot be had after all tries, has another checksum than is known, or changed meanwhile.
        OSError: `path` cannot be written; what goes wrong on the network never is one.
        Stopped: it was called off.
    """
    found = ""
    for _ in range(_WHOLE_TRIES):
        retry = Retry(order.address, order.patience, rng=rng, stop=order.stop)
        found, damage = (_unpack if is_compressed(order.address) else _download)(order, path, retry)
        _check_unchanged(order, path)
        if not order.sha256 or found == order.sha256:
            return damage
        path.unlink()
    raise VlmError(
        f"{order.address} came twice with the checksum {found}, where {order.sha256} was written down when it was "
        "made: the file there is damaged; pack or copy it again."
    )


def _check_unchanged(order: Order, path: Path) -> None:
    now = ask_identity(order.address, order.patience, order.stop)
    if now != order.identity:
        path.unlink(missing_ok=True)
        raise VlmError(
            f"{order.address} changed since it was first looked at (then {order.identity.token}, now {now.token}); "
            "start again to read it as it is now."
        )


def _download(order: Order, path: Path, retry: Retry) -> tuple[str, str]:
    """Append what `path` lacks; its checksum if one is known, and no damage."""
    have = path.stat().st_size if path.exists() else 0
    if have > order.identity.size:
        path.unlink()
        have = 0
    with path.open("ab") as file:
        for block in _blocks(order, have, retry):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return sha256_of(path) if order.sha256 else "", ""


def _unpack(order: Order, path: Path, retry: Retry) -> tuple[str, str]:
    """Write the plain bytes to `path`, anew; the checksum of the compressed ones, and the damage found."""
    inflater, digest, written = Inflater(order.address), hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in _blocks(order, 0, retry):
            digest.update(block)
            for plain in inflater.feed(block):
                written += len(plain)
                order.make_room(written)
                file.write(plain)
        inflater.finish()
        file.flush()
        os.fsync(file.fileno())
    is_checked = not order.sha256 or digest.hexdigest() == order.sha256
    if is_checked and not written:
        raise VlmError(f"{order.address} is no gzip, or damaged from the start: {inflater.damage or 'it is empty'}.")
    return digest.hexdigest(), inflater.damage


def _blocks(order: Order, position: int, retry: Retry) -> Iterator[bytes]:
    """The bytes from `position` to the end, whatever happens on the way."""
    address, size = order.address, order.identity.size
    while position < size:
        try:
            for block in read_blocks(address, position, order.identity):
                if order.stop.is_set():
                    raise Stopped
                position += len(block)
                if position > size:
                    raise VlmError(f"{address} has more than the {size:,} bytes its server told; start again.")
                retry.progressed()
                yield block
            if position < size:
                raise ConnectionError(f"the answer ended at byte {position:,} of {size:,}")
        except Exception as error:
            retry.after(error)
