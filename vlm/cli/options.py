"""What a verb is, and the options that several verbs share."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro

from vlm.errors import UsageError

# Modules of verbs import torch, FAISS and the package's layers inside `run`: --help and mistakes answer at once.


class Verb(Protocol):
    """A frozen dataclass: its fields are the options, its docstring is the help."""

    def run(self) -> None:
        """Do the work and show the result."""
        ...


def call_options(verb: Any, **parsed: Any) -> dict[str, Any]:
    """The options of a verb as the arguments of its Python call: all but --json.

    parsed: values in place of texts that hold several, as --weights 0.7,0.3.
    """
    options = {field.name: getattr(verb, field.name) for field in fields(verb) if field.name != "json"}
    return options | parsed


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """The numbers of an option that takes several, as `0.7,0.3`; none of an empty text.

    Raises:
        UsageError: something in it is not a number.
    """
    try:
        return tuple(float(word) for word in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write them as 0.7,0.3.") from error


def preset_defaults(words: list[str], *, resume: bool = False) -> dict[str, Any]:
    """The fields `preset` and `config` of a verb whose first word is a PRESET.

    Without a preset the configuration is that of the first one, for the help text. resume: as of `open_preset`.
    """
    # here: most verbs have no configuration of a run
    from vlm.train.presets import PRESETS, open_preset

    if not words or words[0].startswith("-"):
        return {"preset": tyro.MISSING, "config": next(iter(PRESETS.values()))[1]}
    return {"preset": words[0], "config": open_preset(words[0], resume=resume)}


# types rather than a base class, so that each verb lists its options in its own order
ModelArgument = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help="Run folder, checkpoint, model folder, Hugging Face folder or ORGANISATION/NAME, open_clip NAME:WEIGHTS.",
    ),
]
ModelArguments = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL [MODEL ...]",
        help="Run folder, checkpoint, model folder, Hugging Face folder or ORGANISATION/NAME, open_clip NAME:WEIGHTS; "
        "with --suite several, of which the first is the baseline.",
    ),
]
PresetArgument = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PRESET", help="Preset, TOML file, run folder, or open_clip architecture."),
]
ShardsArgument = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="SHARDS", help="Shards: a folder, a pattern, a URL, or several joined by ::."),
]
IndexArgument = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX", help="Index folder, made by vlm index build.")
]
ImageArguments = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE", help="Image files, and folders of them.")
]

RelevantOption = Annotated[
    bool,
    tyro.conf.arg(
        help="Keep only what is likely relevant, which may be nothing: results nearer than the best result of nine in "
        "ten unrelated queries. Measured once for an index, in seconds; for words alone, or for images alone."
    ),
]
MinProbabilityOption = Annotated[
    float | None,
    tyro.conf.arg(
        metavar="FLOAT",
        help="As --relevant, but nearer than this fraction of unrelated queries, above 0 and below 1, instead of 0.9.",
    ),
]

JsonOption = Annotated[bool, tyro.conf.arg(help="Print the result as JSON.")]
DeviceOption = Annotated[str, tyro.conf.arg(help="Device of the model: auto, cpu, cuda, cuda:1, …")]
BackendOption = Annotated[
    str,
    tyro.conf.arg(
        metavar="auto|onnx|torch",
        help="onnx: the model's ONNX export (vlm export MODEL --to onnx), which needs no torch; torch; or auto, the "
        "export where there is one that is up to date. Default: VLM_BACKEND, else auto.",
    ),
]
PrecisionOption = Annotated[Literal["fp32", "bf16"], tyro.conf.arg(help="Precision of the model's forward pass.")]
WorkersOption = Annotated[int, tyro.conf.arg(help="Worker processes that read and decode; 0 uses the main process.")]
EngineOption = Annotated[
    Literal["local", "ray"],
    tyro.conf.arg(
        help="ray: processes of a Ray cluster, whose machines see the same paths; a shard whose process dies is done "
        "again."
    ),
]
RayAddressOption = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="HOST:PORT",
        help="Address of a running Ray cluster. Default: RAY_ADDRESS; without it a cluster is started on this machine.",
    ),
]
AllowDamageOption = Annotated[
    bool, tyro.conf.arg(help="Use the intact samples of truncated shards instead of failing.")
]
