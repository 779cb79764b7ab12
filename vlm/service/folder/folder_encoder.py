"""The model of a folder's index: loaded when something is to be embedded, and held to be the one of the index."""

import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import numpy as np

from vlm.errors import UsageError
from vlm.index.embeddings_folder import check_unit_norm
from vlm.index.encoder import Encoder
from vlm.service.folder.folder_reader import FileReading, View
from vlm.service.folder.folder_state import ContentRecord
from vlm.service.query import embed_pixels

LoadEncoder = Callable[[str], Encoder]


class FolderEncoder:
    """A model that is loaded by whoever first needs it, from any thread, and stays.

    fingerprint: what the model's must be; empty takes any.
    """

    def __init__(self, spec: str, load: LoadEncoder, *, fingerprint: str = "") -> None:
        self._spec = spec
        self._load = load
        self._fingerprint = fingerprint
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    def get(self) -> Encoder:
        """The model.

        Raises:
            UsageError: there is none of this name, or its fingerprint is another.
        """
        # the threads that read ask for the view at once, and the first of them loads the model for all
        with self._lock:
            if self._encoder is None:
                encoder = self._load(self._spec)
                if self._fingerprint not in ("", encoder.fingerprint):
                    raise UsageError(
                        f"{self._spec} is not the model that embedded this folder before (its fingerprint is "
                        f"{encoder.fingerprint}, that of the index {self._fingerprint}): name that model, or embed all "
                        "images again with --rebuild."
                    )
                self._encoder = encoder
            return self._encoder

    def view(self) -> View:
        """The view of the model; raises as `get`."""
        return self.get().view

    def embed(self, readings: Sequence[FileReading], known_digests: Container[bytes]) -> list[ContentRecord]:
        """The contents of a batch that are not known, each once, with their vectors.

        Raises:
            VlmError: a vector is not of unit length; as `get`.
        """
        contents: dict[bytes, ContentRecord] = {}
        pixels: dict[bytes, np.ndarray] = {}
        names: list[str] = []
        for reading in readings:
            content = reading.content
            # the batch before may have embedded what was new when this one was read ahead
            if content is None or content.digest in known_digests or content.digest in contents:
                continue
            contents[content.digest] = content
            if reading.pixels is not None:
                pixels[content.digest] = reading.pixels
                names.append(reading.file.path)
        if pixels:
            vectors = embed_pixels(self.get(), np.stack(list(pixels.values())))
            check_unit_norm(vectors, names)
            for digest, vector in zip(pixels, vectors.astype(np.float16), strict=True):
                contents[digest] = replace(contents[digest], vector=vector)
        return list(contents.values())
