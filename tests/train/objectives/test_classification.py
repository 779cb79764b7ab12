"""The classifier's loss against its definition, and where its classes come from."""

import math

import pytest
import torch

from tests.train.objectives.pair_case import options
from vlm.data.class_labels import open_class_labels, read_class_names
from vlm.errors import BadSample, UsageError
from vlm.train.objectives.classification import CLASSIFY, classify


def test_it_is_its_definition_and_its_parts_add_up():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    wanted = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        wanted -= math.log(math.exp(row[label]) / sum(map(math.exp, row)))
    whole = classify({"class_logits": logits}, {"class_label": labels}, options())
    assert float(whole.detach()) == pytest.approx(wanted, abs=1e-12)
    assert int(CLASSIFY.normaliser({"class_label": labels}, options())) == 7
    parts = [
        classify({"class_logits": logits[rows]}, {"class_label": labels[rows]}, options())
        for rows in (slice(0, 3), slice(3, 7))
    ]
    (wanted_gradient,) = torch.autograd.grad(whole, logits)
    (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), logits)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-14)


@pytest.fixture
def names_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n7\n", encoding="utf-8")
    return path


def test_a_class_is_the_place_of_its_name(names_file):
    labels = open_class_labels("of.kind", str(names_file))
    assert labels is not None
    assert [labels.number({"of": {"kind": kind}}) for kind in ("dog", "cat", 7)] == [1, 0, 2]


@pytest.mark.parametrize(
    "metadata", [{}, {"of": 3}, {"of": {"kind": None}}, {"of": {"kind": True}}, {"of": {"kind": "cow"}}]
)
def test_a_sample_without_a_known_class_is_bad(names_file, metadata):
    labels = open_class_labels("of.kind", str(names_file))
    assert labels is not None
    with pytest.raises(BadSample, match=r"of\.kind"):
        labels.number(metadata)


@pytest.mark.parametrize("text", ["", "one", "cat\ndog\ncat", '["cat"'])
def test_names_that_cannot_be_classes_are_refused(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"names\.txt"):
        read_class_names(path)


def test_a_field_needs_names():
    assert open_class_labels("", "") is None
    with pytest.raises(UsageError, match="--class-names FILE"):
        open_class_labels("kind", "")
