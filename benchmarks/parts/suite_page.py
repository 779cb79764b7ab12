"""What `benchmarks/run --all` recorded, as docs/benchmark-results.md and as the table of README."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from parts.suite_entries import ENTRIES, Ratio

RESULTS = Path(__file__).resolve().parents[1] / "results"
README_BEGIN = "<!-- comparisons: written by scripts/write_docs.py where benchmarks/results has records -->\n"
README_END = "<!-- end -->\n"
_HEAD = """# Comparisons in one run

Written by `python scripts/write_docs.py` from `benchmarks/results/*.json`, which `benchmarks/run --all` writes: every
comparison with a peer in a short form, in under an hour on two cores. Longer measurements, and how each is made, are in
[benchmarks.md](benchmarks.md).

Every figure says how many times better ours is: images a second, seconds, megabytes or recall, whatever is measured.
Above 1 is a win, below 1 a loss. Several rounds, data sets or commands stand as their median and range.
"""


def read_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of a folder in the order of the comparisons, those without one left out."""
    files = [folder / f"{entry.name}.json" for entry in ENTRIES]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def results_page(records: Sequence[dict[str, Any]]) -> str:
    """docs/benchmark-results.md: the losses, then each comparison with its command, date, machine and versions."""
    lost: list[str] = []
    sections: list[str] = []
    for record in records:
        ratios = ratios_of(record)
        for ratio in ratios:
            if median(ratio.values) < 1:
                lost.append(f"| {record['stage']} | {ratio.what} | {ratio.peer} | {ratio.text} |")
        sections.append(_section(record, ratios))
    if not records:
        return f"{_HEAD}\nNo run is recorded yet.\n"
    parts = [_HEAD, "## What is lost\n"]
    if lost:
        parts += ["| stage | what | compared with | times better |\n|---|---|---|---|", "\n".join(lost) + "\n"]
    else:
        parts.append("Nothing in this run.\n")
    return "\n".join([*parts, *sections])


def ratios_of(record: dict[str, Any]) -> list[Ratio]:
    """The ratios of a record."""
    ratios: list[Ratio] = []
    for values in record["ratios"]:
        ratios.append(Ratio(**(values | {"values": tuple(values["values"])})))
    return ratios


def readme_table(records: Sequence[dict[str, Any]]) -> str:
    """README's table: a row for each comparison and peer."""
    lines = ["| stage | compared with | ours is better by |", "|---|---|---|"]
    for record in records:
        shown: dict[str, list[str]] = {}
        for ratio in ratios_of(record):
            if ratio.in_readme:
                shown.setdefault(ratio.peer, []).append(f"{ratio.what}: {ratio.text}")
        lines += [f"| {record['stage']} | {peer} | {'; '.join(texts)} |" for peer, texts in shown.items()]
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """README with its table replaced."""
    before, _, rest = readme.partition(README_BEGIN)
    _, _, after = rest.partition(README_END)
    return before + README_BEGIN + table + README_END + after


def _section(record: dict[str, Any], ratios: Sequence[Ratio]) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"## {record['stage'][0].upper()}{record['stage'][1:]}\n"]
    lines += [
        f"Beside {record['peers']}. `{record['command']}`, {record['date']}, {record['seconds']} s with everything, on"
    ]
    lines += [f"{machine['cores']} cores of {machine['processor']} with {machine['memory_gib']} GiB; {versions}.\n"]
    lines += ["| what | compared with | times better | |", "|---|---|---|---|"]
    for ratio in ratios:
        verdict = "lost" if median(ratio.values) < 1 else ""
        lines.append(f"| {ratio.what} | {ratio.peer} | {ratio.text} | {verdict} |")
    return "\n".join(lines) + "\n"
