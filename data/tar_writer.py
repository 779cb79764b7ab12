"""Writing samples to a shard."""

import io
import tarfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

_MODE = 0o444
_OWNER = "bigdata"


class SampleWriter:
    """Writes the bytes that webdataset's `TarWriter(file, encoder=False, mtime=0)` does, without loading torch.

    webdataset loads torch with whatever is imported of it, which takes a quarter of the time of packing 8,000 pairs.
    The same samples give the same bytes: no time of writing is recorded.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tar.close()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Write a sample, `__key__` and bytes by ending, as files `key.ending` in the order of the endings."""
        for ending in sorted(sample.keys() - {"__key__"}):
            data: bytes = sample[ending]
            entry = tarfile.TarInfo(f"{sample['__key__']}.{ending}")
            entry.size = len(data)
            entry.mode = _MODE
            entry.uname = entry.gname = _OWNER
            self._tar.addfile(entry, io.BytesIO(data))
