"""Requests and answers of the HTTP API: their fields, limits and examples, from which OpenAPI's description is made."""

import base64
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vlm.errors import UsageError
from vlm.service.query import Query

MAX_TERMS = 32
MAX_TEXT = 2000
MAX_FACETS = 20
MAX_METADATA = 65_536
MAX_DEPTH = 8
MAX_CLASS_TEXTS = 20_000
MAX_POINTS = 10_000
MAX_WORDS = 32

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Uid = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
DataUrl = Annotated[str, Field(description="An image as a data URL: data:image/jpeg;base64,…")]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A body whose unknown fields are refused, so that a misspelt option does not pass for its default.

    Nor are values of another type turned into the right one: "top": true is a mistake, not 1.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


class SearchRequest(Strict):
    """A query: the weighted sum of texts, images, stored items and vectors, minus the `minus` texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["a dog in the snow"], "minus": ["water"], "top": 20}]},
    )

    texts: list[Text] = Field(default=[], max_length=MAX_TERMS)
    images: list[DataUrl] = Field(default=[], max_length=MAX_TERMS)
    items: list[Uid] = Field(default=[], max_length=MAX_TERMS, description="Uids of rows to search by.")
    vectors: list[Annotated[list[Number], Field(min_length=1, max_length=65536)]] = Field(
        default=[], max_length=MAX_TERMS, description="Vectors of the index's space."
    )
    minus: list[Text] = Field(default=[], max_length=MAX_TERMS, description="Texts to subtract.")
    weights: list[Number] = Field(
        default=[],
        max_length=5 * MAX_TERMS,
        description="One for each term, in the order texts, images, items, vectors, minus; empty weighs all equally.",
    )
    top: int = Field(default=20, ge=1, le=2**31 - 1, description="Number of hits.")
    where: str = Field(default="", max_length=10_000, description="A filter: \"year > 2020 and colour = 'red'\".")
    at_least: Annotated[float, Field(ge=-1, le=1)] | None = Field(default=None, description="Minimum cosine of a hit.")
    words: str = Field(default="", max_length=MAX_TEXT, description="Boost captions that contain all these words.")
    duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Fold hits whose cosine with a better one is at least this."
    )
    diversity: float = Field(default=0.0, ge=0, le=1)
    relevant: bool | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Only hits that are likely relevant; a number is the least probability."
    )
    rerank_top: int = Field(default=0, ge=0, le=1000, description="Hits to rerank by the captioner's likelihood.")
    after: str = Field(default="", max_length=1000, description="`next` of the page before.")
    facets: list[Annotated[str, Field(max_length=200)]] = Field(
        default=[],
        max_length=MAX_FACETS,
        description="Columns whose values are counted over all rows that match `where`.",
    )

    def to_query(self) -> Query:
        """The query, with its images decoded from their data URLs.

        Raises:
            UsageError: an image is not a data URL.
        """
        return Query(
            texts=tuple(self.texts),
            images=tuple(map(decode_data_url, self.images)),
            items=tuple(self.items),
            vectors=tuple(map(tuple, self.vectors)),
            minus=tuple(self.minus),
            weights=tuple(self.weights),
            top=self.top,
            where=self.where,
            at_least=self.at_least,
            words=self.words,
            duplicates=self.duplicates,
            diversity=self.diversity,
            relevant=self.relevant,
            rerank_top=self.rerank_top,
            after=self.after,
        )


class BatchRequest(Strict):
    """Several queries, answered from one version of the index."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"queries": [{"texts": ["a dog"]}, {"texts": ["a cat"], "top": 3}]}]}
    )

    queries: list[SearchRequest] = Field(min_length=1, max_length=64)


class FacetsRequest(Strict):
    """Columns to count the values of, among the rows that match a filter."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"fields": ["width"], "where": "width >= 16"}]})

    fields: list[Annotated[str, Field(max_length=200)]] = Field(min_length=1, max_length=MAX_FACETS)
    where: str = Field(default="", max_length=10_000)
    top: int = Field(default=20, ge=1, le=1000)


class ClassifyRequest(Strict):
    """Images, given or stored, and the classes to choose from."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": ["train-000005"], "classes": ["cat", "dog"]}]})

    images: list[DataUrl] = Field(default=[], max_length=MAX_TERMS)
    items: list[Uid] = Field(default=[], max_length=MAX_TERMS)
    classes: list[Text] = Field(min_length=2, max_length=10_000)
    templates: list[Text] = Field(default=[], max_length=100, description="With {} for the name of the class.")
    top: int = Field(default=5, ge=1, le=10_000)

    @model_validator(mode="after")
    def check_texts(self) -> "ClassifyRequest":
        """Refuse more texts than a model embeds in the time of a request."""
        number = len(self.classes) * max(1, len(self.templates))
        if number > MAX_CLASS_TEXTS:
            raise ValueError(f"classes times templates are {number:,} texts; at most {MAX_CLASS_TEXTS:,} are accepted")
        return self


