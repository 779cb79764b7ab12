"""Write docs/recipes.md from the table. Run as `python -m vlm.train.recipes.page`."""

from vlm.train.presets import PRESETS
from vlm.train.recipes.bands import Band
from vlm.train.recipes.table import RECIPES, Recipe

_HEAD = """# Recipes

Written by `python -m vlm.train.recipes.page` from `train/recipes/table.py`.

A recipe is a preset (`train/presets.py`), the commands around it, and what is expected of it. Everything a preset sets
can be overridden: `vlm train cc3m --batch-size 2048 …`. `vlm runs compare RUN --to RECIPE --out compare.png` says
whether, where and in which direction a run leaves the band.

**measured** bands are of runs of this code: the interval in which one more run is expected at each point with a
probability of 95%. **published** ones are figures of others at the end of their runs, which have not been repeated
here; they are top-1 of zero-shot classification on ImageNet's 50,000 validation pictures, so that they can only be
compared after

```
vlm eval RUN --classes imagenet/val --out RUN/evaluation
```

where `imagenet/val` holds a folder for each class, called by its English name.

| recipe | what it trains | expected at the end | kind |
|---|---|---|---|
"""

_TAIL = """
## Measuring a band

Train a recipe with three seeds, then print its bands as entries for `train/recipes/measured.py`:

```
for seed in 0 1 2; do vlm train fashion … --seed $seed --run runs/fashion-$seed; done
python -m vlm.train.recipes.measure runs/fashion-? --source "3 seeds, commit …, machine" \\
    --metric loss text_to_image_recall@10
```
"""


def page() -> str:
    """The whole page."""
    rows = [_row(recipe) for recipe in RECIPES.values()]
    return _HEAD + "\n".join(rows) + "\n" + "".join(_section(recipe) for recipe in RECIPES.values()) + _TAIL


def _row(recipe: Recipe) -> str:
    ends = "; ".join(_end(band) for band in recipe.bands) or "no band yet"
    kinds = ", ".join(dict.fromkeys(band.kind for band in recipe.bands)) or "–"
    return f"| [`{recipe.preset}`](#{recipe.preset}) | {PRESETS[recipe.preset][0]} | {ends} | {kinds} |"


def _section(recipe: Recipe) -> str:
    commands = [*recipe.prepare, recipe.train, *([recipe.evaluate] if recipe.evaluate else [])]
    summary = PRESETS[recipe.preset][0]
    lines = [f"\n## {recipe.preset}\n", f"{summary[0].upper()}{summary[1:]}. Data: {recipe.data}.\n", "```"]
    lines += [*commands, f"vlm runs compare runs/{recipe.preset} --to {recipe.preset} --out compare.png", "```\n"]
    lines += [f"- expected, {band.kind}: {_end(band)} ({band.source})" for band in recipe.bands]
    lines += [f"- {recipe.remarks}"] if recipe.remarks else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _end(band: Band) -> str:
    _, low, high = band.points[-1]
    name = band.metric.replace("_", " ")
    if band.metric == "loss":
        return f"{name} {low:.2f} to {high:.2f}"
    return f"{name} {low:.1%} to {high:.1%}"


if __name__ == "__main__":
    print(page(), end="")
