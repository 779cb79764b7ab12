"""Run folders made by hand: what real ones have beside weights."""

import json
import os
from pathlib import Path
from typing import Any

CONFIG = 'seed = 0\n\n[model]\narchitecture = "tiny"\n\n[objective]\nobjective = "clip"\n'


def write_run(
    run: Path,
    lines: list[dict[str, Any]],
    *,
    config: str = CONFIG,
    steps: int = 0,
    is_finished: bool = False,
    age_seconds: float = 1e6,
) -> Path:
    """Write a run whose last line is so old, with the planned steps in telemetry.json, if given."""
    run.mkdir(parents=True)
    (run / "config.toml").write_text(config)
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if steps:
        (run / "telemetry.json").write_text(json.dumps({"steps": steps, "peak_source": "a hand"}))
    if is_finished:
        (run / "manifest.json").write_text(json.dumps({"kind": "run", "counts": {"steps": lines[-1]["step"]}}))
    written = metrics.stat().st_mtime - age_seconds
    os.utime(metrics, (written, written))
    return run


def falling(shift: float = 0.0, *, until: int = 100) -> list[dict[str, Any]]:
    """The lines of a run of 100 steps: the loss is 5 - 0.03 · step + shift, recall@10 is 0.005 · step."""
    return [
        {
            "step": step,
            "loss": 5 - 0.03 * step + shift,
            "text_to_image_recall@1": 0.002 * step,
            "text_to_image_recall@10": 0.005 * step,
            "image_to_text_recall@10": 0.004 * step,
            "gradient_norm": 2.0,
            "logit_scale": 14.0 + 0.1 * step,
            "learning_rate": 1e-3,
            "samples_per_second": 100.0 if step > 5 else 1.0,
            "data_wait": 0.02,
            "mfu": 0.4,
            "seen": step * 8,
            "seconds": step * 2.0,
        }
        for step in range(5, until + 1, 5)
    ]
