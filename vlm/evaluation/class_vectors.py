"""The vectors of classes: names by number, the templates that make sentences of a name, and the mean of their vectors.

Both may be files with one entry per line. CLIP_benchmark keeps them at the root of a dataset, above the folders of its
splits: `classnames.txt` and `zeroshot_classification_templates.txt`, whose templates have {c} for the name.

Prompts may also be sets of templates by name, descriptions of each class, and lists by language.
"""

import importlib.util
import json
import logging
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm.console import read_text
from vlm.data.shards import expand_shards
from vlm.data.sources.source_registry import holds_shards
from vlm.errors import UsageError
from vlm.storage import is_remote
from vlm.tensor_types import Array, Float32

logger = logging.getLogger(__name__)


# CLIP §3.1.4: what kind of thing the classes of a set are
_KINDS = {
    "pets": ("a photo of a {}, a type of pet.",),
    "food": ("a photo of a {}, a type of food.",),
    "aircraft": ("a photo of a {}, a type of aircraft.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "satellite": ("a satellite photo of a {}.",),
    "texture": ("a photo of a {} texture.",),
}
# what CLIP's prompts for CIFAR say of the photo, and of the thing in it
_CIFAR_PHOTOS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_CIFAR_SIZES = ("small ", "big ")

TEMPLATE_SETS = ("openai", "simple", "cifar", *_KINDS)
"""Names of sets of templates: CLIP's 80 for ImageNet, the 7 of them that do nearly as well, its 18 for CIFAR, and those
with the kind of thing."""

IMAGENET = "imagenet"
"""Stands for the 1,000 class names of ImageNet that OpenAI wrote and open_clip keeps."""


def template_set(name: str) -> list[str]:
    """The templates of one of `TEMPLATE_SETS`, each with {} for the class name."""
    if name == "cifar":
        templates: list[str] = []
        for article in ("a", "the"):
            templates += [f"a {photo}photo of {article} {{}}." for photo in _CIFAR_PHOTOS]
            templates += [f"a photo of {article} {size}{{}}." for size in _CIFAR_SIZES]
        return templates
    if name in _KINDS:
        return list(_KINDS[name])
    functions = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}[name]
    # open_clip's are functions of the class name
    return [function("{}") for function in _zero_shot_metadata()[functions]]


def imagenet_class_names() -> list[str]:
    """The names of ImageNet's classes by number."""
    return list(_zero_shot_metadata()["IMAGENET_CLASSNAMES"])


@cache
def _zero_shot_metadata() -> Mapping[str, Any]:
    """The names of open_clip's module of classes and templates, without open_clip itself, which needs torch."""
    package = importlib.util.find_spec("open_clip")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0]) / "zero_shot_metadata.py" if folders else None
    if path is None or not path.is_file():
        raise UsageError("The templates of ImageNet come from the package open_clip_torch, which is not installed.")
    return runpy.run_path(str(path))


