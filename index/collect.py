"""From the batches of one shard to the rows of its part: vectors, where they come from, and what had to be left out."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from vlm.data.batches import Incident, Item
from vlm.data.samples import Captions
from vlm.data.tar_index import Span, TarIndex, open_index
from vlm.index.batches import EmbedBatch
from vlm.index.embeddings import Modality
from vlm.index.encoder import Encoder, check_unit_vectors
from vlm.index.parts import IncidentRecord, Origin
from vlm.index.uids import UidNamer
from vlm.tensors import Array, Float32


@dataclass(kw_only=True)
class PartRows:
    """The rows of the part of shard `number` while they grow, batch by batch."""

    name: str
    shard: str
    number: int
    namer: UidNamer
    modality: Modality
    vectors: list[Float32[Array, "_ D"]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    incidents: list[IncidentRecord] = field(default_factory=list)

    def take(self, batch: EmbedBatch, model: Encoder) -> None:
        """Embed the pictures of a batch, or every caption of its samples.

        Raises:
            VlmError: the model gave a vector that is not of unit length.
        """
        is_image = self.modality == "image"
        for incident in sorted((*batch.unread, *(batch.undecoded if is_image else ())), key=_number):
            self._leave_out(_number(incident), incident.reason, incident.detail)
        if is_image:
            origins = [self._picture(item) for item in batch.pictures]
            embedded = model.embed_images(batch.images) if origins else None
        else:
            origins = [origin for item in batch.items for origin in self._captions(item)]
            embedded = model.embed_texts([_only_caption(origin.captions) for origin in origins]) if origins else None
        if embedded is not None:
            vectors = embedded.float().numpy()
            check_unit_vectors(vectors, [f"{origin.uid} of {origin.shard}" for origin in origins])
            self.vectors.append(vectors)
            self.origins += origins

    def matrix(self, dimension: int) -> Float32[Array, "N D"]:
        """All vectors so far."""
        return np.concatenate([np.zeros((0, dimension), np.float32), *self.vectors])

    @cached_property
    def _index(self) -> TarIndex:
        return open_index(self.shard)

    def _picture(self, item: Item) -> Origin:
        place = self._index[item.address.number].image or Span(0, 0)
        return Origin(
            uid=self.namer.name(self.number, item.address.number, item.key),
            key=item.key,
            shard=self.shard,
            number=item.address.number,
            image_offset=place.offset,
            image_size=place.size,
            caption_number=None,
            captions=item.captions,
            metadata=item.metadata,
        )

    def _captions(self, item: Item) -> Iterator[Origin]:
        picture, count = self._picture(item), 0
        for language, texts in item.captions.items():
            for text in texts:
                uid = self.namer.name(self.number, item.address.number, item.key, count)
                yield replace(picture, uid=uid, caption_number=count, captions={language: (text,)})
                count += 1
        if not count:
            self._leave_out(item.address.number, "no caption", "a text embedding needs one")

    def _leave_out(self, number: int, reason: str, detail: str) -> None:
        key = self._index[number].key
        self.incidents.append(
            IncidentRecord(part=self.name, shard=self.shard, number=number, key=key, reason=reason, detail=detail)
        )


def _number(incident: Incident) -> int:
    return incident.address.number


def _only_caption(captions: Captions) -> str:
    ((text,),) = captions.values()
    return text
