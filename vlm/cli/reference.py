"""Write docs/cli.md: the help of every verb, as it is printed. Run as `python -m vlm.cli.reference`."""

import contextlib
import io
import os
import re

from vlm.cli.main import VERBS, overview, run_verb


def reference() -> str:
    """The whole page."""
    os.environ.update({"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    parts = ["# Command line", "", "Written by `python -m vlm.cli.reference`.", "", "```", overview(), "```"]
    for verb in VERBS:
        parts += ["", f"## vlm {verb}", "", "```", _help_of(verb), "```"]
    return "\n".join(parts) + "\n"


def _help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run_verb(verb, ["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return "\n".join(line.rstrip() for line in plain.strip().splitlines())


if __name__ == "__main__":
    print(reference(), end="")