class CaptionRequest(Strict):
    """Images, given or stored, to caption."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": ["train-000005"], "prompt": "a picture of"}]})

    images: list[DataUrl] = Field(default=[], max_length=MAX_TERMS)
    items: list[Uid] = Field(default=[], max_length=MAX_TERMS)
    prompt: str = Field(default="", max_length=MAX_TEXT, description="Prefix of every caption.")
    captions: int = Field(default=1, ge=1, le=16, description="For each image, the best first.")
    beams: int = Field(default=1, ge=1, le=16, description="Width of beam search; 1 is greedy.")
    sample: bool = Field(default=False, description="Draw tokens at random, by temperature, top_p and seed.")
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_length: int = Field(default=0, ge=0, le=10_000, description="Tokens; 0 is the model's context length.")
    seed: int = Field(default=0, ge=0, le=2**63)


class ExplainRequest(Strict):
    """An image, given or stored, and the text that it is compared with."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item": "train-000005", "text": "a dog in the snow"}]})

    item: Uid | None = Field(default=None, description="Uid of a row; or give `image`.")
    image: DataUrl | None = None
    text: Text
    words: bool = Field(default=False, description=f"A map for each word by itself, too; of {MAX_WORDS} words at most.")
    against: list[Text] = Field(
        default=[], max_length=MAX_TERMS, description="Other texts: what speaks for `text` rather than for these."
    )
    method: Literal["auto", "attention", "grad-cam", "hires-cam", "similarity", "eigen-cam", "occlusion"] = "auto"

    @model_validator(mode="after")
    def _has_one_image(self) -> "ExplainRequest":
        if (self.item is None) == (self.image is None):
            raise ValueError("give either item or image")
        return self


class NewItem(Strict):
    """An image to add; without a uid it is named by a digest of its bytes."""

    image: DataUrl
    uid: str = Field(default="", max_length=MAX_TEXT)
    captions: list[Text] = Field(default=[], max_length=100)
    metadata: dict[Annotated[str, Field(min_length=1, max_length=200)], Any] = Field(default={}, max_length=100)

    @field_validator("metadata")
    @classmethod
    def check_metadata(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        """Refuse what would make rows large or their filters slow."""
        # first: what is nested a thousand levels deep cannot be written as JSON
        if _depth(metadata) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        size = len(json.dumps(metadata))
        if size > MAX_METADATA:
            raise ValueError(f"it has {size:,} bytes as JSON; at most {MAX_METADATA:,} are accepted")
        return metadata


def _depth(value: Any) -> int:
    """Levels of mappings and lists; stops one beyond the limit, however deep the value is."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for inner in level:
            if isinstance(inner, dict):
                below += inner.values()
            elif isinstance(inner, list):
                below += inner
        if not below:
            return depth
        level = below
    return MAX_DEPTH + 1


_NEW_ITEM = {
    # a GIF of one pixel
    "image": "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=",
    "uid": "new-1",
    "captions": ["a white square"],
    "metadata": {"year": 2026},
}


class AddRequest(Strict):
    """Images to add to the index, which are embedded by its model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [_NEW_ITEM]}]})

    items: list[NewItem] = Field(min_length=1, max_length=256)


class DeleteRequest(Strict):
    """Rows to delete: by uid or by a filter, not both. More than half of the index only if `expect` says how many."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"where": "year < 2000", "expect": 1200}]})

    uids: list[Uid] = Field(default=[], max_length=100_000)
    where: str = Field(default="", max_length=10_000)
    dry_run: bool = Field(default=False, description="Only say what would be deleted.")
    expect: int | None = Field(
        default=None, ge=0, description="The number of rows to delete; if it is another, nothing is deleted."
    )


class MapRequest(Strict):
    """A region of the map: its points, coloured by a column, and the places of some rows."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"box": [-0.5, -0.5, 0.5, 0.5], "top": 2000}]})

    box: Annotated[list[Number], Field(min_length=4, max_length=4)] | None = Field(
        default=None, description="Left, bottom, right, top; the whole map lies within -1 and 1."
    )
    top: int = Field(
        default=2000, ge=1, le=MAX_POINTS, description="Most points; those of a wider view are among them."
    )
    colour: str = Field(default="", max_length=200, description="A column whose most frequent values have a number.")
    where: str = Field(default="", max_length=10_000, description="Only rows that match this filter.")
    uids: list[Uid] = Field(default=[], max_length=1000, description="Rows whose places are asked for, shown or not.")


