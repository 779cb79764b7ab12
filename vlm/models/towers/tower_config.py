"""Names of towers, PREFIX:NAME with options after commas, and their configurations in the model_cfg of a folder."""

import ast
import difflib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from vlm.config import from_values
from vlm.errors import UsageError

_SHOWN = 5


def split_tower(tower: str) -> tuple[str, str]:
    """Prefix and name of a tower; the name is empty for those that have none (bag, ngram)."""
    prefix, _, name = tower.partition(":")
    return prefix, name


def parse_tower_options(words: str) -> tuple[str, dict[str, Any]]:
    """The tower and its options: `timm:NAME,pooling=simpool,registers=4`.

    Raises:
        UsageError: an option has no value.
    """
    tower, *options = _split_at_commas(words)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"{option!r} in {words!r} is not an option; write KEY=VALUE, e.g. pooling=simpool.")
        values[key] = _value(value)
    return tower, values


def _split_at_commas(words: str) -> list[str]:
    """The words between commas that are in no quotes and no brackets.

    >>> _split_at_commas("lm:o'neil,prompts=['Red, (or'],facets=mean")
    ["lm:o'neil", "prompts=['Red, (or']", 'facets=mean']
    """
    # not str.split: prompts may hold commas, and overrides are written as dictionaries
    parts = [""]
    quote = ""
    depth = 0
    before = ""
    for character in words:
        if quote:
            if character == quote and before != "\\":
                quote = ""
        # an apostrophe inside a word, as a folder may have, opens nothing
        elif character in "'\"" and before in "=[(,":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        # below 0 too: a folder's name may close a bracket that nothing opened
        if character == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
        before = character
    return parts


def suggest_names(name: str, known: list[str]) -> str:
    """A hint with the few names nearest to `name`."""
    close = difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"it has {len(known)} names, e.g. {', '.join(known[:_SHOWN])}."


def _value(word: str) -> Any:
    # numbers, lists and dicts; unlike eval it runs no code
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


TOWER_KEY = "tower"
"""The key that tells our towers from open_clip's, whose configurations do not have it."""

