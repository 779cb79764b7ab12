"""`benchmarks/run --all`: ratios point the right way, failures are told, and docs and README are what was recorded."""

import ast
import importlib
import json
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

from vlm.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SPEED = {"runs": {side: [{"images_per_s": 20.0}] for side in ("ours", "ours, float")}}
SPEED["runs"] |= {
    side: [{"images_per_s": 10.0}]
    for side in ("open_clip", "Energon", "mosaicml", "bare", "bare, own filter", "bare, Pillow")
}

# results in which ours is twice as good in everything
TWICE_AS_GOOD = {
    "loading": {"speed": [SPEED | {"shards": "drawn", "workers": 1}]},
    "training": {
        "throughput": [{"runs": {"ours": [20.0], "open_clip": [10.0]}}],
        "step": {"runs": {"ours": [1.0], "bare": [2.0]}},
    },
    "quality": {"ratios": [{"metric": "text_to_image_recall@10", "data": "drawn", "ratio": 2.0}]},
    "evaluation": {
        "rows": [
            {"task": "zero-shot", "command": "CLIP_benchmark", "all_seconds": [2.0, 4.0]},
            {"task": "zero-shot", "command": "vlm eval", "all_seconds": [1.0, 2.0]},
        ]
    },
    "captioning": [{"way": "greedy", "times_faster": 2.0}],
    "embedding": {
        "runs": [{"vlm embed": {"whole call": 4.0}, "clip-retrieval": {"whole call": 2.0}, "one reader": {}}],
    },
    "index_search": {
        "ratios": [
            {"ours": "ours, chosen", "peer": "autofaiss", "questions_per_s": 2.0, "quartiles": [2.0, 2.0]}
            | {"build_s": 0.5, "memory": 0.5}
        ]
    },
    "serving": {
        "rows": [
            {"server": "vlm serve", "queries": "texts", "clients": 16, "qps": 20.0, "p99": 1.0},
            {"server": "clip-retrieval back", "queries": "texts", "clients": 16, "qps": 10.0, "p99": 2.0},
        ]
    },
    "cold_start": {"commands": {"search": {"ratio": {"wall": 0.5, "megabytes": 0.5}}}},
}


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return benchmark_module("suite")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return benchmark_module("parts.suite_page")


def benchmark_module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def entry_of(suite: ModuleType, name: str) -> object:
    return next(entry for entry in suite.ENTRIES if entry.name == name)


@pytest.mark.parametrize("name", TWICE_AS_GOOD)
def test_above_one_is_better_whatever_is_measured(suite, name):
    ratios = entry_of(suite, name).ratios(TWICE_AS_GOOD[name])
    assert ratios
    for ratio in ratios:
        assert median(ratio.values) == 2.0, ratio


def test_every_comparison_is_a_benchmark_and_the_whole_takes_less_than_an_hour(suite):
    assert {entry.name for entry in suite.ENTRIES} == set(TWICE_AS_GOOD)
    for entry in suite.ENTRIES:
        assert (BENCHMARKS / f"{entry.name}.py").is_file()
    assert sum(entry.minutes for entry in suite.ENTRIES) <= 60


@pytest.fixture
def entries(suite, tmp_path, monkeypatch):
    """The suite runs these comparisons, each a script, of which the ratio is the number that it prints."""

    def made(**scripts: str) -> None:
        found = []
        for name, script in scripts.items():
            (tmp_path / f"{name}.py").write_text(script)
            found.append(
                suite.Entry(
                    name=name,
                    stage=name,
                    peers="p",
                    arguments="",
                    tiny="",
                    minutes=1,
                    ratios=lambda result: [ratio_type(what="w", peer="p", values=(result["ratio"],))],
                )
            )
        monkeypatch.setattr(suite, "ENTRIES", tuple(found))

    ratio_type = benchmark_module("parts.suite_entries").Ratio
    monkeypatch.setattr(suite, "BENCHMARKS", tmp_path)
    return made


def test_a_failure_is_told_leaves_no_record_and_lets_the_others_run(suite, entries, tmp_path, capsys):
    entries(wrong="exit(2)", mute="", other="print('{}')", fine="print('{\"ratio\": 3}')")
    results = tmp_path / "results"
    results.mkdir()
    (results / "wrong.json").write_text("an earlier record")

    assert suite.run(suite.Arguments(out=results)) == 1

    told = capsys.readouterr().err
    assert "wrong ended with exit code 2" in told
    assert "mute failed: JSONDecodeError" in told
    assert "other failed: KeyError: 'ratio'" in told
    assert (results / "wrong.json").read_text() == "an earlier record"
    assert json.loads((results / "fine.json").read_text())["ratios"][0]["values"] == [3]
    assert {file.name for file in results.iterdir()} == {"wrong.json", "fine.json"}


def test_what_takes_too_long_is_ended(suite, entries, tmp_path, capsys):
    entries(slow="import time; time.sleep(600)")

    assert suite.run(suite.Arguments(out=tmp_path / "results", patience=0.01)) == 1

    assert "slow was ended after its 0.01 minutes" in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())


def test_figures_of_the_smallest_sizes_are_not_kept_as_results(suite):
    with pytest.raises(UsageError, match="--tiny gives no figures to keep; name another folder by --out"):
        suite.run(suite.Arguments(tiny=True))


def test_an_unknown_name_is_an_error(suite, tmp_path):
    with pytest.raises(UsageError, match="there is no such comparison; there are loading"):
        suite.run(suite.Arguments(only=("speed",), out=tmp_path))


def test_a_loss_stands_on_the_page_and_in_the_table(suite, page):
    ratio = {"what": "queries/s", "peer": "bare FAISS", "values": [0.8, 0.9], "in_readme": True}
    record = {"name": "index_search", "stage": "index", "peers": "FAISS", "command": "benchmarks/run index_search"}
    record |= {"date": "2026-11-29", "seconds": 9, "versions": {"torch": "2"}, "ratios": [ratio]}
    record |= {"machine": {"processor": "P", "cores": 2, "memory_gib": 24}}

    written = page.results_page([record])
    assert "| index | queries/s | bare FAISS | 0.85 × (0.80–0.90) |" in written.split("## Index")[0]
    assert "| index | bare FAISS | queries/s: 0.85 × (0.80–0.90) |" in page.readme_table([record])
    readme = f"a\n{page.README_BEGIN}old\n{page.README_END}b\n"
    assert page.with_table(readme, "new\n") == f"a\n{page.README_BEGIN}new\n{page.README_END}b\n"


def test_records_have_what_repeats_them(page):
    for file in page.RESULTS.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert record["command"].startswith(f"benchmarks/run {record['name']}")
        assert record["date"]
        assert record["versions"]["torch"]
        assert record["ratios"], file.name
        assert not record["problem"]


def names_of(path: Path) -> set[str]:
    """What a module defines or imports at its top, without importing it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def test_what_scripts_import_of_the_package_is_there() -> None:
    missing: list[str] = []
    for script in sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("scripts/*.py")]):
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vlm"):
                continue
            module = ROOT.joinpath(*str(node.module).split("."))
            file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
            there = names_of(file) if file.is_file() else set()
            for alias in node.names:
                if alias.name not in there and not (module / f"{alias.name}.py").is_file():
                    missing.append(f"{script.name}: {node.module}.{alias.name}")
    assert not missing
