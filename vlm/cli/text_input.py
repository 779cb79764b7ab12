"""Text that a command reads from a file or from standard input."""

import sys
from pathlib import Path

from vlm.errors import UsageError


def read_text(path: Path) -> str:
    """What a file, or standard input for -, holds as UTF-8, less the byte order mark that some editors begin it with.

    Raises:
        UsageError: it cannot be read or is no UTF-8.
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
    return text.removeprefix("\ufeff")
