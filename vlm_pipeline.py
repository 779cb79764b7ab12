"""Where the command `vlm` starts: it makes sure that the package `vlm` is ours before anything of it is imported.

The name `vlm` on the package index belongs to another project (a vortex lattice code), whose package is called `vlm`
too. Where both are installed, one overwrites or hides the other, and what follows is an ImportError somewhere inside.
So this module stands next to the package, under the name of the distribution.
"""

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

DISTRIBUTION = "vlm-pipeline"
# a line of our vlm/__init__.py
_MARK = f'DISTRIBUTION = "{DISTRIBUTION}"'


def main() -> NoReturn:
    """Run the command line, or end with exit code 1 and the reason if another package hides ours."""
    reason = shadowed_by()
    if reason:
        print(f"vlm: {reason}", file=sys.stderr)
        sys.exit(1)
    from vlm.cli.main import enter

    enter()


def shadowed_by() -> str:
    """Why `import vlm` would not import this project's package; empty if it would."""
    spec = importlib.util.find_spec("vlm")
    origin = None if spec is None else spec.origin
    if origin is not None and _MARK in Path(origin).read_text(encoding="utf-8", errors="replace"):
        return ""
    where = f"is another project's, at {origin}" if origin else "is missing or has no __init__.py"
    return (
        f"the package `vlm` {where}; the one of {DISTRIBUTION} is hidden or overwritten. "
        f"Uninstall both (pip uninstall vlm {DISTRIBUTION}) and install {DISTRIBUTION} again from its clone or wheel, "
        "or use an environment of its own for each."
    )


if __name__ == "__main__":
    main()
