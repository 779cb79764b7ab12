"""How a run goes: metrics, progress, speed, curves, comparisons."""
