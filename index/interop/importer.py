"""Names of imported rows: as for embedded ones, what they are called, made longer only where two share it.

Folders that `vlm index export` wrote: what they say of themselves.

Vectors of other tools as an embeddings folder: joins checked, rows normalised, columns kept as metadata.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.console import progress
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, check_not_exists
from vlm.index.ann.faiss_search import to_float32
from vlm.index.embeddings import (
    EmbeddingSpace,
    EmbeddingsWriter,
    Modality,
    Origin,
    SkippedSampleRecord,
    captions_from_json,
    part_name,
)
from vlm.index.encoder import Encoder, absolute_spec
from vlm.index.ids import find_shared_keys, shorten_shard_names
from vlm.index.interop.import_sources import (
    Block,
    ColumnChoice,
    SourcePart,
    captions_of,
    find_file_pairs,
    open_parts,
    read_blocks,
    read_names,
    to_json_value,
)
from vlm.manifest import MANIFEST, Manifest


class RowUidAssigner:
    """Gives each row its key and its uid, as `UidNamer` does for samples of shards, with a part in place of a shard.

    The key is what the uid column says, or the row's number in the whole source. num_shared: rows whose uid had to be
    longer than their key.

    Memory: one Arrow string column with the keys of all rows while it is made, then the shared keys only.

    Raises:
        UsageError: a row has no uid.
        VlmError: a table is damaged.
    """

    def __init__(self, parts: Sequence[SourcePart]) -> None:
        self._parts = shorten_shard_names([str(part.pair.path.with_suffix("")) for part in parts])
        named = [read_names(part) for part in parts]
        chunks = [chunk for names in named if names is not None for chunk in names.chunks]
        keyed = pa.table({"key": pa.chunked_array(chunks, pa.string())})
        is_shared = pc.field("key").isin(find_shared_keys(keyed))
        self._shared = Counter(
            (number, key)
            for number, names in enumerate(named)
            if names is not None
            for key in pa.table({"key": names}).filter(is_shared).column("key").to_pylist()
        )
        self.num_renamed = sum(self._shared.values())

    def uid(self, part: int, number: int, key: str) -> str:
        """The uid of row `number` of a part."""
        times = self._shared[part, key]
        return key if not times else f"{key}@{self._parts[part]}" + (f":{number}" if times > 1 else "")


EXPORT = "export"


def exported_space(source: Path) -> EmbeddingSpace | None:
    """Whose vectors an export holds; None: the folder is of another tool."""
    path = source / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return EmbeddingSpace(**values["details"]["space"]) if values["kind"] == EXPORT else None
    except (ValueError, KeyError, TypeError):
        return None


UNKNOWN = "unknown"
"""The model of vectors of which nobody knows what made them."""

# rows of float16 that were of unit length are off by less
_ROUNDING = 2e-3
# the length of a shorter row is not exact in single precision
_SHORTEST = 1e-15


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What came in.

    files: pairs of vectors and table. bad: rows left out, named in `incidents.jsonl`. scaled: rows that were not of
    unit length. renamed: rows that share the key with another. left_out: columns that cannot be metadata.
    approximate: the kind of the FAISS file whose codes the rows were made from; empty: they are as they were.
    """

    folder: str
    model: str
    modality: Modality
    dimension: int
    files: int
    rows: int
    bad: int
    scaled: int
    renamed: int
    uid_column: str
    left_out: tuple[str, ...]
    approximate: str
    seconds: float


