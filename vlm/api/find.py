"""Search a folder of images where it lies, with words or images; the first call indexes it, later ones catch up."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import platformdirs

from vlm.data.image_inputs import encoded_image, image_list
from vlm.data.photo_formats import decodable_image
from vlm.errors import BadSample, UsageError, VlmError, os_errors_explained
from vlm.files import compute_fingerprint
from vlm.service.folder.folder_encoder import LoadEncoder
from vlm.service.folder.folder_index import FolderBusyError, FolderIndex, FolderUpdate, NoModelError
from vlm.service.folder.folder_reader import FOLDER_FIELDS
from vlm.service.folder.folder_scan import ChangeWaiter
from vlm.service.query import Query, load_encoder, load_query_encoder
from vlm.service.search import SearchResult, SearchService

# imported where a model is loaded: a search without one takes no time for it
if TYPE_CHECKING:
    from vlm.api.inference import Model
    from vlm.index.encoder import Encoder
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)

MODEL_VARIABLE = "VLM_MODEL"
"""The environment variable that names the model of folders that were never indexed."""

Words = str | Sequence[str]
FolderModel: TypeAlias = "str | Path | Model | VisionLanguageModel"

_MAX_NAMED_MODELS = 5


def find(
    folder: str | Path,
    words: Words = (),
    *,
    like: Any = (),
    minus: Words = (),
    where: str = "",
    top: int = 10,
    relevant: bool | float = False,
    model: FolderModel = "",
    index: str | Path | None = None,
    update: bool = True,
    rebuild: bool = False,
) -> SearchResult:
    """The images of a folder that are nearest to words, to other images, or to both.

    The first call embeds all images of the folder, which may take long, shows how long, and can be interrupted: the
    next call resumes. Later calls embed only contents that are new. Nothing is written into the folder.

    Args:
        folder: where the images lie.
        words: one or several queries, combined.
        like: images to search by: paths, bytes, PIL images, arrays or tensors, one or several; combined too.
        minus: words to subtract.
        where: a filter, as `"year = 2024 and camera like 'Canon%' and folder = 'trips/rome'"`; fields are taken (as
            "2024-05-17T10:22:31"), year, month, camera, latitude, longitude, folder, file, width, height, caption, and
            those of a JSON next to an image.
        top: number of hits; the uid of a hit is its path below the folder.
        relevant: only hits that are likely relevant, as of `SearchIndex.search`; for words alone or images alone.
        model: a MODEL as of `vlm.load`, or what that gave; by default the one of the index, else VLM_MODEL.
        index: where the index is kept, by default among the user's data.
        update: look for changes first; otherwise search what is indexed. rebuild: embed all images again.

    Raises:
        UsageError: there is nothing to search for, no image or no model, or the index is of another model.
        VlmError: an image to search by cannot be read, the disk is full, or the index is damaged.
    """
    if rebuild and not update:
        raise UsageError("rebuild is an update: leave update as it is.")
    images = ImageFolder(folder, model=model, index=index)
    if update:
        images.update(rebuild=rebuild)
    return images.search(words, like=like, minus=minus, where=where, top=top, relevant=relevant)


def watch(
    folder: str | Path,
    *,
    model: FolderModel = "",
    index: str | Path | None = None,
    poll_seconds: float | None = None,
) -> Iterator[FolderUpdate]:
    """Keep the index of a folder up to date: one update at once, then one for each batch of changes, without end.

    poll_seconds: look for changes so often instead of being told by the system, as network drives need.

    Raises: as of `find`, and UsageError if `poll_seconds` is not above 0.
    """
    if poll_seconds is not None and not poll_seconds > 0:
        raise UsageError(f"poll_seconds = {poll_seconds:g} is out of range: give seconds above 0.")
    return ImageFolder(folder, model=model, index=index).watch(poll_seconds=poll_seconds)


class ImageFolder:
    """A folder of images with its index; arguments as of `find`.

    load: gives the model of a spec; None: torch for images to be indexed, an ONNX export for queries if there is one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: FolderModel = "",
        index: str | Path | None = None,
        load: LoadEncoder | None = None,
    ) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UsageError(f"There is no folder {str(folder)!r}; name a folder of images.")
        home = default_home(root) if index is None else Path(index).expanduser()
        # images to be indexed are embedded by torch; queries by an ONNX export where there is one
        load_rows = load or load_encoder
        self._load = load or load_query_encoder
        self._model = str(model) if isinstance(model, str | Path) else model.name
        if not isinstance(model, str | Path):
            # what vlm.load gives holds the encoder
            encoder = cast("Encoder", getattr(model, "encoder", model))
            load_rows = self._load = lambda _: encoder
        # an index keeps its model, whatever the environment says today
        self._folder = FolderIndex(
            root, home, model_spec=self._model, default_spec=os.environ.get(MODEL_VARIABLE, ""), load=load_rows
        )
        self._service: SearchService | None = None

    @property
    def root(self) -> Path:
        """The folder, with its links resolved."""
        return self._folder.root

    @property
    def home(self) -> Path:
        """Where all that is known of the folder is kept."""
        return self._folder.home

    @property
    def index_folder(self) -> Path:
        """The index, which `vlm search` takes too."""
        return self._folder.index_folder

    @os_errors_explained()
    def update(self, *, rebuild: bool = False) -> FolderUpdate | None:
        """Take in what has changed; None if another process is doing so and there is an index to search meanwhile.

        rebuild: embed all images again, as with another model.

        Raises: as of `find`.
        """
        try:
            return self._folder.update(rebuild=rebuild)
        except NoModelError as error:
            raise NoModelError(f"{error} {_local_models_hint()}") from error
        except FolderBusyError as error:
            if rebuild or not self._folder.is_indexed:
                raise
            logger.warning(f"{error} Until then its last version is searched.")
            return None

    @os_errors_explained()
    def search(
        self,
        words: Words = (),
        *,
        like: Any = (),
        minus: Words = (),
        where: str = "",
        top: int = 10,
        relevant: bool | float = False,
    ) -> SearchResult:
        """Search what is indexed; arguments and raises as of `find`."""
        texts = (words,) if isinstance(words, str) else tuple(words)
        minus_texts = (minus,) if isinstance(minus, str) else tuple(minus)
        likes = [encoded_image(image) for image in image_list(like)]
        if not texts and not likes:
            raise UsageError("There is nothing to search for: give words, or an image to search by.")
        if not self._folder.is_indexed:
            raise UsageError(f"{self.root} was never indexed: look for changes once, by vlm find without --no-update.")
        items: list[str] = []
        images: list[Path | bytes] = []
        for image in likes:
            data = _read_image(image)
            if uid := self._find_indexed(data):
                items.append(uid)
            else:
                images.append(_query_image(image, data))
        query = Query.of(
            texts=texts,
            images=tuple(images),
            items=tuple(items),
            minus=minus_texts,
            where=where,
            top=top,
            relevant=relevant,
        )
        return self._open_service().search(query)

    def watch(self, *, poll_seconds: float | None = None) -> Iterator[FolderUpdate]:
        """As the function `watch`; of the updates after the first those that found a change."""
        waiter = ChangeWaiter(self.root, poll_seconds=poll_seconds)
        is_first = True
        for _ in waiter.waits():
            update = self._update_when_free()
            waiter.set_scan_seconds(update.scan_seconds)
            if is_first or update.has_changes:
                yield update
            is_first = False

    @os_errors_explained()
    def _update_when_free(self) -> FolderUpdate:
        while True:
            try:
                return self._folder.update()
            except NoModelError as error:
                raise NoModelError(f"{error} {_local_models_hint()}") from error
            except FolderBusyError as error:  # after some seconds of waiting
                logger.info(str(error))

    def _find_indexed(self, image: bytes) -> str | None:
        try:
            return self._folder.find_indexed(image)
        except FolderBusyError:
            return None

    def _open_service(self) -> SearchService:
        if self._service is None:
            self._service = SearchService.open(self.index_folder, model_spec=self._model, load=self._load)
            # where no image has, say, EXIF, no row has a year: that is no mistake in a filter
            self._service.optional_fields = FOLDER_FIELDS
        return self._service


