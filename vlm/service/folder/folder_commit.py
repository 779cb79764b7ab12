"""From what is stored of a folder to its index: a change of a few rows, or an index made anew; nothing is embedded."""

import logging
import shutil
from pathlib import Path

import numpy as np

from vlm.files import compute_fingerprint
from vlm.index.build import create_index
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.index.writer import IndexWriter, InsertBatch
from vlm.manifest import is_complete, read_manifest
from vlm.service.folder.folder_state import FolderState

logger = logging.getLogger(__name__)


def commit_to_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    """Bring the index to what is stored; after a kill at any moment, the next call ends the same.

    Raises:
        VlmError: the disk is full, or the index is damaged.
    """
    was_made = is_complete(index)
    if was_made and read_manifest(index, "index").fingerprint == state.index_fingerprint:
        _change_index(index, state, space)
        return
    # killed before it could note what it did, or changed by another command
    if was_made and state.index_fingerprint:
        logger.info(f"{index} is not as it was left; it is made again from what was embedded.")
    _make_index(index, state, space)


def _change_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    """Write the rows that differ, then delete those that are gone."""
    old_uids = state.old_uids()
    if not old_uids and not state.num_new_rows():
        return
    with IndexWriter(index) as writer:
        writer.update(_new_rows(state, space))
        # some may be gone already
        rows = writer.snapshot.catalogue.rows_by_uid(old_uids)
        commit = writer.delete_rows(np.sort(np.array(list(rows.values()), np.int64)))
        if commit.dead > commit.rows:
            writer.compact()
        fingerprint = writer.snapshot.manifest.fingerprint
    state.set_indexed(fingerprint)


def _make_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    state.forget_index()
    # beside the old one, which readers may have open
    unfinished = index.with_name(f"{index.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    # exact, and cheap to change; a search of 100,000 rows takes some ten milliseconds
    create_index(unfinished, space, kind="flat")
    with IndexWriter(unfinished) as writer:
        writer.add(_new_rows(state, space))
        fingerprint = writer.snapshot.manifest.fingerprint
    shutil.rmtree(index, ignore_errors=True)
    unfinished.rename(index)
    state.set_indexed(fingerprint)


def _new_rows(state: FolderState, space: EmbeddingSpace) -> InsertBatch:
    return InsertBatch(
        space=space,
        count=state.num_new_rows(),
        # the same for every change of this folder: an index keeps a list of them
        source=compute_fingerprint("folder", state.root),
        shards=(state.root,),
        blocks=state.new_vectors,
        origins=state.new_origins,
    )
