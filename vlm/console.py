"""Terminal output and input: results on stdout as tables or JSON, progress bars on stderr, text files and stdin."""

import contextlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from vlm.errors import UsageError
from vlm.files import json_text
from vlm.results import Result

if TYPE_CHECKING:
    from tqdm import tqdm


Item = TypeVar("Item")

_LOG_INTERVAL_SECONDS = 10.0


def show_json(result: Any) -> None:
    """A result on stdout for machines; numbers that are not finite are null."""
    text = json_text(result.to_json() if isinstance(result, Result) else result, indent=2, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # escaped, so that a program reads what a terminal cannot show
        text = json.dumps(json.loads(text), indent=2)
    print(text, flush=True)


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", has_header: bool = True
) -> None:
    """A table on stdout; numbers and percentages are right-aligned, floats have four decimals."""
    from rich.console import Console
    from rich.table import Table

    materialised = [list(row) for row in rows]
    table = Table(title=_cell(title) or None, title_justify="left", header_style="bold", show_header=has_header)
    for number, name in enumerate(columns):
        # of a mixed column some cells are texts such as "–": left-aligned as a whole
        is_number = all(_is_number(row[number]) for row in materialised) and bool(materialised)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in materialised:
        table.add_row(*(_cell(value) for value in row))
    # a pipe has no width; rich would fold at 80 columns there
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)


def show_fields(fields: dict[str, Any], *, title: str = "") -> None:
    """Names and values on stdout, one pair per line."""
    # cells as texts, so that numbers among the values do not right-align a column
    rows = [[name, _cell(value)] for name, value in fields.items()]
    show_table(["name", "value"], rows, title=title, has_header=False)


def spaced_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by names for people.

    >>> spaced_names({"new_rows": 3})
    {'new rows': 3}
    """
    return {name.replace("_", " "): value for name, value in fields.items()}


def quoted(value: object) -> str:
    """A path or other value as one word of a command line that is shown to be copied.

    >>> quoted("runs/my first")
    "'runs/my first'"
    """
    return shlex.quote(str(value))


def pluralize(number: int, noun: str) -> str:
    """A number with its noun.

    >>> pluralize(1, "shard"), pluralize(2000, "shard")
    ('1 shard', '2,000 shards')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_counts(counts: Iterable[tuple[str, int]]) -> str:
    """Numbers of things in one line.

    >>> list_counts([("txt", 1200), ("heic", 1)])
    '1,200 txt, 1 heic'
    """
    return ", ".join(f"{count:,} {name}" for name, count in counts)


def percent(share: float | None) -> str:
    """A share in [0, 1] for people: recall, accuracy, utilisation; JSON has the share itself.

    >>> percent(0.1234), percent(None)
    ('12.3%', '–')
    """
    return "–" if share is None else f"{share:.1%}"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> [format_duration(seconds) for seconds in (8, 75, 3750, 200_000)]
    ['8 s', '1 min 15 s', '1 h 2 min', '2 d 7 h']
    """
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"


def format_bytes(number_of_bytes: float) -> str:
    """A size for people.

    >>> format_bytes(1536)
    '1.5 KB'
    """
    size = float(number_of_bytes)
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TB"


def bar(share: float, *, width: int = 30) -> str:
    """A bar of `width` characters filled to `share` in [0, 1].

    >>> bar(0.5, width=4)
    '██··'
    """
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "·" * (width - filled)


_HAS_PROGRESS: ContextVar[bool] = ContextVar("has_progress", default=True)


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Work of the block draws no progress bars: for a service, in whose log each request would leave some."""
    token = _HAS_PROGRESS.set(False)
    try:
        yield
    finally:
        _HAS_PROGRESS.reset(token)


def progress(
    *, total: int, what: str, done: int = 0, unit: str = "it", is_shown: bool = True, delay: float = 0.0
) -> "tqdm[NoReturn]":
    """A progress bar on stderr; if that is not a terminal, a line every ten seconds.

    It is drawn where the package's INFO messages are shown: by the command line, unless --quiet, and by a program that
    configures logging so; not `without_progress`.

    is_shown: False draws none, for work that is done in a moment.
    delay: seconds before it is first drawn, for what mostly takes less.
    """
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        disable=not (is_shown and _HAS_PROGRESS.get() and logging.getLogger("vlm").isEnabledFor(logging.INFO)),
        desc=what,
        initial=done,
        unit=unit,
        delay=delay,
        file=sys.stderr if is_terminal else _Lines(sys.stderr),
        mininterval=0.1 if is_terminal else _LOG_INTERVAL_SECONDS,
        dynamic_ncols=is_terminal,
        ascii=not is_terminal,
    )


class _Lines:
    """A text stream that turns the redraws of a progress bar into lines, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        stripped = text.strip("\r\n ")
        if stripped:
            self._stream.write(f"{stripped}\n")

    def flush(self) -> None:
        self._stream.flush()


def track(items: Iterable[Item], *, total: int, what: str, unit: str = "it", delay: float = 0.0) -> Iterator[Item]:
    """Yield the items with a progress bar on stderr, as `progress` draws it."""
    with progress(total=total, what=what, unit=unit, delay=delay) as progress_bar:
        # counted after the yield: the consumer is done with the item then
        for item in items:
            yield item
            progress_bar.update()


class StderrHandler(logging.Handler):
    """Log records as plain lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; without tqdm imported there is no bar, and importing it would cost 30 ms."""
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def log_to_stderr(level: int = logging.INFO) -> Iterator[None]:
    """Show what the package logs on stderr while the block runs."""
    logger = logging.getLogger("vlm")
    before = logger.handlers, logger.level, logger.propagate
    # Replaced rather than added, so that a verb that runs another verb does not log every line twice.
    logger.handlers = [StderrHandler()]
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


# 41.2%, 41.2% ±1.5, 12 ±2.5, 100.0% ≥83.2
_FIGURE = re.compile(r"[\d.,]+%|[\d.,]+%? [±≥≤][\d.,]+")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and _FIGURE.fullmatch(value) is not None)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.4f}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return escape(text.encode(errors="replace").decode())  # a file's name may hold bytes that are not UTF-8


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for -, without a byte order mark.

    Raises:
        UsageError: it cannot be read or is not UTF-8.
    """
    is_piped = str(path) == "-"
    name = "Standard input" if is_piped else str(path)
    try:
        text = sys.stdin.read() if is_piped else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text: byte {error.start:,} is 0x{error.object[error.start]:02x}; save it as UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {error}.") from error
    # Windows editors write a byte order mark, which would become part of the first line
    return text.removeprefix("\ufeff")
