"""Fit a head by which a new model can ask the rows of an old one, from embeddings of the same samples by both.

The head is a MODEL from then on: vlm index upgrade carries an index over to it, vlm embed adds rows by it. New rows
are found exactly as by the new model alone. Recall is measured on a part that is held out; samples that neither model
was trained on make the better pairs, for on them both embed as they will embed what is to come.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import show_fields, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.evaluation.retrieval import Retrieval

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index fit-head`."""

    old: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OLD-EMBEDDINGS")]
    """Pictures embedded by the old model (or by an older head)."""

    new: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NEW-EMBEDDINGS")]
    """The same pictures embedded by the new model."""

    head: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HEAD")]
    """Folder for the head."""

    old_texts: Path
    """Captions of these pictures embedded by the old model (vlm embed --modality text)."""

    new_texts: Path
    """The same captions embedded by the new model."""

    held_out: float = 0.1
    """Share of the pictures that the head is measured on."""

    pictures: int = 20_000
    """Pictures used, drawn evenly from those there are."""

    seed: int = 0
    """Of what is drawn and held out."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Fit, measure, save, show."""
    from vlm.files import check_not_exists
    from vlm.index.backward_compat import fit_head, measure_head, read_pairs
    from vlm.models.variants import save_projection

    if not 0 < arguments.held_out < 1:
        raise UsageError(f"--held-out {arguments.held_out} does not fit: a share between 0 and 1 is measured on.")
    if arguments.pictures < 1:
        raise UsageError(f"--pictures {arguments.pictures} does not fit: one at least is needed.")
    check_not_exists(arguments.head)
    pairs = read_pairs(
        arguments.old,
        arguments.new,
        arguments.old_texts,
        arguments.new_texts,
        max_images=arguments.pictures,
        seed=arguments.seed,
    )
    fitting, held = pairs.split(arguments.held_out, seed=arguments.seed)
    fitted = fit_head(fitting, seed=arguments.seed)
    recall = measure_head(held, fitted.head, seed=arguments.seed)
    found = asdict(fitted.choice) | {"recall": {name: one.metrics() for name, one in recall.items()}}
    configuration = {name: getattr(arguments, name) for name in ("held_out", "pictures", "seed")}
    save_projection(arguments.head, fitted.head, configuration=configuration, details={"evidence": found})
    if arguments.json:
        show_json({"head": str(arguments.head), "fingerprint": fitted.head.fingerprint} | found)
        return
    show_fields(asdict(fitted.choice))
    show_recall(recall, title=f"{len(held):,} pictures held out")
    logger.info(f"Next: vlm index upgrade INDEX OUT --head {arguments.head}")


def show_recall(recall: "dict[str, Retrieval]", *, title: str) -> None:
    """A line for who asks and which rows answer."""
    at = next(iter(recall.values())).text_to_image.recall
    columns = ["asked → rows", *(f"{way} R@{k}" for way in ("text→image", "image→text") for k in at)]
    rows = [
        [name, *one.text_to_image.recall.values(), *one.image_to_text.recall.values()] for name, one in recall.items()
    ]
    show_table(columns, rows, title=title)
