"""The APIs of other tools: OpenAI's `/v1/embeddings`, and clip-retrieval's service for its unchanged client."""

import base64
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from vlm.errors import UsageError
from vlm.index.catalog import Entry
from vlm.server.app import PROBLEMS, Service, in_thread, reply
from vlm.server.schemas import (
    EmbeddingsAnswer,
    EmbeddingsRequest,
    KnnRequest,
    KnnResult,
    MetadataRequest,
    RowMetadata,
    decode_data_url,
)
from vlm.server.served_index import ServedIndex, checked_uploads
from vlm.service.query import Query

Body = TypeVar("Body", bound=BaseModel)

MOST_INPUTS = 256
CLIP_RETRIEVAL_DUPLICATE = 0.94
"""The cosine from which clip-retrieval counts two results as duplicates."""


def add_openai_routes(api: FastAPI, service: Service) -> None:
    """`POST /v1/embeddings`: unit vectors of texts and images by the model of an index, named by `model`."""

    @api.post("/v1/embeddings", responses=PROBLEMS, response_model=EmbeddingsAnswer)
    async def embeddings(request: EmbeddingsRequest) -> Response:
        """Embed texts, and images as data URLs, in the order given."""
        inputs = [request.input] if isinstance(request.input, str) else request.input
        if not 1 <= len(inputs) <= MOST_INPUTS:
            raise UsageError(f"`input` has {len(inputs):,} entries; give 1 to {MOST_INPUTS}.")
        # any name of a model is accepted with one index, since clients insist on naming one
        name = request.model if request.model in service.indexes else next(iter(service.indexes))
        index = service.index(name)
        vectors = await in_thread(embed_inputs, index, inputs, service.limits.max_pixels)
        if request.dimensions is not None and request.dimensions != vectors.shape[1]:
            raise UsageError(f"dimensions = {request.dimensions}: the model of {name} gives {vectors.shape[1]}.")
        data: list[dict[str, Any]] = []
        for number, vector in enumerate(vectors):
            as_text = request.encoding_format == "base64"
            # little-endian float32, as OpenAI's clients decode it
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
            data.append({"object": "embedding", "index": number, "embedding": value})
        # clients of OpenAI require the field; nothing is billed here
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return reply({"object": "list", "data": data, "model": name, "usage": usage})


def embed_inputs(index: ServedIndex, inputs: list[str], max_pixels: int) -> np.ndarray:
    """Unit vectors float32 [N, D] of texts and of images as data URLs, in the order given.

    Raises:
        UsageError: a text is empty, or an image is none or too large.
    """
    images = {number: decode_data_url(value) for number, value in enumerate(inputs) if is_data_url(value)}
    checked_uploads(list(images.values()), max_pixels)
    texts = {number: value for number, value in enumerate(inputs) if number not in images}
    if not all(map(str.strip, texts.values())):
        raise UsageError("A text of `input` is empty.")
    size = index.service.index.details.space.dimension
    # one batch of texts and one of images, put back in the order of the inputs
    vectors = np.zeros((len(inputs), size), np.float32)
    if texts:
        vectors[list(texts)] = index.embed_texts(list(texts.values()))
    if images:
        vectors[list(images)] = index.embed_images(list(images.values()))
    return vectors


def is_data_url(value: str) -> bool:
    """Whether an input is an image rather than a text."""
    return value.startswith("data:image/")


def add_clip_retrieval_routes(api: FastAPI, service: Service) -> None:
    """`/knn-service`, `/metadata` and `/indices-list` with clip-retrieval's fields.

    Safety, violence and aesthetic models are not there: their switches are accepted and change nothing, as in a
    clip-retrieval without these models. Addresses of images are refused: the server fetches nothing.
    """

    @api.post("/knn-service", responses=PROBLEMS, response_model=list[KnnResult], openapi_extra=_body_of(KnnRequest))
    async def knn_service(request: Request) -> Response:
        """Nearest rows of a text, an image in base64, or a vector."""
        # clip-retrieval's client sends JSON without saying so
        body = await _parse(KnnRequest, request)
        name = body.indice_name or next(iter(service.indexes))
        index = service.index(name)
        result = await service.batchers[name].submit(_knn_query(body, service))
        found: list[dict[str, Any]] = []
        for number, hit in enumerate(result.hits):
            # as there, only the first num_images come with metadata
            values = metadata_of(index, hit.entry) if number < body.num_images else {}
            found.append(values | {"id": hit.entry.row, "similarity": hit.score})
        return reply(found)

    @api.post(
        "/metadata", responses=PROBLEMS, response_model=list[RowMetadata], openapi_extra=_body_of(MetadataRequest)
    )
    async def metadata(request: Request) -> Response:
        """Metadata of rows by the ids that `/knn-service` gave."""
        body = await _parse(MetadataRequest, request)
        index = service.index(body.indice_name or next(iter(service.indexes)))
        entries = await in_thread(index.live_entries, body.ids)
        return reply([{"id": entry.row, "metadata": metadata_of(index, entry)} for entry in entries])

    @api.get("/indices-list", response_model=list[str])
    async def indices_list() -> Response:
        """The names of the indexes."""
        return reply(list(service.indexes))


def _body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What the description says of a body that is read without looking at its content type."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def _parse(kind: type[Body], request: Request) -> Body:
    try:
        return kind.model_validate(await request.json())
    except ValidationError as error:
        raise UsageError(f"The request is not understood: {error.errors()[0]['msg']}.") from error
    except ValueError as error:
        raise UsageError(f"The request is not JSON: {error}.") from error


def _knn_query(body: KnnRequest, service: Service) -> Query:
    if body.image_url:
        raise UsageError("image_url: the server fetches nothing; send the image itself, in base64, as `image`.")
    images: tuple[bytes, ...] = ()
    if body.image:
        try:
            data = base64.b64decode(body.image, validate=True)
        except ValueError as error:
            raise UsageError(f"`image` is not valid base64: {error}.") from error
        images = tuple(checked_uploads([data], service.limits.max_pixels))
    # cut, not refused: a client that asks for more still gets an answer
    top = min(body.num_result_ids, service.limits.max_results)
    # the first that is there decides, in clip-retrieval's order
    if body.text:
        query = Query(texts=(body.text,), top=top)
    elif images:
        query = Query(images=images, top=top)
    else:
        query = Query(vectors=(tuple(body.embedding_input),) if body.embedding_input else (), top=top)
    if body.deduplicate:
        query = replace(query, duplicates=CLIP_RETRIEVAL_DUPLICATE)
    query.check()
    return query


def metadata_of(index: ServedIndex, entry: Entry) -> dict[str, Any]:
    """The columns of clip-retrieval's metadata: those of the row, its caption and, where paths are shown, its image."""
    caption = next((texts[0] for texts in entry.captions.values() if texts), "")
    values = entry.metadata | {"caption": caption, "uid": entry.uid, "key": entry.key}
    if index.shows_paths:
        values["image_path"] = entry.path
    return values
