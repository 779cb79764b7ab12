"""The embeddings folder: parts written one by one and resumed after a crash, then read as one matrix with its rows."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, read_lines, sha256_of, write_text
from vlm.index.codes import Code
from vlm.index.parts import (
    FLOAT16,
    IncidentRecord,
    Marked,
    Origin,
    Part,
    Storage,
    mark_done,
    open_codes,
    open_vectors,
    part_name,
    read_marker,
    read_origins,
    write_part,
)
from vlm.index.unfinished import alone, begin, tidy
from vlm.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    explaining_damage,
    is_complete,
    read_manifest,
    record_file,
    write_manifest,
)
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


class EmbeddingsWriter:
    """Writes parts, each whole or absent, in any order and from any number of processes.

    Opened again after a crash, what was added is there still.

    identity: what makes the folder what it is (model, shards, modality); unfinished work of another identity is
        refused with a UsageError.
    """

    def __init__(self, folder: Path, *, space: Space, identity: dict[str, Any], storage: Storage = FLOAT16) -> None:
        begin(folder, identity)
        self.folder, self.space, self.identity, self.storage = folder, space, identity, storage
        self._next: int | None = None

    @property
    def parts(self) -> list[Part]:
        """The parts that are there, in order, up to the first that is not."""
        return [marked.part for marked in self._marked()]

    def part(self, number: int, *, verify: bool = False) -> Part | None:
        """A part if it is there; with `verify`, its checksums are compared, too."""
        marked = read_marker(self.folder, part_name(number), verify=verify)
        return marked.part if marked else None

    def add(
        self,
        shard: str,
        vectors: Float[Array, "N D"],
        origins: Sequence[Origin],
        incidents: Sequence[IncidentRecord] = (),
        *,
        number: int | None = None,
    ) -> Part:
        """Write a part; once this returns, it survives any crash.

        number: without, what follows `parts` as they were at the first such call, then one after the other.
        """
        if number is None:
            number = len(self.parts) if self._next is None else self._next
            self._next = number + 1
        name, bad = part_name(number), len(incidents)
        part = write_part(self.folder, name, vectors, origins, shard=shard, bad=bad, storage=self.storage)
        mark_done(self.folder, part, incidents)
        return part

    def finish(self, *, inputs: dict[str, str], details: dict[str, Any]) -> Manifest:
        """Write the manifest: the folder is whole. If another process did it already, that manifest is given.

        Raises:
            VlmError: there is not one row.
        """
        with alone(self.folder):
            self.end(inputs=inputs, details=details)
        return read_manifest(self.folder, "embeddings")

    def end(self, *, inputs: dict[str, str], details: dict[str, Any]) -> bool:
        """As `finish`, for who is alone in the folder already; whether the manifest was still to be written."""
        is_first = not is_complete(self.folder)
        if is_first:
            self._write_manifest(inputs, details)
        tidy(self.folder)
        return is_first

    def _write_manifest(self, inputs: dict[str, str], details: dict[str, Any]) -> None:
        marked = list(self._marked())
        parts, incidents = [each.part for each in marked], [line for each in marked for line in each.incidents]
        _write_lines(self.folder / PART_LINES, (part.to_line() for part in parts))
        _write_lines(
            self.folder / INCIDENT_LINES,
            (json.dumps(asdict(incident), ensure_ascii=False) for incident in incidents),
        )
        rows, bad = sum(part.rows for part in parts), sum(part.bad for part in parts)
        reasons = Counter(incident.reason for incident in incidents)
        if not rows:
            first = f"{incidents[0].key} {incidents[0].reason} {incidents[0].detail}" if incidents else "there was none"
            raise VlmError(
                f"Not one of {bad:,} samples could be embedded; the first: {first}. "
                f"All are in {self.folder / INCIDENT_LINES}."
            )
        files = {name: record for part in parts for name, record in part.files.items()}
        files |= {name: record_file(self.folder / name) for name in (PART_LINES, INCIDENT_LINES)}
        manifest = Manifest(
            kind="embeddings",
            fingerprint=fingerprint_of(self.space.fingerprint, *(files[name].sha256 for name in sorted(files))),
            counts={"rows": rows, "bad": bad, "parts": len(parts)},
            configuration=self.identity,
            inputs=inputs,
            files=files,
            details=details
            | {"space": asdict(self.space), **asdict(self.storage), "incidents": dict(sorted(reasons.items()))},
        )
        write_manifest(self.folder, manifest)

    def _marked(self) -> Iterator[Marked]:
        number = 0
        while (marked := read_marker(self.folder, part_name(number))) is not None:
            yield marked
            number += 1


class Embeddings:
    """A finished embeddings folder: rows in the order of the shards, each a unit vector with its origin."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        with explaining_damage(folder / MANIFEST):
            self.space = Space(**manifest.details["space"])
        with explaining_damage(folder / PART_LINES):
            self.parts = [Part.from_line(line) for line in read_lines(folder / PART_LINES)]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "Embeddings":
        """Open a finished folder; with `verify`, every file is read and its checksum compared.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or not as it was written.
        """
        manifest = read_manifest(folder, "embeddings")
        again = "import the rows again" if "source" in manifest.configuration else "run the same vlm embed again"
        check_files(folder, manifest.files, verify=verify, cure=again)
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
        """All rows in order, float32, brought back to unit length after their storage."""
        for part in self.parts:
            vectors = open_vectors(self.folder, part)
            for first in range(0, part.rows, rows_at_once):
                yield unit_rows(vectors[first : first + rows_at_once])

    def codes(self, code: Code) -> Iterator[tuple[Array, ...]]:
        """The arrays of a code, part by part (`parts.open_codes`).

        Raises:
            UsageError: the folder was embedded without.
        """
        if code not in self.manifest.details.get("codes", ()):
            raise UsageError(f"{self.folder} has no {code} codes; embed again with --codes {code}.")
        for part in self.parts:
            yield open_codes(self.folder, part, code)

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), drawn evenly, in row order."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        starts = np.cumsum([0, *(part.rows for part in self.parts)])
        taken = [
            open_vectors(self.folder, part)[chosen[(chosen >= first) & (chosen < first + part.rows)] - first]
            for part, first in zip(self.parts, starts, strict=False)
        ]
        return unit_rows(np.concatenate(taken))


