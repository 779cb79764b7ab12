"""The class of a training sample: a field of its metadata, as the place of its name in a file of class names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.samples import metadata_value
from vlm.errors import BadSample, UsageError


@dataclass(frozen=True, kw_only=True)
class ClassLabels:
    """field: of the metadata, dots selecting nested ones. numbers: of the classes, by name."""

    field: str
    numbers: Mapping[str, int]

    def number(self, metadata: Mapping[str, Any]) -> int:
        """The class of a sample with this metadata.

        Raises:
            BadSample: it has no such field, or its value is not among the names.
        """
        value = metadata_value(metadata, self.field)
        # true and false would be the classes 1 and 0
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadSample("no class", f"its metadata has no text or number as {self.field!r}")
        if str(value) not in self.numbers:
            raise BadSample("no class", f"{self.field!r} is {value!r}, which is not among the class names")
        return self.numbers[str(value)]


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a file, a JSON list or one a line, in their order.

    Raises:
        UsageError: there is no such file, it has fewer than two names, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"The class names {str(path)!r} cannot be read: {error}.") from error
    names = [str(line).strip() for line in lines if str(line).strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"{path} holds {len(names)} class names; it must hold at least two, each once.")
    return tuple(names)


def open_class_labels(field: str, names_file: str) -> ClassLabels | None:
    """The classes of samples by a field of their metadata, or None without one.

    Raises:
        UsageError: a field is given without a file of names, or the file cannot be read.
    """
    if not field:
        return None
    if not names_file:
        raise UsageError(f"class_field = {field!r} needs the names of the classes; give --class-names FILE.")
    names = read_class_names(Path(names_file))
    return ClassLabels(field=field, numbers={name: number for number, name in enumerate(names)})
