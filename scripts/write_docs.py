#!/usr/bin/env python
"""Generate the pages of docs/ that derive from the code or from records, and README's table of comparisons:
benchmark-results.md, cli.md, findings.md, objectives.md, recipes.md.

python scripts/write_docs.py             write the pages
python scripts/write_docs.py --check     list the pages that are out of date; exit code 1 if there are any
python scripts/write_docs.py --baselines RUN RUN RUN --source "3 seeds, commit …, machine"
                                         print the reference curves of finished runs that differ only in their
                                         seed, as entries for train/baselines.toml
"""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm.cli.main import VERBS, overview, run_verb
from vlm.data.shards import count_samples, expand_shards
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.train.history import RunRecord, read_run
from vlm.train.presets import PRESETS
from vlm.train.recipes import (
    RECIPES,
    Recipe,
    ReferenceCurve,
    held_out_fingerprint,
    measured_data,
    reference_curve_of_runs,
)
from vlm.train.task import ALIASES, LOSS_TERMS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from parts.suite_page import read_records, readme_table, results_page, with_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
FINDINGS = DOCS.parent / "findings"
README = DOCS.parent / "README.md"

_OWN_INPUTS = frozenset({"same", "rows", "image_average", "text_average", "inner_rate"})
METRICS = ("loss", "text_to_image_recall@10", "image_to_text_recall@10")


