"""From a promise about recall, latency and memory to the kind of index that keeps it, with the measurements."""

from vlm.index.planner.choice import Plan, choose
from vlm.index.planner.confirm import Confirmation, confirm
from vlm.index.planner.promise import Promise
from vlm.index.planner.settling import settle

__all__ = ["Confirmation", "Plan", "Promise", "choose", "confirm", "settle"]
