"""Pictures sorted into a folder per class: the class is the caption, through a template."""

from pathlib import PurePosixPath
from typing import Any

from vlm.data.samples import UNNAMED, Pair
from vlm.data.sources.files import PICTURE_SUFFIXES, SourceFiles
from vlm.data.sources.table import unique_keys
from vlm.errors import UsageError
from vlm.files import fingerprint_of


class ClassFolderSource:
    """`CLASS/picture.jpg`, below any other folders; metadata `label` and `file`.

    Pictures come in the order of their own names, not of their classes, so that a shard holds many classes.
    """

    captions_are_labels = True

    def __init__(self, files: SourceFiles, *, template: str) -> None:
        if "{}" not in template:
            raise UsageError(f"The template {template!r} has no {{}} for the class; an example: 'a photo of a {{}}.'")
        self._files, self._template = files, template
        self._names = sorted(filter(is_classified, files.names()), key=lambda name: (PurePosixPath(name).name, name))
        self._keys = unique_keys([(None, name) for name in self._names])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Pair:
        """The picture with its class said through the template."""
        name = self._names[number]
        label = PurePosixPath(name).parent.name
        caption = self._template.replace("{}", label.replace("_", " "))
        metadata = {"label": label, "file": name}
        return Pair(
            key=self._keys[number], image=self._files.read(name), captions={UNNAMED: (caption,)}, metadata=metadata
        )

    def fingerprint(self) -> str:
        """Names and sizes of all files, and the template."""
        return fingerprint_of(self._files.fingerprint(), self._template)

    def describe(self) -> dict[str, Any]:
        """The template and the classes found."""
        classes = sorted({PurePosixPath(name).parent.name for name in self._names})
        return {"kind": "classes", "address": self._files.address, "template": self._template, "classes": classes}


def is_classified(name: str) -> bool:
    """Whether a name is that of a picture inside a folder."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and len(path.parts) > 1
