"""The embeddings folder: parts written one by one and resumed after a crash, then read as one matrix with its rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import append_line, fingerprint_of, read_lines, sha256_of, write_text
from vlm.index.parts import PARTS, Origin, Part, open_vectors, read_origins, write_part
from vlm.manifest import FileRecord, Manifest, begin_folder, read_manifest, record_file, write_manifest
from vlm.tensors import Array, Float, Float32

Modality = Literal["image", "text"]

PART_LINES = "parts.jsonl"
INCIDENT_LINES = "incidents.jsonl"


@dataclass(frozen=True, kw_only=True)
class Space:
    """Whose vectors a folder holds.

    model: what `load_model` takes to have the model again. fingerprint: of the model. dimension: D.
    """

    model: str
    fingerprint: str
    dimension: int
    modality: Modality


@dataclass(frozen=True, kw_only=True)
class IncidentRecord:
    """A sample that has no embedding, and why: one line of `incidents.jsonl`."""

    part: str
    shard: str
    number: int
    key: str
    reason: str
    detail: str


class EmbeddingsWriter:
    """Writes parts in the order of the shards; opened again after a crash, it goes on after the last whole part.

    identity: what makes the folder what it is (model, shards, modality); unfinished work of another identity is
        refused with a UsageError.
    """

    def __init__(self, folder: Path, *, space: Space, identity: dict[str, Any]) -> None:
        begin_folder(folder, kind="embeddings", configuration=identity)
        (folder / PARTS).mkdir(exist_ok=True)
        self.folder, self.space, self.identity = folder, space, identity
        self.parts = list(_whole_parts(folder))
        done = {part.name for part in self.parts}
        incidents = [line for line in read_lines(folder / INCIDENT_LINES) if json.loads(line)["part"] in done]
        # rewritten, because a crash may have cut the last line or left the incidents of a part without the part
        _write_lines(folder / PART_LINES, [part.to_line() for part in self.parts])
        _write_lines(folder / INCIDENT_LINES, incidents)

    def add(
        self,
        shard: str,
        vectors: Float[Array, "N D"],
        origins: Sequence[Origin],
        incidents: Sequence[IncidentRecord] = (),
    ) -> Part:
        """Write the next part; once this returns, it survives any crash."""
        part = write_part(self.folder, part_name(len(self.parts)), vectors, origins, shard=shard, bad=len(incidents))
        if incidents:
            append_line(
                self.folder / INCIDENT_LINES,
                "\n".join(json.dumps(asdict(incident), ensure_ascii=False) for incident in incidents),
            )
        append_line(self.folder / PART_LINES, part.to_line())
        self.parts.append(part)
        return part

    def finish(self, *, inputs: dict[str, str], details: dict[str, Any]) -> Manifest:
        """Write the manifest: the folder is whole.

        Raises:
            VlmError: there is not one row.
        """
        rows, bad = sum(part.rows for part in self.parts), sum(part.bad for part in self.parts)
        if not rows:
            first = json.loads(next(iter(read_lines(self.folder / INCIDENT_LINES)), '{"reason": "there was none"}'))
            raise VlmError(
                f"Not one of {bad:,} samples could be embedded; the first: {first.get('key', '')} {first['reason']} "
                f"{first.get('detail', '')}. All are in {self.folder / INCIDENT_LINES}."
            )
        files = {name: record for part in self.parts for name, record in part.files.items()}
        files |= {name: record_file(self.folder / name) for name in (PART_LINES, INCIDENT_LINES)}
        manifest = Manifest(
            kind="embeddings",
            fingerprint=fingerprint_of(self.space.fingerprint, *(files[name].sha256 for name in sorted(files))),
            counts={"rows": rows, "bad": bad, "parts": len(self.parts)},
            configuration=self.identity,
            inputs=inputs,
            files=files,
            details=details | {"space": asdict(self.space)},
        )
        write_manifest(self.folder, manifest)
        return manifest


class Embeddings:
    """A finished embeddings folder: rows in the order of the shards, each a unit vector with its origin."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.space = Space(**manifest.details["space"])
        self.parts = [Part.from_line(line) for line in read_lines(folder / PART_LINES)]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "Embeddings":
        """Open a finished folder; with `verify`, every file is read and its checksum compared.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or not as it was written.
        """
        manifest = read_manifest(folder, "embeddings")
        check_files(folder, manifest.files, verify=verify, cure="remove the folder and run vlm embed again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.space.dimension

    def origins(self) -> Iterator[Origin]:
        """What each row was made from, in row order."""
        for part in self.parts:
            yield from read_origins(self.folder, part)

    def blocks(self, rows_at_once: int = 65_536) -> Iterator[Float32[Array, "N D"]]:
        """All rows in order, float32, brought back to unit length after their storage as float16."""
        for part in self.parts:
            vectors = open_vectors(self.folder, part)
            for first in range(0, part.rows, rows_at_once):
                yield unit_rows(vectors[first : first + rows_at_once])

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), drawn evenly, in row order."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        starts = np.cumsum([0, *(part.rows for part in self.parts)])
        taken = [
            open_vectors(self.folder, part)[chosen[(chosen >= first) & (chosen < first + part.rows)] - first]
            for part, first in zip(self.parts, starts, strict=False)
        ]
        return unit_rows(np.concatenate(taken))


def part_name(number: int) -> str:
    """The name of the part of shard `number`.

    >>> part_name(3)
    'part-00003'
    """
    return f"part-{number:05d}"


def unit_rows(vectors: Float[Array, "N D"]) -> Float32[Array, "N D"]:
    """The rows as float32 of length 1; rows must not be zero."""
    wide = vectors.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def check_files(folder: Path, files: dict[str, FileRecord], *, verify: bool, cure: str) -> None:
    """Compare a folder's files with what its manifest says: sizes, and checksums when asked to verify.

    Raises:
        VlmError: a file is missing or differs; the message ends with the cure.
    """
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise VlmError(f"{path} is missing; {cure}.")
        if (size := path.stat().st_size) != record.bytes:
            raise VlmError(f"{path} is damaged: {size:,} bytes, {record.bytes:,} were written; {cure}.")
        if verify and sha256_of(path) != record.sha256:
            raise VlmError(f"{path} is damaged: its checksum is not the one it was written with; {cure}.")


def check_same_origin(folder: Path, identity: dict[str, Any]) -> Manifest:
    """The manifest of a finished folder, checked to be made from this model and these shards, with its files there.

    Raises:
        UsageError: it was made from something else; the first difference is named.
        VlmError: a file of it is missing or damaged.
    """
    manifest = read_manifest(folder, "embeddings")
    for name, value in json.loads(json.dumps(identity)).items():
        if manifest.configuration.get(name, "") != value:
            raise UsageError(
                f"{folder} is complete, but was made with another {name} ({_brief(manifest.configuration.get(name))} "
                f"instead of {_brief(value)}); name another folder or remove it."
            )
    return Embeddings.open(folder).manifest


def _whole_parts(folder: Path) -> Iterator[Part]:
    """The parts finished before a crash, up to the first whose files are not as they were written."""
    for line in read_lines(folder / PART_LINES):
        part = Part.from_line(line)
        for name, record in part.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != record.bytes:
                return
        yield part


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
