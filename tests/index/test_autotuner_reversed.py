"""The autotuner in several directions: reversed ones, and indexes of texts."""

from pathlib import Path

import numpy as np
import pytest

from tests.index.embeddings_fixture import write_images_and_texts
from vlm.errors import UsageError
from vlm.index.autotune.autotune_report import show_plan
from vlm.index.autotune.autotuner import Plan, autotune
from vlm.index.autotune.query_sampling import sample_queries
from vlm.index.autotune.trial import TuningTarget
from vlm.index.embeddings_folder import Embeddings


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_images_and_texts(tmp_path_factory.mktemp("spaces"))


@pytest.fixture
def turned(spaces: tuple[Path, Path]) -> Plan:
    """A plan with the reversed direction, measured on few texts."""
    images, texts = (Embeddings.open(folder) for folder in spaces)
    kinds = ["flat", "ivf", "ivfsq", "hnsw"]
    return autotune(images, texts, TuningTarget(recall=0.9), kinds=kinds, max_queries=100, min_reversed_rows=400)


def test_texts_as_rows_are_queried_with_images(
    turned: Plan, spaces: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert turned.unturned == {}
    for one in turned.trials:
        (found,) = one.turned.values()
        assert (list(one.turned), found.rows, list(found.recall)) == (["image→text"], 400, [1, 10, 100])
        assert 0 < found.latency.p50_ms <= found.latency.p99_ms
        assert all(0.5 < recall <= 1 for recall in found.recall.values())
    assert set(turned.trials[0].turned["image→text"].recall.values()) == {1.0}
    assert turned.evidence["trials"][0]["turned"]["image→text"]["recall"] == {"1": 1.0, "10": 1.0, "100": 1.0}
    show_plan(turned)
    printed = capsys.readouterr().out
    assert "Reversed direction: 400 texts as rows, images as queries" in printed
    assert "i→t R@100" in printed


def test_reversed_rows_are_the_texts_and_the_queries_are_not_rows(spaces: tuple[Path, Path]) -> None:
    images, texts = (Embeddings.open(folder) for folder in spaces)
    drawn = sample_queries(images, [texts], max_rows=3000, max_queries=100, seed=0)
    assert drawn.turned == {}
    swapped = sample_queries(texts, [images], max_rows=400, max_queries=40, seed=0)
    np.testing.assert_array_equal(swapped.turned["text→image"].vectors, np.concatenate(list(images.blocks())))
    assert swapped.held_out.shape == (40, 16)
    assert (swapped.held_out @ swapped.rows.vectors.T).max() < 1 - 1e-4


def test_too_few_texts_are_not_measured_reversed(spaces: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    images, texts = (Embeddings.open(folder) for folder in spaces)
    plan = autotune(images, texts, TuningTarget(recall=0.9), kinds=["flat"], max_queries=40)
    assert plan.unturned == {"image→text": "400 texts are too few, 1,000 are needed"}
    assert all(one.turned == {} for one in plan.trials)
    show_plan(plan)
    assert "Not measured: image→text: 400 texts are too few" in capsys.readouterr().out


def test_an_index_of_texts_is_queried_with_images(spaces: tuple[Path, Path]) -> None:
    images, texts = (Embeddings.open(folder) for folder in spaces)
    asked = autotune(texts, None, TuningTarget(recall=0.9), images=images, kinds=["flat", "sq8"], max_queries=40)
    assert asked.judged_by == {"image→text": 40, "text→text": 40}
    assert (asked.direction, asked.is_optimistic) == ("image→text", False)
    assert asked.trials[0].turned["text→image"].rows == 3000
    both = autotune(texts, texts, TuningTarget(recall=0.9), images=images, kinds=["flat"], max_queries=40)
    assert both.judged_by == {"other text→text": 40, "image→text": 40, "text→text": 40}
    assert both.direction == "other text→text"
    held_out = autotune(images, None, TuningTarget(recall=0.9), images=images, kinds=["flat"], max_queries=40)
    assert (held_out.direction, held_out.is_optimistic, held_out.unturned) == ("other image→image", True, {})


def test_queries_of_the_wrong_modality_are_refused(spaces: tuple[Path, Path]) -> None:
    images, texts = (Embeddings.open(folder) for folder in spaces)
    with pytest.raises(UsageError, match="holds image embeddings; text ones are needed here"):
        autotune(images, images, TuningTarget())
    with pytest.raises(UsageError, match="holds text embeddings; image ones are needed here"):
        autotune(images, None, TuningTarget(), images=texts)
