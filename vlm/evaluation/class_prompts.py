"""Class names by number, and the prompt templates that turn a name into the sentences of a classifier.

Both may be files with one entry per line. CLIP_benchmark keeps them at the root of a dataset, above the folders of its
splits: `classnames.txt` and `zeroshot_classification_templates.txt`, whose templates have {c} for the name.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.console import read_text
from vlm.data.shards import expand_shards
from vlm.data.sources.source_registry import holds_shards
from vlm.errors import UsageError
from vlm.evaluation.prompt_ensembles import IMAGENET, TEMPLATE_SETS, imagenet_class_names, template_set
from vlm.storage import is_remote
from vlm.tensor_types import Array, Float32

logger = logging.getLogger(__name__)

# three templates do most of what CLIP's eighty do, and suit drawings and product photos, too
DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of {}.", "{}")

_CLASS_NAMES_FILE = "classnames.txt"
_TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_PLACEHOLDERS = ("{}", "{c}")
# several class numbers, as of a multi-label data set
_SEVERAL_NUMBERS = re.compile(r"\[?\s*\d+(\s*[,;\s]\s*\d+)+\s*\]?")


def read_class_names(classes: str) -> list[str]:
    """Class names as `read_class_list` reads them, each once."""
    return unique_names(read_class_list(classes))


def unique_names(class_list: Sequence[str]) -> list[str]:
    """The names of a class list, each once, without its empty lines."""
    return list(dict.fromkeys(filter(None, class_list)))


def read_class_list(classes: str) -> list[str]:
    """Class names by number, from a file with one per line, whatever it contains, from `a,b,c`, or `imagenet`.

    An empty line of a file is a class without a name, so that the numbers of those below it stay theirs.

    Raises:
        UsageError: the text is neither, or the file is not UTF-8 text.
    """
    if classes and _is_file(classes):
        return [name.strip() for name in read_text(Path(classes)).rstrip().splitlines()]
    if classes == IMAGENET:
        return imagenet_class_names()
    if classes and "," not in classes:
        raise UsageError(
            f"There is no file {classes!r} of class names; give one, names as a,b,c, or {IMAGENET} for its 1,000."
        )
    return [name.strip() for name in classes.split(",") if name.strip()]


def class_list_beside(url: str) -> list[str]:
    """The names in `classnames.txt` next to local shards, or one folder up; empty if there is no such file."""
    path = _file_beside(url, _CLASS_NAMES_FILE)
    return read_class_list(str(path)) if path else []


def templates_beside(url: str) -> list[str]:
    """The templates in `zeroshot_classification_templates.txt` there; empty if there is no such file."""
    path = _file_beside(url, _TEMPLATES_FILE)
    if path is None:
        return []
    templates = read_templates([str(path)])
    logger.info(f"Prompt templates: the {len(templates)} of {path}.")
    return templates


def _file_beside(url: str, name: str) -> Path | None:
    shards = expand_shards(url) if holds_shards(url) else []
    if not shards or is_remote(shards[0]):
        return None
    folder = Path(shards[0]).absolute().parent
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)


def class_of(content: bytes | None, key: str, class_list: Sequence[str]) -> str:
    """The name of the class that KEY.cls holds: a number among the names, or the name itself.

    Raises:
        UsageError: there is no such member, it names several classes, or its number has no name.
    """
    if content is None:
        raise UsageError(f"Sample {key!r} has no {key}.cls; name another label (--label FIELD).")
    text = content.decode(errors="replace").strip()
    if _SEVERAL_NUMBERS.fullmatch(text) and text not in class_list:
        raise UsageError(
            f"Sample {key!r} is of several classes ({text[:40]}); zero-shot accuracy needs exactly one per image."
        )
    if not text.isdecimal() or not class_list:
        return text
    number = int(text)
    if number >= len(class_list):
        raise UsageError(f"Sample {key!r} is of class {text}, but there are {len(class_list)} class names.")
    if not class_list[number]:
        raise UsageError(
            f"Sample {key!r} is of class {text}, and line {number + 1} of the class names is empty; put its name there."
        )
    return class_list[number]


def read_templates(values: Sequence[str]) -> list[str]:
    """Prompt templates, each given by itself, in a file with one per line, or by the name of a set (`TEMPLATE_SETS`).

    Raises:
        UsageError: one is none of these, or has no {} (or {c}, as CLIP_benchmark writes) for the class name.
    """
    templates: list[str] = []
    for value in values:
        if value in TEMPLATE_SETS:
            templates += template_set(value)
            continue
        if _placeholder(value) or not _is_file(value):
            templates.append(_checked(value, f", which is no file and none of {', '.join(TEMPLATE_SETS)},"))
            continue
        for number, line in enumerate(read_text(Path(value)).splitlines(), 1):
            if line.strip():
                templates.append(_checked(line.strip(), f" (line {number} of {value})"))
    return templates


def fill_template(template: str, name: str) -> str:
    """The sentence of a class. Braces other than the first kind of placeholder are text.

    Raises:
        UsageError: the template has no place for the name.
    """
    return template.replace(_placeholder(_checked(template, "")), name)


def _checked(template: str, source: str) -> str:
    if not _placeholder(template):
        raise UsageError(f"The template {template[:80]!r}{source} has no {{}} for the class name.")
    return template


def _placeholder(template: str) -> str:
    return next((placeholder for placeholder in _PLACEHOLDERS if placeholder in template), "")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a long list of names is longer than a file name can be
        return False


def class_vectors(prompts: Float32[Array, "N D"], num_prompts: Sequence[int]) -> Float32[Array, "K D"]:
    """A unit vector for each class: the mean of the unit vectors of its prompts, of unit length again (CLIP §3.1.4).

    prompts: of all classes, one after the other. num_prompts: of each class.
    """
    means: list[np.ndarray] = []
    first = 0
    for number in num_prompts:
        means.append(prompts[first : first + number].mean(axis=0))
        first += number
    # a mean of unit vectors is shorter than 1, the more so the more the prompts disagree
    stacked = np.stack(means)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def class_probabilities(
    images: Float32[Array, "B D"], classifier: Float32[Array, "K D"], logit_scale: float
) -> Float32[Array, "B K"]:
    """Probability of each class for each embedded image: the softmax of scaled cosines (CLIP §3.1.2)."""
    logits = logit_scale * images @ classifier.T
    # shifted, so that no exponential overflows
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
