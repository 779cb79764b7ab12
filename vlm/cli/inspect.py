"""Look into shards: counts, sizes, captions, corrupt and duplicate samples, and a contact sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import say, show_facts, show_json, show_table

if TYPE_CHECKING:
    from vlm.data.inspection import Inspection, Spread


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm inspect`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to look into."""

    sample: int | None = None
    """Look at no more than so many samples, evenly spread; all if not given."""

    html: Path | None = None
    """Write a page with histograms and pictures here."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Inspect, show, and name what is damaged."""
    from vlm.data.contact_sheet import contact_sheet
    from vlm.data.inspection import inspect_shards
    from vlm.data.shards import expand_shards
    from vlm.files import write_text

    found = inspect_shards(expand_shards(arguments.shards), sample=arguments.sample)
    if arguments.html:
        write_text(arguments.html, contact_sheet(found, title=arguments.shards))
        say(f"Page: {arguments.html}")
    if arguments.json:
        show_json(found.facts())
    else:
        show_inspection(found)


def show_inspection(found: "Inspection") -> None:
    """Tables for people: facts, captions by language, what is damaged or corrupt."""
    facts: dict[str, object] = {
        "shards": found.shards,
        "samples": found.samples,
        "megabytes of pictures": round(found.image_bytes / 1e6, 1),
        "looked at": found.looked_at,
        "formats": ", ".join(f"{name} {count:,}" for name, count in found.formats.items()),
        "width in pixels": _range(found.widths),
        "height in pixels": _range(found.heights),
        "duplicate pictures": found.duplicate_pictures,
        "duplicate keys": found.duplicate_keys,
        "damaged shards": len(found.damaged),
        "corrupt samples": len(found.corrupt),
    }
    show_facts(facts)
    columns = ["language", "captions", "distinct", "a picture", "words", "characters"]
    show_table(
        columns,
        [
            [
                code or "unnamed",
                facts.captions,
                facts.distinct,
                *map(_range, (facts.per_picture, facts.words, facts.characters)),
            ]
            for code, facts in found.languages.items()
        ],
    )
    bad = [*found.damaged, *found.corrupt][:20]
    if bad:
        show_table(
            ["bad in", "key", "reason", "detail"], [[Path(b.shard).name, b.key, b.reason, b.detail] for b in bad]
        )


def _range(spread: "Spread | None") -> str:
    return f"{spread.least:g} – {spread.median:g} – {spread.most:g}" if spread else ""
