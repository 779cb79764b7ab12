"""Unpacking gzip as it streams in, with a limit on what comes out."""

import zlib
from collections.abc import Iterator
from typing import Any

from vlm.errors import VlmError

MAX_RATIO = 100
"""More plain bytes than this for each compressed one are taken for a bomb; tars of pictures come to about 1."""

_FREE_BYTES = 16 << 20
_IN_BYTES, _OUT_BYTES, _SALVAGE_BYTES = 64 << 10, 1 << 20, 512
_GZIP = 16 + zlib.MAX_WBITS


class Inflater:
    """Turns the compressed bytes of one file into plain ones; files of several gzip members are read through.

    damage: why the rest cannot be unpacked, or empty.
    """

    def __init__(self, address: str) -> None:
        self.damage = ""
        self._address = address
        self._taken, self._given, self._limit = 0, 0, _OUT_BYTES
        self._member: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes of the next compressed ones, at most 1 MiB at a time; none once there is damage.

        Raises:
            VlmError: they are more than `MAX_RATIO` times the compressed ones.
        """
        for start in range(0, len(data), _IN_BYTES):
            piece = data[start : start + _IN_BYTES]
            self._taken += len(piece)
            for plain in self._feed_piece(piece):
                self._given += len(plain)
                if self._given > _FREE_BYTES + MAX_RATIO * self._taken:
                    raise VlmError(
                        f"{self._address} unpacks to more than {MAX_RATIO} times its size ({self._taken:,} bytes came "
                        f"to {self._given:,} so far), as gzip bombs do; unpack it by hand if you know better."
                    )
                yield plain

    def finish(self) -> None:
        """Say that no more comes; a member that is still open is damage."""
        if self._member is not None and not self.damage:
            self.damage = f"its gzip is cut short at byte {self._taken:,}"

    def _feed_piece(self, piece: bytes) -> Iterator[bytes]:
        is_full = False
        while (piece or is_full) and not self.damage:
            if self._member is None:
                piece = piece.lstrip(b"\x00") if self._given else piece  # padding between members
                if not piece:
                    return
                self._member = zlib.decompressobj(_GZIP)
            before = self._member.copy()
            try:
                plain = self._member.decompress(piece, self._limit)
            except zlib.error as error:
                self._member = before
                if self._limit == 1:
                    self.damage = f"its gzip cannot be unpacked near byte {self._taken:,}: {error}"
                # zlib throws away what came before an error in the same call: go up to it in smaller steps
                self._limit = _SALVAGE_BYTES if self._limit > _SALVAGE_BYTES else 1
                continue
            if plain:
                yield plain
            is_full, piece = len(plain) == self._limit, self._member.unconsumed_tail
            if self._member.eof:
                is_full, piece, self._member = False, self._member.unused_data, None