def unit_rows(vectors: Float[Array, "N D"]) -> Float32[Array, "N D"]:
    """The rows as float32 of length 1; rows must not be zero."""
    wide = vectors.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def check_files(folder: Path, files: dict[str, FileRecord], *, verify: bool, cure: str) -> None:
    """Compare a folder's files with what its manifest says: sizes, and checksums when asked to verify.

    Raises:
        VlmError: a file is missing or differs; the message ends with the cure.
    """
    if fault := first_fault(folder, files, verify=verify):
        raise VlmError(f"{fault}; {cure}.")


def first_fault(folder: Path, files: dict[str, FileRecord], *, verify: bool) -> str:
    """What is wrong with the first of a folder's files that is not as its manifest says; empty if all are."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != record.bytes:
            return f"{path} is damaged: {size:,} bytes, {record.bytes:,} were written"
        if verify and sha256_of(path) != record.sha256:
            return f"{path} is damaged: its checksum is not the one it was written with"
    return ""


def check_same_origin(folder: Path, identity: dict[str, Any]) -> Manifest:
    """The manifest of a finished folder, checked to be made from this model and these shards.

    Raises:
        UsageError: it was made from something else; the first difference is named.
    """
    manifest = read_manifest(folder, "embeddings")
    for name, value in json.loads(json.dumps(identity)).items():
        if manifest.configuration.get(name, "") != value:
            raise UsageError(
                f"{folder} is complete, but was made with another {name} ({_brief(manifest.configuration.get(name))} "
                f"instead of {_brief(value)}); name another folder or remove it."
            )
    return manifest


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