def import_embeddings(
    source: Path,
    out: Path,
    *,
    model_spec: str,
    load: Callable[[str], Encoder],
    modality: Modality | None = None,
    metadata: Path | None = None,
    column_choice: ColumnChoice | None = None,
) -> ImportSummary:
    """Write the rows of `source` (as `find_pairs` takes it) as an embeddings folder `out`, whole or not at all.

    Args:
        model_spec: whose vectors they are, as `load` takes it; `unknown`; or empty if `vlm index export` wrote them.
        modality: image if not given, or what an export says.
        metadata: where the tables are, if not beside the vectors.

    Raises:
        UsageError: files do not belong together, a column is missing, the model has another dimension, or `out` is
            there.
        VlmError: a file is damaged, or not one row can be used. OSError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_not_exists(out)
    written = exported_space(source)
    kind = modality or (written.modality if written else "image")
    parts = open_parts(find_file_pairs(source, modality=kind, metadata=metadata), column_choice or ColumnChoice())
    namer = RowUidAssigner(parts)
    space = _choose_space(model_spec, parts[0].dimension, kind, written, load)
    identity = {"modality": kind, "model": space.fingerprint, "source": str(source.absolute())}
    with atomic_folder(out) as folder:
        importer = _Importer(EmbeddingsWriter(folder, space=space, identity=identity), namer)
        importer.import_all(parts)
        manifest = importer.finish()
    return ImportSummary(
        folder=str(out),
        model=space.model,
        modality=kind,
        dimension=space.dimension,
        files=len(parts),
        rows=manifest.counts["rows"],
        bad=manifest.counts["bad"],
        scaled=importer.scaled,
        renamed=namer.num_renamed,
        uid_column=parts[0].columns.uid if parts[0].columns else "",
        left_out=tuple(dict.fromkeys(name for part in parts if part.columns for name in part.columns.left_out)),
        approximate=parts[0].faiss.kind if parts[0].faiss and not parts[0].faiss.is_exact else "",
        seconds=time.perf_counter() - started,
    )


def _choose_space(
    spec: str, dimension: int, modality: Modality, written: EmbeddingSpace | None, load: Callable[[str], Encoder]
) -> EmbeddingSpace:
    if not spec and written is None:
        raise UsageError(
            f"Say by --model whose vectors these are, or --model {UNKNOWN}: then only stored items can be asked with."
        )
    if spec == UNKNOWN:
        return EmbeddingSpace(model=UNKNOWN, fingerprint=UNKNOWN, dimension=dimension, modality=modality)
    if spec:
        model = load(spec)
        space = EmbeddingSpace(
            model=absolute_spec(spec),
            fingerprint=model.fingerprint,
            dimension=model.embedding_size,
            modality=modality,
        )
        if written is not None and written.fingerprint != space.fingerprint:
            raise UsageError(
                f"These vectors are of {written.model} (fingerprint {written.fingerprint}), not of {spec} (fingerprint "
                f"{space.fingerprint}); leave --model out."
            )
    else:
        assert written is not None
        space = replace(written, modality=modality)
    if space.dimension != dimension:
        raise UsageError(
            f"The vectors have {dimension} dimensions, those of {space.model} {space.dimension}; name the model that "
            f"made them, or --model {UNKNOWN}."
        )
    return space


class _Importer:
    """Blocks on their way into an embeddings folder, and what was seen of them."""

    def __init__(self, writer: EmbeddingsWriter, namer: RowUidAssigner) -> None:
        self._writer, self._namer = writer, namer
        self._shards: dict[str, None] = {}
        self._blocks, self.rows, self.scaled = 0, 0, 0

    def import_all(self, parts: Sequence[SourcePart]) -> None:
        """Every row, in order."""
        with progress(total=sum(part.rows for part in parts), what="import", unit=" rows") as shown:
            for number, part in enumerate(parts):
                for block in read_blocks(part):
                    self.import_block(number, block)
                    shown.update(len(block.vectors))

    def import_block(self, part: int, block: Block) -> None:
        """Write the rows of a block that can be used."""
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = to_float32(block.vectors)
            lengths = np.linalg.norm(vectors, axis=1)
        is_usable = np.isfinite(lengths) & (lengths >= _SHORTEST)
        is_off = is_usable & (np.abs(lengths - 1) > _ROUNDING)
        rows = vectors[is_usable] / np.where(is_off, lengths, 1)[is_usable, None]
        origins, incidents = [], []
        for place, length in enumerate(lengths.tolist()):
            origin = self._origin(part, block, place)
            if is_usable[place]:
                origins.append(origin)
                self._shards[origin.shard] = None
            else:
                incidents.append(self._skip(origin, block, place, length))
        self._writer.add(str(block.part.place.absolute()), rows, origins, incidents)
        self._blocks += 1
        self.rows += len(origins)
        self.scaled += int(is_off.sum())

    def finish(self) -> Manifest:
        """Write the manifest.

        Raises:
            VlmError: there is not one row.
        """
        if not self.rows:
            raise VlmError("Not one vector can be used: each is zero or not finite. Nothing was imported.")
        space = self._writer.space
        return self._writer.finish(inputs={"model": space.fingerprint}, details={"shards": list(self._shards)})

    def _origin(self, part: int, block: Block, place: int) -> Origin:
        number, columns = block.first + place, block.part.columns
        record = block.records[place] if block.records is not None else {}
        key = str(record[columns.uid]) if columns and columns.uid else str(block.part.first + number)
        uid = self._namer.uid(part, number, key)
        if columns and columns.is_vlm_export:
            captions, metadata = captions_from_json(record["captions"]), json.loads(record["metadata"])
            return Origin(**record | {"uid": uid, "captions": captions, "metadata": metadata})
        values = {name: to_json_value(record[name]) for name in columns.metadata} if columns else {}
        return Origin(
            uid=uid,
            key=key,
            shard=str(block.part.pair.path.absolute()),
            number=number,
            image_offset=0,
            image_size=0,
            caption_number=0 if self._writer.space.modality == "text" else None,
            captions=captions_of(record[columns.caption]) if columns and columns.caption else {},
            metadata={name: value for name, value in values.items() if value is not None},
        )

    def _skip(self, origin: Origin, block: Block, place: int, length: float) -> SkippedSampleRecord:
        number = block.first + place
        return SkippedSampleRecord(
            part=part_name(self._blocks),
            shard=origin.shard,
            number=number,
            key=origin.key,
            reason="no direction" if length < _SHORTEST else "not finite",
            detail=f"row {number} of {block.part.place} has length {length:.4g}",
        )
