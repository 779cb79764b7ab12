"""Prompts of classes beyond one list of templates: sets of templates by name, descriptions of each class, languages."""

import importlib.util
import json
import runpy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vlm.console import read_text
from vlm.errors import UsageError

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
