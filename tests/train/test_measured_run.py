"""The held-out loss of a model, against torch's own cross-entropy, and how metrics become errors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.train import measured_run
from vlm.train.measured_run import check_metric, error_of, format_score, held_out_loss


@pytest.fixture
def val(scene_shards):
    return open_evaluation_set(str(scene_shards / "val"))


def logits_of(model, data):
    texts = [captions["en"][0] for captions in data.captions]
    [batch] = list(data.iter_images(model.view))
    logits = model.logit_scale * model.embed_images(batch.images) @ model.embed_texts(texts).T
    return texts, logits.double()


def test_it_is_the_cross_entropy_of_both_directions(make_teacher, val):
    model = make_teacher(3)
    texts, logits = logits_of(model, val)
    assert len(set(texts)) == len(texts)
    targets = torch.arange(len(texts))
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    assert held_out_loss(model, val, languages=("en",)) == pytest.approx(expected.item(), rel=1e-5)
    # of a model that knows nothing it is the logarithm of the number of images
    assert abs(expected.item() - math.log(len(texts))) < 2


def test_equal_captions_are_right_for_each_others_images(make_teacher, val, monkeypatch):
    model = make_teacher(3)
    val = replace(val, captions=tuple({"en": (f"caption {row // 2}",)} for row in range(len(val))))
    texts, logits = logits_of(model, val)
    is_right = torch.tensor([[left == right for right in texts] for left in texts])
    expected = 0.0
    for direction in (logits, logits.T):
        shares = (direction.softmax(dim=1) * is_right).sum(dim=1)
        expected -= shares.log().mean().item() / 2
    assert held_out_loss(model, val, languages=("en",)) == pytest.approx(expected, rel=1e-5)
    # in parts it is the same
    monkeypatch.setattr(measured_run, "_SIMILARITIES_AT_ONCE", 7 * len(val))
    assert held_out_loss(model, val, languages=("en",)) == pytest.approx(expected, rel=1e-5)


def test_a_pair_that_is_far_from_any_rank_has_a_loss_and_no_infinity():
    queries = np.array([[2000, 0], [0, 2000]], np.float32)
    candidates = np.array([[0, 1], [1, 0]], np.float32)
    assert measured_run._direction_loss(queries, candidates, np.array([0, 1])) == pytest.approx(2000)


def test_a_set_without_captions_in_the_language_is_refused(make_teacher, val):
    with pytest.raises(UsageError, match="has a caption in sw"):
        held_out_loss(make_teacher(3), val, languages=("sw",))


def test_scores_become_errors_and_back():
    assert error_of("recall@10", 0.75) == 0.25
    assert error_of("loss", 2.5) == 2.5
    assert error_of("recall@1", error_of("recall@1", 0.3)) == pytest.approx(0.3)
    assert (format_score("recall@1", 0.25), format_score("loss", 2.34567)) == ("25.0%", "2.346")
    check_metric("loss")
    check_metric("image_to_text_recall@5")
    with pytest.raises(UsageError, match="recall@7"):
        check_metric("recall@7")
    with pytest.raises(UsageError, match=r"Unknown metric 'los'.*\bloss\b"):
        check_metric("los")
