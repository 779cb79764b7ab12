"""HTML pages that need no other file, host or script: Jinja2 templates and one style sheet, `vlm/templates`."""

import base64
import functools
import hashlib
import importlib.resources
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vlm import __version__
from vlm.console import format_bytes, pluralize

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a page, for its footer: the command line, the date, the version."""

    command: str
    date: str
    version: str = __version__

    @classmethod
    def current(cls) -> "Provenance":
        """This process, now."""
        return cls(
            command=shlex.join(["vlm", *sys.argv[1:]]),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def render(template: str, *, provenance: Provenance | None = None, **values: Any) -> str:
    """A page of `vlm/templates` with its style sheet inside; the same values give the same page.

    values: what the template names; `title` is in every one. Text is escaped, and a name without a value raises.
    """
    environment = _environment()
    style = environment.globals["style_sheet"]
    # The browser runs nothing and fetches nothing, whatever a caption holds: the one style sheet and inline images.
    digest = base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = environment.get_template(template)
    return page.render(security_policy=policy, provenance=provenance, **values)


@functools.cache
def _environment() -> "Environment":
    # imported with the first page, for importing this module is part of every command
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("vlm", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = importlib.resources.files("vlm").joinpath("templates", "style.css").read_text(encoding="utf-8")
    environment.globals["style_sheet"] = Markup(style)
    environment.filters |= {
        "bytes": format_bytes,
        "caption_pairs": caption_pairs,
        "data_uri": jpeg_data_uri,
        "number": format_number,
        "percent": format_percent,
        "plural": pluralize,
    }
    # handed to macros that label an axis
    environment.globals |= {
        "format_aspect": format_aspect,
        "format_bytes": format_bytes,
        "format_number": format_number,
    }
    return environment


def jpeg_data_uri(image: bytes) -> str:
    """A JPEG as the address of an `img` element."""
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def caption_pairs(captions: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Captions one after the other, each with its language code.

    >>> caption_pairs({"en": ("a dog",), "de": ("ein Hund",)})
    [('en', 'a dog'), ('de', 'ein Hund')]
    """
    pairs: list[tuple[str, str]] = []
    for language, texts in captions.items():
        pairs += [(language, text) for text in texts]
    return pairs


def format_number(value: float) -> str:
    """A number with separators of thousands.

    >>> format_number(1234.0), format_number(2.5)
    ('1,234', '2.5')
    """
    return f"{value:,g}" if value < 1e6 else f"{value:,.0f}"


def format_percent(share: float) -> str:
    """A share in percent.

    >>> format_percent(0.1234)
    '12.3%'
    """
    return f"{share:.1%}"


def format_aspect(ratio: float) -> str:
    """Width / height as a ratio.

    >>> format_aspect(4 / 3), format_aspect(0.5)
    ('1.33 : 1', '1 : 2')
    """
    return f"{round(ratio, 2):g} : 1" if ratio >= 1 else f"1 : {round(1 / ratio, 2):g}"
