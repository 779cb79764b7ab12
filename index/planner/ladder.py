"""The kinds a plan tries, the cheapest to build first."""

from dataclasses import dataclass
from math import sqrt

from vlm.index.kinds import Tuning
from vlm.index.kinds.inverted import MIN_LISTS, MIN_ROWS_PER_LIST
from vlm.index.planner.tuning import Setting


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A kind, and how many times √N lists it shall have; None leaves it to the kind, or it has none."""

    kind: str
    lists_per_root: int | None = None

    def wishes(self, rows: int, *, seed: int, effort: str | None = None, setting: Setting | None = None) -> Tuning:
        """What to ask of the kind for so many rows. effort: the parameter that the setting's effort is for."""
        numbers: dict[str, int] = {}
        if self.lists_per_root and rows >= MIN_LISTS * MIN_ROWS_PER_LIST:
            numbers["nlist"] = max(MIN_LISTS, min(round(self.lists_per_root * sqrt(rows)), rows // MIN_ROWS_PER_LIST))
        if setting and effort and setting.effort is not None:
            most = numbers.get("nlist", setting.effort)
            numbers[effort] = min(setting.effort, most)
        if setting and setting.rerank:
            numbers["rerank"] = setting.rerank
        return Tuning(seed=seed, **numbers)


# k-means takes time with the square of its lists: few lists first, and of many only one kind
LADDER = (
    Rung(kind="flat"),
    Rung(kind="sq8"),
    Rung(kind="ivf", lists_per_root=1),
    Rung(kind="ivfsq", lists_per_root=1),
    Rung(kind="rabitq", lists_per_root=2),
    Rung(kind="ivfpq", lists_per_root=2),
    Rung(kind="ivf", lists_per_root=4),
    Rung(kind="hnsw"),
)