def cli_page() -> str:
    """docs/cli.md: the printed help of every verb."""
    os.environ.update({"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    parts = ["# Command line", "", "Written by `python scripts/write_docs.py`.", "", "```", overview(), "```"]
    for verb in VERBS:
        parts += ["", f"## vlm {verb}", "", "```", _help_of(verb), "```"]
    return "\n".join(parts) + "\n"


def _help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run_verb(verb, ["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return "\n".join(line.rstrip() for line in plain.strip().splitlines())


_OBJECTIVES_HEAD = """# Objectives

A run minimises a weighted sum of loss terms: `--objective "clip + 2*caption"`. Each term below is one function with its
paper; to add one, write a function in `train/objectives/` and a line in `LOSS_TERMS`
(`train/task.py`). A *batch-level* term compares the pairs of the global batch, in blocks of
`--similarity-block` rows; a *sample-level* term needs no other sample. In both cases the gradient of a batch in
micro-batches (`--micro-batch`), on any number of processes, is that of the whole batch (`train/step.py`).

`--same-pairs` sets how batch-level terms treat in-batch pairs that share a key, caption or image: as `negative` (as in
CLIP), `ignore`, or `positive`. `sogclr` and `fastclip` keep two moving averages for each sample of the data in the
checkpoint (`--inner-rate`, `--rho`, `--temperature`); what they and distinct or hard batches (`--batches`,
[data.md](data.md#which-samples-share-a-batch)) gain is in [benchmarks.md](benchmarks.md#small-batches).
[Beside the authors' code](objectives-compared.md) the same input gives the same values, or differs as told there.
Written by `python scripts/write_docs.py`.
"""


def objectives_page() -> str:
    """docs/objectives.md: the loss terms and the aliases of common sums."""
    lines = [
        _OBJECTIVES_HEAD,
        "| term | loss | paper | level | inputs in addition to image and caption |",
        "|" + "---|" * 5,
    ]
    for name, term in LOSS_TERMS.items():
        level = "batch" if term.batch_level else "sample"
        # what the run itself keeps or numbers is no input that a user gives
        extra_inputs = [f"`{name}`" for name in term.inputs if name not in _OWN_INPUTS]
        lines.append(f"| `{name}` | {term.summary} | {term.paper} | {level} | {', '.join(extra_inputs) or '–'} |")
    lines += ["", "| alias | sum |", "|---|---|"]
    lines += [f"| `{name}` | `{expression}` |" for name, expression in ALIASES.items()]
    return "\n".join(lines) + "\n"


_RECIPES_HEAD = """# Recipes

Written by `python scripts/write_docs.py` from `train/recipes.py` and `train/baselines.toml`.

A recipe is a preset (`train/presets.py`) with its commands and reference curves. Every setting of a preset can be
overridden: `vlm train cc3m --batch-size 2048 …`. `vlm runs compare RUN --to RECIPE --out compare.png` reports whether,
where and in which direction a run leaves the reference curves.

Settings that stay together go into a file, `vlm train mine.toml --data SHARDS --run DIR`. It names a preset (or another
file) and holds what differs; without `preset` it is a whole configuration, as the `config.toml` of every run is one.
Groups of settings are tables: `[model]`, `[loader]`, `[objective]`, `[optimizer]`, `[safety]`.

```toml
preset = "fashion"
epochs = 20.0

[optimizer]
learning_rate = 3e-3

[loader]
flip = 0.0
```

**measured** curves come from runs of this code: the 95% prediction interval of one more run at each point.
**published** ones are final results of others, not reproduced here: zero-shot top-1 on ImageNet's 50,000 validation
images. To compare with them, first run

```
vlm eval RUN --classes imagenet/val --out RUN/evaluation
```

where `imagenet/val` holds one folder per class, named by the English class name.

| recipe | description | expected final value | kind |
|---|---|---|---|
"""

_RECIPES_TAIL = """
## Measuring reference curves

Train a recipe with three seeds, then print the curves as entries for `train/baselines.toml`, and what they are of as
one for its table `measured-on`, by which a run knows that it is on the same data:

```
for seed in 0 1 2; do vlm train fashion … --seed $seed --run runs/fashion-$seed; done
python scripts/write_docs.py --baselines runs/fashion-? --source "3 seeds, commit …, machine" \\
    --metric loss text_to_image_recall@10
```
"""


def recipes_page() -> str:
    """docs/recipes.md: a table of all recipes, then the commands of each."""
    rows = [_recipe_row(recipe) for recipe in RECIPES.values()]
    sections = [_recipe_section(recipe) for recipe in RECIPES.values()]
    return _RECIPES_HEAD + "\n".join(rows) + "\n" + "".join(sections) + _RECIPES_TAIL


def _recipe_row(recipe: Recipe) -> str:
    expected = "; ".join(_value_at_end(reference) for reference in recipe.reference_curves) or "no reference curve yet"
    kinds = ", ".join(dict.fromkeys(reference.kind for reference in recipe.reference_curves)) or "–"
    return f"| [`{recipe.preset}`](#{recipe.preset}) | {PRESETS[recipe.preset][0]} | {expected} | {kinds} |"


def _recipe_section(recipe: Recipe) -> str:
    commands = [*recipe.prepare, recipe.train, *([recipe.evaluate] if recipe.evaluate else [])]
    summary = PRESETS[recipe.preset][0]
    lines = [f"\n## {recipe.preset}\n", f"{summary[0].upper()}{summary[1:]}. Data: {recipe.data}.\n", "```"]
    lines += [*commands, f"vlm runs compare runs/{recipe.preset} --to {recipe.preset} --out compare.png", "```\n"]
    lines += [
        f"- expected, {reference.kind}: {_value_at_end(reference)} ({reference.source})"
        for reference in recipe.reference_curves
    ]
    data = measured_data().get(recipe.preset)
    if data:
        lines.append(
            f"- `vlm train` says whether a run with these settings ends in these bands where it is on this data: "
            f"{data.samples:,} samples, held-out captions `{data.held_out}`."
        )
    lines += [f"- {recipe.remarks}"] if recipe.remarks else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _value_at_end(reference: ReferenceCurve) -> str:
    _, low, high = reference.points[-1]
    name = reference.metric.replace("_", " ")
    if reference.metric == "loss":
        return f"{name} {low:.2f} to {high:.2f}"
    return f"{name} {low:.1%} to {high:.1%}"


_FINDINGS_HEAD = """# Findings

What real libraries do that one would not guess, met while building this. Each is a script in `findings/` that installs
the named versions in a temporary folder, runs them without our code on valid input, and fails if it no longer sees what
stands here. Written by `python scripts/write_docs.py` from the heads of these scripts.
"""


def findings_page() -> str:
    """docs/findings.md: what the scripts of findings/ show, from the comment at the head of each."""
    parts = [_FINDINGS_HEAD]
    for script in sorted(FINDINGS.glob("*.sh")):
        title = script.stem.replace("_", " ")
        parts.append(f"## {title}\n\n{_finding(script)}\n\n`bash findings/{script.name}`\n")
    return "\n".join(parts)


def _finding(script: Path) -> str:
    """The head of a script as Markdown: a paragraph for what is seen, why it matters, the cure."""
    lines: list[str] = []
    for line in script.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    # plain text in the scripts: nothing of it is meant as Markdown
    text = re.sub(r"([*_<\[\]`])", r"\\\1", "\n".join(lines))
    return re.sub(r"\s+(Why it matters|The cure|Also):", r"\n\n**\1:**", text)


def readme_page() -> str:
    """README.md with the table of what was recorded last; as it is where nothing was recorded."""
    readme, records = README.read_text(encoding="utf-8"), read_records()
    return with_table(readme, readme_table(records)) if records else readme


PAGES: dict[str, Callable[[], str]] = {
    "../README.md": readme_page,
    "benchmark-results.md": lambda: results_page(read_records()),
    "cli.md": cli_page,
    "findings.md": findings_page,
    "objectives.md": objectives_page,
    "recipes.md": recipes_page,
}


def baseline_entry(recipe: str, reference: ReferenceCurve) -> str:
    """A measured curve as an entry of train/baselines.toml."""
    points = "\n".join(f"    [{share:.4g}, {low:.4g}, {high:.4g}]," for share, low, high in reference.points)
    source = reference.source.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'[[{recipe}]]\nmetric = "{reference.metric}"\nsource = "{source}"\nwidth = {reference.width:.4g}\n'
        f"points = [\n{points}\n]\n"
    )


def measured_data_entry(recipe: str, run: RunRecord) -> str:
    """What a run was on, as an entry of [measured-on] in train/baselines.toml."""
    samples = sum(count_samples(expand_shards(run.configuration["data"])))
    held_out = held_out_fingerprint(open_evaluation_set(run.configuration["val"]).captions)
    return f'{recipe} = {{ name = "…", samples = {samples}, held_out = "{held_out}" }}\n'


def print_baselines(folders: Sequence[Path], metrics: Sequence[str], source: str) -> None:
    """Print the reference curves of finished runs of one recipe that differ only in their seed."""
    runs = [read_run(folder) for folder in folders]
    recipe = folders[0].name.rpartition("-")[0] or folders[0].name
    for metric in metrics:
        curve = reference_curve_of_runs([(run.lines, run.planned_steps) for run in runs], metric, source=source)
        print(baseline_entry(recipe, curve))
    print(measured_data_entry(recipe, runs[0]))


def main() -> int:
    """Write or check the pages, or print reference curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the pages instead of writing them")
    parser.add_argument("--baselines", nargs="+", type=Path, metavar="RUN", help="print reference curves of runs")
    parser.add_argument("--source", default="", help="seeds, commit and machine of these runs")
    parser.add_argument("--metric", nargs="+", default=METRICS, help="metrics of these runs")
    arguments = parser.parse_args()
    if arguments.baselines:
        if not arguments.source:
            parser.error("--baselines needs --source: seeds, commit, machine")
        print_baselines(arguments.baselines, arguments.metric, arguments.source)
        return 0

    stale: list[str] = []
    for name, page in PAGES.items():
        content = page()
        file = DOCS / name
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not arguments.check:
                (DOCS / name).write_text(content, encoding="utf-8")
    if arguments.check and stale:
        print(f"docs: {', '.join(stale)} out of date; run python scripts/write_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