class ItemsRequest(Strict):
    """Several items at once."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"uids": ["train-000005"]}]})

    uids: list[Uid] = Field(min_length=1, max_length=1000)


class EmbeddingsRequest(BaseModel):
    """The request of OpenAI's `/v1/embeddings`: texts, or images as data URLs; further fields are ignored."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a dog", "a cat"], "model": "index"}]})

    input: str | list[str] = Field(description="A text or a data URL, or several.")
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


class KnnRequest(BaseModel):
    """The request of clip-retrieval's `/knn-service`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "a dog", "num_images": 10}]})

    text: str | None = None
    image: str | None = Field(default=None, description="The bytes of an image in base64.")
    image_url: str | None = None
    embedding_input: list[float] | None = None
    modality: str = "image"
    num_images: int = Field(default=100, ge=0)
    num_result_ids: int = Field(default=100, ge=1)
    indice_name: str | None = None
    use_mclip: bool = False
    deduplicate: bool = False
    use_safety_model: bool = False
    use_violence_detector: bool = False
    aesthetic_score: str | int | float | None = None
    aesthetic_weight: str | int | float | None = None


class MetadataRequest(BaseModel):
    """The request of clip-retrieval's `/metadata`: row numbers of `/knn-service`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ids": [3, 4]}]})

    ids: list[int] = Field(max_length=10_000)
    indice_name: str | None = None


def decode_data_url(url: str) -> bytes:
    """The bytes of a base64 data URL.

    Raises:
        UsageError: it is something else.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise UsageError(
            f"An image must be a data URL (data:image/jpeg;base64,…), not {url[:40]!r}: the server fetches nothing."
        )
    try:
        return base64.b64decode(body, validate=True)
    # binascii.Error is one; letters beyond ASCII give another
    except ValueError as error:
        raise UsageError(f"The image's data URL is not valid base64: {error}.") from error


def encode_data_url(data: bytes, media_type: str) -> str:
    """Bytes as a base64 data URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


class ProblemModel(BaseModel):
    """The one shape of an error."""

    error: str = Field(description="A sentence for people: the value, the limit, the cure.")
    kind: str = Field(description="A name for programs.")
    request_id: str = Field(description="The id under which the server's log has the request.")


class Item(BaseModel):
    """A row of the index."""

    uid: str
    key: str
    captions: dict[str, list[str]] = Field(description="By language; the empty one is that of unnamed captions.")
    metadata: dict[str, Any]
    path: str | None = Field(default=None, description="File, or shard and key; only where the server shows paths.")


class HitModel(Item):
    """A result: the row with its score."""

    score: float = Field(description="Cosine of query and row.")
    fused: float | None = Field(default=None, description="Score of rank fusion, for queries with words.")
    similar: int | None = Field(default=None, description="Worse hits that are duplicates of this one.")
    likelihood: float | None = Field(default=None, description="Of the query's texts given the image, if reranked.")
    probability: float | None = Field(default=None, description="Of being relevant, where the query asks for that.")


class ItemsAnswer(BaseModel):
    """The items, in the order of the uids."""

    items: list[Item]


class ValueCountModel(BaseModel):
    """A value of a column and the rows that have it."""

    value: int | float | str
    rows: int


class SearchAnswer(BaseModel):
    """The hits of a query, best first."""

    hits: list[HitModel]
    next: str = Field(description="Cursor of the next page; empty at the end.")
    generation: int = Field(description="Version of the index that was searched.")
    embed_milliseconds: float
    search_milliseconds: float
    cut: list[str] = Field(default=[], description="Texts longer than the model's context, which were truncated.")
    facets: dict[str, list[ValueCountModel]] = {}
    hint: str = Field(default="", description="Why there is no hit.")
    relevance: dict[str, Any] | None = Field(default=None, description="The cut, where the query asks for one.")


class EmbeddingModel(BaseModel):
    """The unit vector of one input: numbers, or float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """The answer of OpenAI's `/v1/embeddings`. usage: zeros, since nothing is counted."""

    object: Literal["list"]
    data: list[EmbeddingModel]
    model: str
    usage: dict[str, int]