INITIAL_WEIGHTS_KEY = "initial_weights"
"""The key that only a fresh network reads; a saved model folder does not have it."""


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """An image tower: its trunk, its size, its pooling."""

    tower: str
    """PREFIX:NAME, with a prefix of `IMAGE_TOWERS`."""

    image_size: int
    """Side of the square input image in pixels."""

    pooling: Literal["native", "avg", "token", "simpool", "queries", "map"] = "native"
    """How patches become one vector; native is the trunk's own way (`vlm.models.towers.pooling`)."""

    queries: int = 16
    """Learned queries of a block, for pooling by queries."""

    rows: int = 4
    """Output rows of pooling by queries, each as wide as a patch; BoQ's authors have 32."""

    pool_width: int = 0
    """Width of a 3×3 convolution and a norm before pooling by queries, as BoQ's authors have; 0 has neither."""

    gamma: float = 1.0
    """Exponent of pooling by simpool; 1 is plain attention. A tower named without it gets the authors' value."""

    registers: int = 0
    """Register tokens in addition to the patches of a ViT (Darcet et al. 2024)."""

    positions: Literal["learned", "sine"] = "learned"
    """Positions of `vit:`: learned, or fixed sines in two dimensions."""

    head_width: int = 64
    """Width of an attention head of `vit:`."""

    dropout: float = 0.0
    """Probability of dropout on the pooled vector, before the projection."""

    drop_path: float = 0.0
    """Probability of skipping a residual branch, rising with depth to this."""

    patch_dropout: float = 0.0
    """Fraction of patches dropped while training."""

    tokens: int = 0
    """Most patches of an image that keeps its shape, for timm's naflexvit; 0 shows squares."""

    residual: int = 0
    """Width of a hidden layer beside the projection, after a norm: a head for frozen trunks. 0 projects linearly."""

    head_dropout: float = 0.0
    """Probability of dropout before that head and inside it."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm builder, e.g. {"depth": 4}."""

    decoder_width: int = 0
    """Width of the tokens that a caption decoder attends to; 0 gives none."""

    decoder_norm: bool = True
    """Whether these tokens are the trunk's patches after a layer norm; without it the map to them is linear."""

    hf_config: dict[str, Any] = field(default_factory=dict)
    """The configuration of a Hugging Face trunk, so that the model folder needs no other."""

    initial_weights: str = ""
    """What a fresh trunk starts from: a file of weights, a folder with one, or `package:NAME` of an installed one."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A text tower: its encoder, its tokens, its pooling."""

    tower: str
    """PREFIX:NAME, with a prefix of `TEXT_TOWERS`."""

    context_length: int = 77
    """Tokens per caption."""

    vocab_size: int = 49408
    """Ids the tokenizer gives."""

    pad_id: int = 0
    """Id of the padding."""

    eos_id: int = 49407
    """Id of the end token."""

    pooling: Literal["", "mean", "last", "cls"] = ""
    """Which states become the text's vector; empty is last for causal models and mean for others."""

    width: int = 256
    """Width of an entry of the tables of bag and ngram."""

    entry_length: float = 1.0
    """Average length of such an entry before training; one no caption has keeps it, so a small one adds little."""

    hidden: int = 0
    """Width of the hidden layer between vector and embedding; 0 has none."""

    residual: int = 0
    """Width of a hidden layer beside the projection of hf:, after a norm: a head for frozen trunks. 0 has none."""

    head_dropout: float = 0.0
    """Probability of dropout before that head and inside it."""

    reduce: Literal["mean", "sum"] = "mean"
    """How the entries of bag and ngram are put together."""

    orders: tuple[int, ...] = (1, 2, 3)
    """Lengths of the n-grams of ngram."""

    table_size: int = 65536
    """Entries of ngram's table, which n-grams are hashed into."""

    dropout: float = 0.0
    """Probability of the dropout layers."""

    hf_config: dict[str, Any] = field(default_factory=dict)
    """The configuration of a Hugging Face encoder, so that the model folder needs no other."""

    initial_weights: str = ""
    """Folder with the Hugging Face weights a fresh network starts from."""

    folder: str = ""
    """Folder of the frozen language model of lm."""

    lm_fingerprint: str = ""
    """Identity of that model's weights and configuration; another model in its place is refused."""

    lm_width: int = 0
    """Width of that model's states."""

    prompts: tuple[str, ...] = ()
    """Facet prompts of lm: each follows the caption and asks for one side of it (FLAME)."""

    prompt_tokens: tuple[tuple[int, ...], ...] = ()
    """The prompts as ids of that model's own tokenizer."""

    facets: Literal["concat", "mean"] = "concat"
    """How the vectors of the prompts are put together."""


def read_image_config(values: dict[str, Any]) -> ImageTowerConfig:
    """The image tower's configuration.

    Raises:
        UsageError: a key is unknown (the nearest is named), or a value does not fit.
    """
    return from_values(ImageTowerConfig, values, where="vision_cfg")


def read_text_config(values: dict[str, Any]) -> TextTowerConfig:
    """The text tower's configuration.

    Raises:
        UsageError: a key is unknown (the nearest is named), or a value does not fit.
    """
    return from_values(TextTowerConfig, values, where="text_cfg")


def config_to_values(config: ImageTowerConfig | TextTowerConfig) -> dict[str, Any]:
    """The configuration as values for JSON: the tower, and what is not the default."""
    defaults = {each.name: each.default for each in fields(config)}
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        # dicts have a default factory, so `defaults` does not know that they are empty by default
        is_empty_dict = isinstance(value, dict) and not value
        if value != defaults[name] and not is_empty_dict:
            values[name] = _tuples_to_lists(value)
    return values | ({"image_size": config.image_size} if isinstance(config, ImageTowerConfig) else {})


def _tuples_to_lists(value: Any) -> Any:
    return [_tuples_to_lists(each) for each in value] if isinstance(value, tuple) else value