def default_home(folder: Path) -> Path:
    """Where the index of a folder is kept: among the user's data, by the folder's real path."""
    real = folder.resolve()
    name = f"{real.name or 'root'}-{compute_fingerprint(str(real))}"
    return platformdirs.user_data_path("vlm", appauthor=False) / "folders" / name


def _local_models_hint() -> str:
    """What loads here without a network, and how to get another."""
    from vlm.api.local_models import list_models

    names = [model.model for model in list_models().models if not model.missing]
    shown = ", ".join(names[:_MAX_NAMED_MODELS]) + (" …" if len(names) > _MAX_NAMED_MODELS else "")
    have = f"These work offline here: {shown}." if names else "None was found here that works offline."
    return f"{have} vlm models lists them, and with --fetch MODEL brings another here."


def _read_image(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except (OSError, ValueError) as error:  # no file has NUL in its name
        reason = error.strerror if isinstance(error, OSError) else "that is not a valid file name"
        raise UsageError(f"{image} cannot be read: {reason or error}.") from error


def _query_image(image: Path | bytes, data: bytes) -> Path | bytes:
    """The image as a query takes it: a file by its name, unless its format has to be converted."""
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        decodable = decodable_image(data, name)
    except BadSample as error:
        raise VlmError(f"{name} cannot be used as a query: {error}.") from error
    return image if decodable is data else decodable
