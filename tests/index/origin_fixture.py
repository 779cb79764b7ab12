"""Fixture: origins of rows that were never embedded."""

from typing import Any

from vlm.data.samples import Captions
from vlm.index.embeddings_folder import Origin


def make_origin(
    uid: str,
    metadata: dict[str, Any],
    captions: Captions | None = None,
    *,
    shard: str = "/nowhere/0.tar",
    number: int = 0,
) -> Origin:
    """Where an image would have come from; its key is its uid."""
    return Origin(
        uid=uid,
        key=uid,
        shard=shard,
        number=number,
        image_offset=0,
        image_size=0,
        caption_number=None,
        captions=captions or {},
        metadata=metadata,
    )
