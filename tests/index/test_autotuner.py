import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vlm
from tests.index.embeddings_fixture import CAPTIONS, write, write_images_and_texts
from vlm.cli.main import main
from vlm.errors import UsageError
from vlm.index.ann.index_types import INDEX_TYPES, TuningParams
from vlm.index.autotune.autotune_report import draw_plan, show_plan
from vlm.index.autotune.autotuner import Plan, autotune, retune, verify_plan
from vlm.index.autotune.query_sampling import SampledRows, sample_queries
from vlm.index.autotune.trial import TuningTarget
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index
from vlm.manifest import read_manifest

Build = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_images_and_texts(tmp_path_factory.mktemp("spaces"))


@pytest.fixture(scope="module")
def plan(spaces: tuple[Path, Path]) -> Plan:
    images, texts = spaces
    return autotune(Embeddings.open(images), Embeddings.open(texts), TuningTarget(recall=0.9), max_queries=150)


def test_all_texts_of_a_sample_are_in_one_half(spaces: tuple[Path, Path]) -> None:
    texts = Embeddings.open(spaces[1])
    sample = sample_queries(Embeddings.open(spaces[0]), [texts], max_rows=3000, max_queries=1000, seed=4)
    everything = np.concatenate(list(texts.blocks()))
    half_of = {}
    for half, vectors in (("tune", sample.tuning_queries), ("judge", sample.eval_queries["text→image"])):
        for row in (vectors[:, None] == everything[None]).all(-1).argmax(1):
            assert half_of.setdefault(row // CAPTIONS, half) == half
    assert len(half_of) == 400 / CAPTIONS
    assert len(sample.tuning_queries) == len(sample.eval_queries["text→image"]) == 200


def test_images_asked_with_are_not_in_the_index(spaces: tuple[Path, Path]) -> None:
    sample = sample_queries(Embeddings.open(spaces[0]), [], max_rows=500, max_queries=40, seed=4)
    asked = np.concatenate([sample.tuning_queries, sample.eval_queries["image→image"]])
    assert (len(asked), len(sample.rows)) == (40, 460)
    assert (asked @ sample.rows.vectors.T).max() < 1 - 1e-4


def test_vectors_are_taken_by_number_across_parts(spaces: tuple[Path, Path]) -> None:
    source, numbers = Embeddings.open(spaces[0]), np.array([0, 999, 1000, 2500, 2999])
    np.testing.assert_array_equal(source.take(numbers), np.concatenate(list(source.blocks()))[numbers])


@pytest.mark.parametrize(
    ("fingerprint", "dimension", "message"), [("other", 16, "embed both with one model"), ("drawn", 8, "8 dimensions")]
)
def test_texts_of_another_space_are_refused(
    spaces: tuple[Path, Path], tmp_path: Path, fingerprint: str, dimension: int, message: str
) -> None:
    texts = write(tmp_path / "t", np.eye(dimension, dtype=np.float32), modality="text", fingerprint=fingerprint)
    with pytest.raises(UsageError, match=message):
        autotune(Embeddings.open(spaces[0]), Embeddings.open(texts), TuningTarget())


def test_too_few_rows_or_texts_to_hold_any_out_are_refused(spaces: tuple[Path, Path], tmp_path: Path) -> None:
    few = Embeddings.open(write(tmp_path / "few", np.eye(16, dtype=np.float32), modality="image"))
    with pytest.raises(UsageError, match="16 rows are too few to autotune; use the index type flat"):
        autotune(few, None, TuningTarget())
    one = write(tmp_path / "one", np.eye(16, dtype=np.float32)[:3], modality="text")
    with pytest.raises(UsageError, match="texts of 1 sample"):
        autotune(Embeddings.open(spaces[0]), Embeddings.open(one), TuningTarget())


def test_every_kind_is_measured_and_all_keep_what_they_are_said_to_keep(plan: Plan) -> None:
    assert {one.kind for one in plan.trials} == set(INDEX_TYPES)
    assert plan.judged_by == {"text→image": 150, "image→image": 150}
    for one in plan.trials:
        assert (one.recall["text→image"][10] >= 0.9) == (not one.misses)
        assert one.bound <= one.recall["text→image"][10]
    assert sum(not one.misses for one in plan.trials) >= len(plan.trials) - 2
    assert plan.winner.misses == ()
    flat = next(one for one in plan.trials if one.kind == "flat")
    assert {recall for found in flat.recall.values() for recall in found.values()} == {1.0}
    assert flat.resident_bytes == 3000 * 16 * 4


def test_the_target_is_met_by_the_finished_index(plan: Plan, spaces: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = Embeddings.open(spaces[0]), tmp_path
    for one in plan.trials:
        wanted = replace(plan, kind=one.kind)
        wishes = {name: value for name, value in one.wishes.items() if name != "seed"}
        out = tmp_path / f"{one.kind}{len(list(tmp_path.iterdir()))}"
        build_index(
            spaces[0], out, kind=one.kind, tuning=replace(plan.tuning, **(_NONE | wishes)), evidence=plan.evidence
        )
        index = Index.open(out)
        found = verify_plan(index, source, wanted)
        index.close()
        assert found.recall == pytest.approx(one.recall["text→image"][10], abs=0.05)
        assert found.questions == 150
    assert read_manifest(out, "index").details["evidence"] == plan.evidence


_NONE = dict.fromkeys(("nlist", "nprobe", "links", "ef_construction", "ef_search", "rerank"))


def test_a_missed_target_is_verified_as_missed(plan: Plan, spaces: tuple[Path, Path], tmp_path: Path) -> None:
    build_index(
        spaces[0], tmp_path / "out", kind="ivf", tuning=replace(plan.tuning, **(_NONE | {"nlist": 60, "nprobe": 1}))
    )
    index = Index.open(tmp_path / "out")
    found = verify_plan(
        index, Embeddings.open(spaces[0]), replace(plan, promise=TuningTarget(recall=0.9, latency_ms=1e-6))
    )
    index.close()
    assert found.recall < 0.9
    recall, latency = found.breaks
    assert recall == f"recall@10 {found.recall:.2%} instead of 90%"
    assert latency.endswith("ms (p95) instead of 1e-06")


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfsq"])
def test_effort_that_a_sample_misjudged_is_settled_on_all_rows(
    kind: str, plan: Plan, spaces: tuple[Path, Path], tmp_path: Path
) -> None:
    small = {"ivf": {"nlist": 60, "nprobe": 1}, "hnsw": {"ef_search": 1}, "ivfsq": {"nlist": 60, "nprobe": 1}}
    tuning = replace(plan.tuning, **(_NONE | small[kind]))
    build_index(spaces[0], tmp_path / "out", kind=kind, tuning=tuning)
    source, wanted = Embeddings.open(spaces[0]), replace(plan, kind=kind, promise=TuningTarget(recall=0.95))
    reader = Index.open(tmp_path / "out")
    assert verify_plan(reader, source, wanted).recall < 0.95
    setting = retune(tmp_path / "out", source, wanted)
    assert setting is not None
    assert reader.refresh()
    assert setting.effort in reader.info().parameters.values()
    # judged by other questions than it was settled with
    assert verify_plan(reader, source, wanted).recall > 0.93
    reader.close()


def test_answers_too_long_for_effort_to_matter_leave_it_as_planned(
    plan: Plan, spaces: tuple[Path, Path], tmp_path: Path
) -> None:
    build_index(
        spaces[0], tmp_path / "out", kind="ivf", tuning=replace(plan.tuning, **(_NONE | {"nlist": 60, "nprobe": 20}))
    )
    wanted = replace(plan, kind="ivf", promise=TuningTarget(recall=0.9, at=500))
    assert retune(tmp_path / "out", Embeddings.open(spaces[0]), wanted) is None
    (view,) = Index.open(tmp_path / "out").snapshot.views
    assert view.segment.meta.parameters["nprobe"] == 20


def test_an_exact_index_type_has_nothing_to_retune(plan: Plan, spaces: tuple[Path, Path], tmp_path: Path) -> None:
    build_index(spaces[0], tmp_path / "out", kind="flat")
    assert retune(tmp_path / "out", Embeddings.open(spaces[0]), replace(plan, kind="flat")) is None


def test_kinds_too_large_or_without_rows_enough_are_left_out_with_the_reason(spaces: tuple[Path, Path]) -> None:
    small = autotune(
        Embeddings.open(spaces[0]),
        None,
        TuningTarget(recall=0.5, memory_bytes=60_000),
        kinds=["flat", "sq8"],
        max_queries=50,
    )
    assert small.left_out == {"flat": "needs 192 kB"}
    assert (small.kind, small.is_optimistic, small.direction) == ("sq8", True, "image→image")
    assert (small.tuned_with, small.judged_by) == (25, {"image→image": 25})
    few = autotune(Embeddings.open(spaces[0]), None, TuningTarget(), kinds=["flat", "ivf"], max_rows=300)
    assert few.kind == "flat"
    assert "at least 312 rows" in few.left_out["ivf (1√N lists)"]


def test_beyond_the_sample_numbers_are_those_of_all_rows(spaces: tuple[Path, Path]) -> None:
    images, texts = (Embeddings.open(folder) for folder in spaces)
    carried = autotune(images, texts, TuningTarget(recall=0.9), kinds=["ivf", "flat"], max_rows=1600, max_queries=100)
    assert (carried.num_rows, carried.sample_rows) == (3000, 1500)
    coarse = next(one for one in carried.trials if one.kind == "ivf")
    assert coarse.wishes["nlist"] == round(3000**0.5)
    assert coarse.resident_bytes == 3000 * (64 + 8) + 55 * 64
    flat = next(one for one in carried.trials if one.kind == "flat")
    assert flat.measured.p50_ms <= flat.latency.p50_ms <= 2.001 * flat.measured.p50_ms


def test_an_unknown_kind_is_refused(spaces: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="did you mean 'hnsw'"):
        autotune(Embeddings.open(spaces[0]), None, TuningTarget(), kinds=["hnws"])


def test_the_evidence_is_plain_and_whole(plan: Plan) -> None:
    assert json.loads(json.dumps(plan.evidence)) == plan.evidence
    assert plan.evidence["why"] == plan.why
    assert len(plan.evidence["trials"]) == len(plan.trials)
    assert "questions" not in plan.evidence


def test_the_plan_is_shown_and_drawn(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(replace(plan, is_optimistic=True, left_out={"hnsw": "needs 4 GB"}))
    printed = capsys.readouterr().out
    for shown in (
        "t→i R@10",
        "i→i R@100",
        "taken",
        "Not tried: hnsw: needs 4 GB.",
        f"Taken: {plan.why[:20]}",
        "One machine is enough:",
        plan.machine.arithmetic[0],
        "optimistic",
    ):
        assert shown in printed
    for shown in (plan, replace(plan, trials=tuple(one for one in plan.trials if not one.curve))):
        alone = shown if shown is plan else replace(shown, kind="flat", tuning=TuningParams(seed=0))
        draw_plan(alone, tmp_path / "plan.png")
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_any_part_of_the_rows_is_the_first_of_them() -> None:
    rows = SampledRows(np.eye(8, dtype=np.float32))
    assert len(rows.part(0.25)) == 2
    assert rows.part(0.25).stored.dtype == np.float16


@pytest.fixture
def build(spaces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Build:
    """Builds with these words after the folders; gives exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["index", "build", str(spaces[0]), str(tmp_path / "out"), *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_build_for_a_target_autotunes_draws_and_verifies(
    build: Build, spaces: tuple[Path, Path], tmp_path: Path
) -> None:
    code, out, _ = build("--recall", 0.8, "--texts", spaces[1], "--kind", "ivfsq", "--plan-rows", 600, "--json")
    said = json.loads(out)
    assert (code, said["kind"]) == (0, "ivfsq")
    assert said["confirmed"]["recall"] >= 0.8
    assert read_manifest(tmp_path / "out", "index").details["evidence"] == said["plan"]
    (view,) = Index.open(tmp_path / "out").snapshot.views
    assert said["parameters"] == view.segment.meta.parameters != said["plan"]["trials"][0]["parameters"]
    assert (tmp_path / "out" / "plan.png").is_file()


def test_the_smallest_index_is_taken_if_asked_for(build: Build, spaces: tuple[Path, Path], tmp_path: Path) -> None:
    # it is a target like the others: it makes a build autotune
    code, out, _ = build("--prefer", "memory", "--texts", spaces[1], "--plan-rows", 600, "--json")
    said = json.loads(out)
    meeting = [one for one in said["plan"]["trials"] if not one["misses"]]
    assert (code, said["plan"]["promise"]["prefer"]) == (0, "memory")
    assert said["kind"] == min(meeting, key=lambda one: one["resident_bytes"])["kind"]
    with pytest.raises(UsageError, match="prefer = 'quality'; give balanced, speed or memory"):
        vlm.build_index(spaces[0], tmp_path / "none", prefer="quality")  # pyright: ignore[reportArgumentType]


def test_a_target_that_nothing_meets_leaves_no_folder(build: Build, tmp_path: Path) -> None:
    code, _, err = build("--memory", "1kB", "--kind", "sq8")
    assert (code, "sq8: needs 48.1 kB" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recall", 0.9, "--ef-search", 9), "--ef-search is chosen by autotuning"),
        (("--memory", "much"), "'much' is not a size"),
        (("--recall", 2), "recall = 2.0 is out of range"),
    ],
)
def test_options_that_contradict_a_target_are_refused(build: Build, words: tuple[object, ...], message: str) -> None:
    code, _, err = build(*words)
    assert code == 2
    assert message in err


def test_a_folder_that_exists_is_refused_before_autotuning(build: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, _, err = build("--recall", 0.9)
    assert (code, "exists already" in err, "No texts" in err) == (2, True, False)