class KnnResult(BaseModel):
    """A hit as clip-retrieval gives it; the first `num_images` also have their metadata."""

    model_config = ConfigDict(extra="allow")

    id: int
    similarity: float


class RowMetadata(BaseModel):
    """The metadata of a row, its caption and its uid."""

    id: int
    metadata: dict[str, Any]


class QueryProblem(BaseModel):
    """The error of one query of a batch."""

    error: str


class BatchAnswer(BaseModel):
    """The answer to each query, in their order."""

    results: list[SearchAnswer | QueryProblem]


class FieldModel(BaseModel):
    """A column of the metadata."""

    name: str
    types: list[Literal["number", "text"]]
    distinct: int = Field(description="Number of values; 1,001 stands for more than 1,000.")
    minimum: int | float | None
    maximum: int | float | None
    is_category: bool = Field(description="Whether its values can be counted.")


class FieldsAnswer(BaseModel):
    """The columns of the metadata."""

    fields: list[FieldModel]


class FacetsAnswer(BaseModel):
    """The most frequent values of each column."""

    facets: dict[str, list[ValueCountModel]]


class PointsModel(BaseModel):
    """Points of a map, a list for each property."""

    uids: list[str]
    x: list[float]
    y: list[float]
    values: list[int] = Field(description="The number of each point's value in the legend; -1: none of these.")


class MapAnswer(BaseModel):
    """A region of a map."""

    generation: int
    rows: int = Field(description="Rows that have a place.")
    new: int = Field(description="Rows added since the map was made, which lie among their nearest.")
    unplaced: int = Field(description="Rows without a place, until vlm index map makes the map anew.")
    inside: int = Field(description="Rows of the region that match the filter, shown or not.")
    bounds: list[float] = Field(description="Left, bottom, right and top of the whole map.")
    points: PointsModel
    legend: list[ValueCountModel] = Field(description="The values with a colour, the most frequent first.")
    places: dict[str, list[float]] = Field(description="By uid the place [x, y] of the rows asked for.")


class ClassModel(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class Classes(BaseModel):
    """The classes of one image, the most probable first."""

    classes: list[ClassModel]


class ClassifyAnswer(BaseModel):
    """One entry for each image: those given, then those stored."""

    results: list[Classes]


class ScoredCaption(BaseModel):
    """One caption."""

    caption: str
    log_likelihood: float = Field(description="Mean of its tokens, in nats, without the prompt.")


class ImageCaptions(BaseModel):
    """The captions of one image, the best first."""

    captions: list[ScoredCaption]


class CaptionAnswer(BaseModel):
    """For each image, those given, then those stored: the best caption, and all that were asked for."""

    captions: list[str]
    results: list[ImageCaptions]


class HeatMapModel(BaseModel):
    """Where an image matches a text."""

    text: str
    similarity: float = Field(description="Cosine of image and text.")
    peak: tuple[float, float] = Field(description="The hottest place, in widths and heights from the left and the top.")
    overlay: DataUrl


class ExplainAnswer(HeatMapModel):
    """The map of the text, over the image as the model sees it, and those of its words. method: never "auto"."""

    method: str
    words: list[HeatMapModel]


class ChangeAnswer(BaseModel):
    """What a change did."""

    rows: int = Field(description="Live rows now; after a dry run those that would be left.")
    added: int = 0
    known: int = Field(default=0, description="Images that the index had already; their rows stay as they were.")
    deleted: int = Field(default=0, description="Rows deleted; after a dry run those that match and would be.")
    generation: int = Field(description="The version that answers now.")
    uids: list[str] = Field(default=[], description="Of the images to add, in their order.")
    examples: list[str] = Field(default=[], description="After a dry run uids of some rows that would be deleted.")
    hint: str = Field(default="", description="After a dry run why a filter matches no row.")


class IndexModel(BaseModel):
    """An index in numbers."""

    name: str
    rows: int
    dimension: int
    modality: str
    kind: str
    generation: int
    model: str
    model_fingerprint: str
    map_rows: int = Field(description="Rows that had a place when the map was made; 0 without a map.")
    reload_error: str


class IndexesAnswer(BaseModel):
    """All indexes of the server."""

    indexes: list[IndexModel]


class HealthAnswer(BaseModel):
    """The process is alive."""

    status: Literal["ok"]


class ReadyAnswer(BaseModel):
    """Every index has answered a query, in so many milliseconds."""

    status: Literal["ready"]
    milliseconds: dict[str, float]


class NotReady(BaseModel):
    """An index cannot answer."""

    status: Literal["not ready"]
    index: str
