"""Import vectors of other tools as an embeddings folder: joins checked, rows normalised, columns kept as metadata."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.console import progress
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, check_not_exists
from vlm.index.ann.faiss_search import to_float32
from vlm.index.embeddings_folder import (
    UNKNOWN,
    EmbeddingSpace,
    EmbeddingsWriter,
    Modality,
    Origin,
    SkippedSampleRecord,
    captions_from_json,
    part_name,
)
from vlm.index.encoder import Encoder
from vlm.index.ids import UidAssigner
from vlm.index.interop.import_layouts import (
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
from vlm.model_spec import absolute_spec
from vlm.results import Result

EXPORT = "export"


def exported_space(source: Path) -> EmbeddingSpace | None:
    """The embedding space of an export of ours; None: the folder is of another tool."""
    path = source / MANIFEST
    if not path.is_file():
        return None
    # another tool may have a manifest.json of its own
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return EmbeddingSpace(**values["details"]["space"]) if values["kind"] == EXPORT else None
    except (ValueError, KeyError, TypeError):
        return None


# unit vectors stored as float16 are off by less
_ROUNDING = 2e-3
# the length of a shorter row is not exact in single precision
_SHORTEST = 1e-15


@dataclass(frozen=True, kw_only=True)
class ImportSummary(Result):
    """What was imported.

    files: pairs of vectors and table. bad: skipped rows, listed in `incidents.jsonl`. scaled: rows that were not of
    unit length. renamed: rows that share their key with another. left_out: columns that cannot be metadata.
    approximate: the type of the FAISS file whose codes the rows were decoded from; empty: they are exact.
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
    """Write the rows of `source` (as `find_file_pairs` takes it) as an embeddings folder `out`, whole or not at all.

    Args:
        model_spec: the model of the vectors, as `load` takes it; `unknown`; or empty if `vlm index export` wrote them.
        modality: by default image, or that of an export.
        metadata: where the tables are, if not next to the vectors.

    Raises:
        UsageError: files do not belong together, a column is missing, the model has another dimension, or `out`
            exists.
        VlmError: a file is damaged, or no row can be used. OSError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_not_exists(out)
    written = exported_space(source)
    if modality is None:
        modality = written.modality if written else "image"
    # all files are opened and joined before one row is written
    parts = open_parts(find_file_pairs(source, modality=modality, metadata=metadata), column_choice or ColumnChoice())
    # a part stands for a shard, and a row's key is its uid column or its number
    names = [str(part.pair.path.with_suffix("")) for part in parts]
    assigner = UidAssigner(names, [read_names(part) for part in parts])
    space = _choose_space(model_spec, parts[0].dimension, modality, written, load)
    identity = {"modality": modality, "model": space.fingerprint, "source": str(source.absolute())}
    with atomic_folder(out) as folder:
        importer = _Importer(EmbeddingsWriter(folder, space=space, identity=identity), assigner)
        importer.import_all(parts)
        manifest = importer.finish()
    first = parts[0]
    left_out: dict[str, None] = {}
    for part in parts:
        if part.columns:
            left_out |= dict.fromkeys(part.columns.left_out)
    return ImportSummary(
        folder=str(out),
        model=space.model,
        modality=modality,
        dimension=space.dimension,
        files=len(parts),
        rows=manifest.counts["rows"],
        bad=manifest.counts["bad"],
        scaled=importer.scaled,
        renamed=assigner.num_renamed,
        uid_column=first.columns.uid if first.columns else "",
        left_out=tuple(left_out),
        approximate=first.faiss.kind if first.faiss and not first.faiss.is_exact else "",
        seconds=time.perf_counter() - started,
    )


def _choose_space(
    spec: str, dimension: int, modality: Modality, written: EmbeddingSpace | None, load: Callable[[str], Encoder]
) -> EmbeddingSpace:
    if not spec and written is None:
        raise UsageError(
            f"Name the model of these vectors by --model, or --model {UNKNOWN}: then only stored items can be queries."
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
    """Writes blocks into an embeddings folder. rows: written so far. scaled: those that were not of unit length."""

    def __init__(self, writer: EmbeddingsWriter, assigner: UidAssigner) -> None:
        self._writer = writer
        self._assigner = assigner
        self._shards: dict[str, None] = {}
        self._num_blocks = 0
        self.rows = 0
        self.scaled = 0

    def import_all(self, parts: Sequence[SourcePart]) -> None:
        """Every row, in order."""
        with progress(total=sum(part.rows for part in parts), what="import", unit=" rows") as bar:
            for number, part in enumerate(parts):
                for block in read_blocks(part):
                    self.import_block(number, block)
                    bar.update(len(block.vectors))

    def import_block(self, part: int, block: Block) -> None:
        """Write the usable rows of a block."""
        # rows that are not finite, or too large to square, are skipped below
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = to_float32(block.vectors)
            lengths = np.linalg.norm(vectors, axis=1)
        is_usable = np.isfinite(lengths) & (lengths >= _SHORTEST)
        # rows that are of unit length up to rounding are stored unchanged
        is_off = is_usable & (np.abs(lengths - 1) > _ROUNDING)
        # a division by 1 changes no bit
        rows = vectors[is_usable] / np.where(is_off, lengths, 1)[is_usable, None]
        origins: list[Origin] = []
        skipped: list[SkippedSampleRecord] = []
        for position, length in enumerate(lengths.tolist()):
            origin = self._origin(part, block, position)
            if is_usable[position]:
                origins.append(origin)
                self._shards[origin.shard] = None
            else:
                skipped.append(self._skip(origin, block, position, length))
        self._writer.add(str(block.part.place.absolute()), rows, origins, skipped)
        self._num_blocks += 1
        self.rows += len(origins)
        self.scaled += int(is_off.sum())

    def finish(self) -> Manifest:
        """Write the manifest.

        Raises:
            VlmError: there is no row.
        """
        if not self.rows:
            raise VlmError("No vector can be used: each is zero or not finite. Nothing was imported.")
        space = self._writer.space
        return self._writer.finish(inputs={"model": space.fingerprint}, details={"shards": list(self._shards)})

    def _origin(self, part: int, block: Block, position: int) -> Origin:
        number = block.first + position
        columns = block.part.columns
        record = block.records[position] if block.records is not None else {}
        key = str(record[columns.uid]) if columns and columns.uid else str(block.part.first + number)
        uid = self._assigner.name(part, number, key)
        if columns and columns.is_vlm_export:
            captions = captions_from_json(record["captions"])
            metadata = json.loads(record["metadata"])
            # the rest of the origin stays that of the export, its shard too
            return Origin(**record | {"uid": uid, "captions": captions, "metadata": metadata})
        # nulls are left out: a table has every column in every row
        fields: dict[str, Any] = {}
        for name in columns.metadata if columns else ():
            value = to_json_value(record[name])
            if value is not None:
                fields[name] = value
        return Origin(
            uid=uid,
            key=key,
            shard=str(block.part.pair.path.absolute()),
            number=number,
            image_offset=0,
            image_size=0,
            caption_number=0 if self._writer.space.modality == "text" else None,
            captions=captions_of(record[columns.caption]) if columns and columns.caption else {},
            metadata=fields,
        )

    def _skip(self, origin: Origin, block: Block, position: int, length: float) -> SkippedSampleRecord:
        number = block.first + position
        return SkippedSampleRecord(
            part=part_name(self._num_blocks),
            shard=origin.shard,
            number=number,
            key=origin.key,
            reason="no direction" if length < _SHORTEST else "not finite",
            detail=f"row {number} of {block.part.place} has length {length:.4g}",
        )