Descriptions = Mapping[str, Sequence[str]]
"""Sentences on how each class looks, by its name."""


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """Descriptions of classes from a JSON file: an object with a list of sentences for each class name.

    This is how CuPL (Pratt et al. 2022) and "Visual classification via description" (Menon and Vondrick 2022) keep
    theirs.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    values = _read_json(path, "descriptions of classes")
    descriptions: dict[str, list[str]] = {}
    for name, sentences in values.items() if isinstance(values, dict) else ():
        is_list = isinstance(sentences, list) and bool(sentences)
        if not is_list or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise UsageError(f"{path}: the descriptions of {name!r} are not a list of sentences.")
        descriptions[name] = sentences
    if not descriptions:
        raise UsageError(f'{path} holds no descriptions of classes: {{"cat": ["a small furry animal", …], …}}.')
    return descriptions


def described_prompts(names: Sequence[str], descriptions: Descriptions) -> list[list[str]]:
    """The prompts of each class: sentences that name it as they are, features of it with its name before them.

    Raises:
        UsageError: a class has no descriptions.
    """
    # names of files and of data sets differ in case and underscores
    by_name = {_plain(name): sentences for name, sentences in descriptions.items()}
    missing = [name for name in names if _plain(name) not in by_name]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(names)} classes have no description, as {missing[0]!r}; the descriptions are of "
            f"{', '.join(map(repr, list(descriptions)[:3]))} …"
        )
    prompts: list[list[str]] = []
    for name in names:
        prompts.append([_with_name(name, sentence.strip()) for sentence in by_name[_plain(name)]])
    return prompts


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _with_name(name: str, sentence: str) -> str:
    # a sentence that names the class is a prompt as it stands
    if _plain(name) in _plain(sentence):
        return sentence
    # features as "long legs": Menon and Vondrick make "heron, which has long legs" of it
    first = sentence.split(maxsplit=1)[0].casefold()
    if first in ("has", "have", "is", "are", "can", "often", "usually", "may"):
        return f"{name}, which {sentence}"
    return f"{name}, which {'is' if first in ('a', 'an', 'the') else 'has'} {sentence}"


def read_by_language(value: str | Path, what: str) -> dict[str, list[str]] | None:
    """Lists of texts by language from a JSON file, as {"en": ["cat", "dog"], "de": ["Katze", "Hund"]}.

    what: `class names` or `templates`, for messages. None where the value is no file that ends in .json.

    Raises:
        UsageError: the file holds something else.
    """
    if not str(value).endswith(".json") or not Path(value).is_file():
        return None
    values = _read_json(value, what)
    if not isinstance(values, dict) or not values:
        raise UsageError(f'{value} holds no {what} by language: {{"en": ["…"], "de": ["…"]}}.')
    for language, texts in values.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{value}: the {what} in {language!r} are not a list of texts.")
    return values


def _read_json(path: str | Path, what: str) -> Any:
    if not Path(path).is_file():
        raise UsageError(f"There is no file {str(path)!r} of {what}.")
    try:
        return json.loads(read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error


# three templates do most of what CLIP's eighty do, and suit drawings and product photos, too
DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of {}.", "{}")

CLASS_NAMES_FILE = "classnames.txt"
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
        # the end is cut, so that a last empty line names no class; empty lines between stay, and count
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
    path = _file_beside(url, CLASS_NAMES_FILE)
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
    # beside the tars, or above the folder of the split, as CLIP_benchmark lays them out
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


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """The classes in a language: class_list by number, names each once, and the prompts of each name.

    language: empty where only one is given.
    """

    language: str
    class_list: tuple[str, ...]
    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    @property
    def num_prompts(self) -> int:
        """Of all classes together."""
        return sum(map(len, self.prompts))


def class_texts(
    class_names: str | Sequence[str],
    templates: Sequence[str] = (),
    descriptions: str | Descriptions = "",
) -> tuple[ClassTexts, ...]:
    """The classes in each language, first the one that the others are translations of.

    class_names: names, or what `read_class_list` reads, or a JSON file with a list for each language.
    templates: what `read_templates` reads, or a JSON file with a list for each language; where there are none, the
        three common ones, and for further languages the name alone.
    descriptions: sentences by name in the first language, or their file; prompts beside the templates given, or alone.

    Raises:
        UsageError: there is no name; lists of languages differ in length; a language has no templates; also as those.
    """
    lists = _class_lists(class_names)
    by_language = read_by_language(templates[0], "templates") if len(templates) == 1 else None
    if by_language is not None and set(lists) - set(by_language):
        missing = sorted(set(lists) - set(by_language))[0]
        raise UsageError(
            f"{templates[0]} has no templates in {missing!r}, only in {', '.join(by_language)}; class names and "
            "templates by language need the same ones."
        )
    shared = [] if by_language is not None else read_templates(templates)
    described = read_descriptions(descriptions) if isinstance(descriptions, str) and descriptions else descriptions
    first = next(iter(lists.values()))
    positions: dict[str, int] = {}
    for position, name in enumerate(first):
        # a name that stands twice is one class, in other languages too
        positions.setdefault(name, position)
    results: list[ClassTexts] = []
    for language, class_list in lists.items():
        names = tuple(class_list[positions[name]] for name in unique_names(first))
        of_language = shared if by_language is None else read_templates(by_language[language])
        # descriptions are by the names of the first language
        prompts = _prompts(names, of_language, described if not results else "", is_first=not results)
        results.append(ClassTexts(language=language, class_list=tuple(class_list), names=names, prompts=prompts))
    return tuple(results)


def _prompts(
    names: Sequence[str], templates: Sequence[str], descriptions: str | Descriptions, *, is_first: bool
) -> tuple[tuple[str, ...], ...]:
    if not templates and not descriptions:
        templates = DEFAULT_TEMPLATES if is_first else ("{}",)
    described = described_prompts(names, descriptions) if not isinstance(descriptions, str) else [[] for _ in names]
    prompts: list[tuple[str, ...]] = []
    for name, sentences in zip(names, described, strict=True):
        prompts.append((*(fill_template(template, name) for template in templates), *sentences))
    return tuple(prompts)


def _class_lists(class_names: str | Sequence[str]) -> dict[str, list[str]]:
    """Class names by number for each language."""
    if not isinstance(class_names, str):
        lists = {"": list(class_names)}
    else:
        lists = read_by_language(class_names, "class names") or {"": read_class_list(class_names)}
    language, first = next(iter(lists.items()))
    if not unique_names(first):
        raise UsageError("There is no class name; give names as a,b,c or a file with one a line.")
    for other, class_list in lists.items():
        if len(class_list) != len(first):
            raise UsageError(
                f"{class_names} has {len(class_list)} class names in {other!r} and {len(first)} in {language!r}; "
                "each language needs all, in the same order."
            )
    return lists


def class_numbers(
    labels: Sequence[Sequence[str]], languages: Sequence[ClassTexts], own_list: Sequence[str] = ()
) -> list[list[int]]:
    """The numbers of the classes of each image: positions in `names`.

    labels: of each image, by name in any of the languages, by number in the list of classes, or by name in the list of
        the set itself (own_list) where that is as long.

    Raises:
        UsageError: one is neither.
    """
    number_of: dict[str, int] = {}
    for texts in languages:
        for number, name in enumerate(texts.names):
            number_of.setdefault(name, number)
    for position, name in enumerate(languages[0].class_list):
        if name:
            # a name that is a number goes by what it says
            number_of.setdefault(str(position), number_of[name])
    if len(own_list) == len(languages[0].class_list):
        for position, name in enumerate(own_list):
            if str(position) in number_of:
                number_of.setdefault(name, number_of[str(position)])
    distinct = set[str]().union(*labels)
    unknown = sorted(distinct - set(number_of))
    if unknown:
        raise UsageError(f"{len(unknown)} classes of the images are not among the names: {unknown[:5]}")
    return [list(map(number_of.__getitem__, of_image)) for of_image in labels]


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
