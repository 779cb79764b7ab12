"""A pair as the members of a WebDataset sample."""

import io
import json
from typing import Any

import numpy as np

from vlm.data.decode import open_picture, to_rgb
from vlm.data.samples import UNNAMED, Captions, Pair

_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


def encode_pair(pair: Pair, *, verify: bool = True) -> dict[str, Any]:
    """A pair as `__key__`, a picture, `txt`, `json` and `NAME.npy`, ready for webdataset's TarWriter.

    The text is the first caption of the first language; the JSON holds the metadata with all captions.

    Raises:
        BadSample: the picture cannot be decoded (what is kept as it is is only looked into if `verify`).
    """
    extension, image = storable_picture(pair.image, verify=verify)
    text = next(iter(pair.captions.values()))[0]
    content = json.dumps(pair.metadata | written_captions(pair.captions), ensure_ascii=False)
    arrays = {f"{name}.npy": _array_file(array) for name, array in pair.arrays.items()}
    return arrays | {
        "__key__": pair.key,
        extension: image,
        "txt": text.encode(errors="replace"),
        "json": content.encode(errors="replace"),
    }


def storable_picture(image: bytes, *, verify: bool) -> tuple[str, bytes]:
    """Extension and bytes: JPEG, PNG and WebP, which all readers know, as they are, the rest upright, in RGB, as PNG.

    Raises:
        BadSample: it cannot be decoded.
    """
    picture = open_picture(image)
    extension = _KEPT_FORMATS.get(picture.format or "")
    if extension is not None:
        if verify:
            to_rgb(picture, resolution=1 / 8)
        return extension, image
    file = io.BytesIO()
    to_rgb(picture).save(file, format="PNG")
    return "png", file.getvalue()


def written_captions(captions: Captions) -> dict[str, Any]:
    """Captions as `captions_of` reads them from `key.json`.

    >>> written_captions({"": ("a dog",), "zh": ("狗",)})
    {'captions': ['a dog'], 'captions_zh': ['狗']}
    >>> written_captions({"de": ("Hund",)})
    {'captions': {'de': ['Hund']}}
    """
    named = {language: list(texts) for language, texts in captions.items() if language != UNNAMED}
    if UNNAMED not in captions:
        return {"captions": named}
    beside = {f"captions_{language}": texts for language, texts in named.items()}
    return {"captions": list(captions[UNNAMED])} | beside


def _array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
