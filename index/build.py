"""From an embeddings folder to an index folder: FAISS segment, catalogue, manifest; whole or absent."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.console import progress, say
from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, replacing, sync_folder
from vlm.index.catalogue import write_catalogue
from vlm.index.embeddings import Embeddings
from vlm.index.kinds import KINDS, Prepared, Tuning, choose_kind, load_faiss
from vlm.index.layout import CATALOGUE, Details, Segment, segment_file
from vlm.manifest import Manifest, record_file, write_manifest

if TYPE_CHECKING:
    import faiss


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """The index that was built, and how long it took."""

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dimension: int
    bytes: int
    seconds: float


def build_index(embeddings: Path, out: Path, *, kind: str = "auto", tuning: Tuning | None = None) -> BuildSummary:
    """Build an index of a finished embeddings folder, whose checksums are verified on the way.

    kind: flat, ivf, or auto (`kinds.choose_kind`). The work is done beside `out` and renamed at the end.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, or the kind does not fit them.
        VlmError: the embeddings are damaged.
    """
    started = time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name another folder or remove it.")
    source = Embeddings.open(embeddings, verify=True)
    chosen = choose_kind(kind, len(source))
    if kind != chosen:
        say(f"{len(source):,} rows: a {chosen} index.")
    prepared = KINDS[chosen](source, tuning or Tuning())
    with _beside(out) as folder:
        (folder / segment_file(0)).parent.mkdir()
        _fill(prepared.index, source)
        _write_segment(folder / segment_file(0), prepared.index)
        write_catalogue(folder / CATALOGUE, source.origins())
        manifest = _manifest(folder, source, chosen, prepared)
        write_manifest(folder, manifest)
    return BuildSummary(
        folder=str(out),
        kind=chosen,
        parameters=prepared.parameters,
        rows=len(source),
        dimension=source.dimension,
        bytes=sum(record.bytes for record in manifest.files.values()),
        seconds=time.perf_counter() - started,
    )


def _fill(index: "faiss.Index", source: Embeddings) -> None:
    with progress(total=len(source), what="index", unit=" rows") as shown:
        for block in source.blocks():
            index.add(block)
            shown.update(len(block))


def _write_segment(path: Path, index: "faiss.Index") -> None:
    faiss = load_faiss()
    with replacing(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _manifest(folder: Path, source: Embeddings, kind: str, prepared: Prepared) -> Manifest:
    segment = Segment(file=segment_file(0), kind=kind, parameters=prepared.parameters, first_row=0, rows=len(source))
    details = Details(space=source.space, segments=(segment,), shards=tuple(source.manifest.details["shards"]))
    return Manifest(
        kind="index",
        fingerprint=fingerprint_of(source.manifest.fingerprint, kind, repr(sorted(prepared.parameters.items()))),
        generation=1,
        counts={"rows": len(source)},
        configuration={"embeddings": str(source.folder.absolute()), "kind": kind, **prepared.parameters},
        inputs={"model": source.space.fingerprint, "embeddings": source.manifest.fingerprint},
        files={name: record_file(folder / name) for name in (segment_file(0), CATALOGUE)},
        details=asdict(details),
    )


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name if the block succeeds, and is removed if it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        folder.mkdir()
        yield folder
        folder.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise VlmError(f"{out} cannot be written: {error}; nothing of it was kept.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
