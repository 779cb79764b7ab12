"""Which differences of configuration a resumed run takes."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from vlm.config import choose
from vlm.errors import UsageError


def dotted_keys(values: dict, prefix: str = "") -> list[str]:
    """Every key of nested values, those of groups included.

    >>> dotted_keys({"seed": 0, "optimizer": {"beta1": 0.9}})
    ['seed', 'optimizer', 'optimizer.beta1']
    """
    found: list[str] = []
    for name, value in values.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, dict):
            found += dotted_keys(value, f"{prefix}{name}.")
    return found


def still_refused(changed: Iterable[str], allow: Sequence[str], *, free: Collection[str] = ()) -> list[str]:
    """The changes that are not allowed.

    changed: lines `KEY: before → after`, as `differences` makes them. allow: keys, or groups of them; `-` and `_` are
        alike. free: keys that may always change.

    >>> still_refused(["optimizer.beta1: 0.9 → 0.8", "seed: 0 → 1"], ["optimizer"])
    ['seed: 0 → 1']
    """
    allowed = [entry.replace("-", "_") for entry in allow]
    refused: list[str] = []
    for line in changed:
        key = line.partition(":")[0]
        if key not in free and not any(key == entry or key.startswith(f"{entry}.") for entry in allowed):
            refused.append(line)
    return refused


def check_allow(allow: Sequence[str], values: dict) -> None:
    """Refuse names that no key or group of the configuration has, naming the nearest.

    Raises:
        UsageError: there is such a name.
    """
    known = dict.fromkeys(dotted_keys(values))
    for entry in allow:
        choose(known, entry.replace("-", "_"), "--allow")


def refusal(run: Path | str, refused: Sequence[str]) -> UsageError:
    """What is said of changes that are not allowed, with the words that allow them."""
    words = " ".join(f"--allow {line.partition(':')[0]}" for line in refused)
    lines = "".join(f"\n  {line}" for line in refused)
    return UsageError(
        f"{run} was begun with another configuration:{lines}\nResume it as it was by vlm train {run} --resume, name "
        f"another run, or, if the change is meant, add: {words}"
    )
