import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.models.model import VisionLanguageModel
from vlm.train.averaging import greedy_soup, interpolate, weighted_soup


class Words(Tokenizer):
    """A tokenizer that is only asked who it is."""

    context_length, vocab_size, start_token, end_token, pad_token = 3, 3, 1, 2, 0

    def __init__(self, identity):
        self._identity = identity

    def encode(self, texts):
        return np.tile(np.array([1, 2, 0]), (len(texts), 1))

    def decode(self, tokens):
        return ""

    def save(self, folder):
        (folder / "words").write_text(self._identity)

    def fingerprint(self):
        return self._identity


def model(point, *, config=None, size=32, words="pieces"):
    """A model whose network is a point in the plane."""
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([point]))
    return VisionLanguageModel(
        name=str(point),
        network=cast(Any, network),
        config=config or {"embed_dim": 1, "vision_cfg": {"layers": 1, "image_size": 32}},
        view=EvalTransform(size=size),
        tokenizer=Words(words),
    )


def opener(**models):
    """MODEL to a model that nobody has touched, as from disk."""
    return lambda name: copy.deepcopy(models[name])


def point_of(found):
    return cast(nn.Linear, found.network).weight.tolist()[0]


def nearness(target):
    """A metric with its best value, 0, at a point."""
    return lambda found: -float((cast(nn.Linear, found.network).weight.detach() - torch.tensor(target)).norm())


def test_a_uniform_soup_of_two_is_their_mean():
    soup = weighted_soup(["a", "b"], [1.0, 1.0], open_model=opener(a=model([1.0, 4.0]), b=model([3.0, -2.0])))
    assert point_of(soup.model) == [2.0, 1.0]
    assert [part.share for part in soup.ingredients] == [0.5, 0.5]
    assert soup.metric is None


def test_a_weighted_soup_goes_by_proportions_and_measures_each_and_the_whole():
    kitchen = opener(a=model([4.0, 0.0]), b=model([0.0, 4.0]))
    soup = weighted_soup(["a", "b"], [3.0, 1.0], open_model=kitchen, measure=nearness([3.0, 1.0]))
    assert point_of(soup.model) == [3.0, 1.0]
    assert [part.share for part in soup.ingredients] == [0.75, 0.25]
    assert soup.metric == 0
    assert soup.ingredients[0].metric == pytest.approx(-(2**0.5))


def test_the_greedy_recipe_by_hand():
    # best first (b), then a helps, then the far one would harm
    kitchen = opener(a=model([0.0, 3.0]), b=model([2.0, 0.0]), far=model([50.0, 0.0]))
    soup = greedy_soup(["far", "a", "b"], open_model=kitchen, measure=nearness([1.0, 1.0]))
    assert [part.model for part in soup.ingredients] == ["b", "a", "far"]
    assert [part.share for part in soup.ingredients] == [0.5, 0.5, 0.0]
    assert point_of(soup.model) == [1.0, 1.5]
    assert soup.metric == pytest.approx(-0.5)
    assert soup.ingredients[2].metric_with == pytest.approx(nearness([1.0, 1.0])(model([52 / 3, 1.0])))


def test_the_ingredients_of_a_greedy_soup_are_those_of_the_search_written_out():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        points = {f"m{number}": torch.randn(2, generator=generator).tolist() for number in range(6)}
        measure = nearness([0.2, -0.1])
        kitchen = opener(**{name: model(point) for name, point in points.items()})
        soup = greedy_soup(list(points), open_model=kitchen, measure=measure)
        chosen: list[str] = []
        best = -float("inf")
        for name in sorted(points, key=lambda name: -measure(model(points[name]))):
            mean = torch.tensor([points[other] for other in [*chosen, name]]).mean(dim=0)
            if measure(model(mean.tolist())) >= best:
                chosen, best = [*chosen, name], measure(model(mean.tolist()))
        assert [part.model for part in soup.ingredients if part.share] == chosen
        assert soup.metric == pytest.approx(best)
        assert best >= max(part.metric for part in soup.ingredients if part.metric is not None)


def test_an_ingredient_that_changes_nothing_is_taken_and_equal_models_keep_their_order():
    kitchen = opener(a=model([1.0, 0.0]), b=model([0.0, 1.0]))
    soup = greedy_soup(["b", "a"], open_model=kitchen, measure=lambda found: 0.5)
    assert [(part.model, part.share) for part in soup.ingredients] == [("b", 0.5), ("a", 0.5)]


def test_interpolation_ends_are_its_inputs_bit_for_bit():
    start, tuned = model([0.1, -0.0]), model([1e-30, 7.3])
    for alpha, end in ((0.0, start), (1.0, tuned)):
        soup = interpolate("start", "tuned", [alpha], open_model=opener(start=start, tuned=tuned))
        assert soup.model.fingerprint == end.fingerprint


def test_interpolation_is_the_straight_line_and_the_best_alpha_is_taken():
    kitchen = opener(start=model([0.0, 8.0]), tuned=model([8.0, 0.0]))
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    soup = interpolate("start", "tuned", alphas, open_model=kitchen, measure=nearness([6.0, 2.0]))
    assert point_of(soup.model) == [6.0, 2.0]
    assert [(part.model, part.share) for part in soup.ingredients] == [("start", 0.25), ("tuned", 0.75)]
    assert [point.alpha for point in soup.sweep] == alphas
    assert soup.sweep[0].metric == pytest.approx(-(72**0.5))
    assert soup.metric == 0
    flat = interpolate("start", "tuned", alphas, open_model=kitchen, measure=lambda found: 1.0)
    assert flat.ingredients[1].share == 0


@pytest.mark.parametrize(("max_drift", "alpha"), [(0.0, 0.0), (2.1, 0.25), (4.0, 0.5), (20.0, 0.75)])
def test_of_a_path_the_best_alpha_that_keeps_other_data_is_taken(max_drift, alpha):
    kitchen = opener(start=model([0.0, 8.0]), tuned=model([8.0, 0.0]))
    soup = interpolate(
        "start",
        "tuned",
        [0.25, 0.5, 0.75, 1.0],
        open_model=kitchen,
        measure=nearness([6.0, 2.0]),
        # how far the second coordinate is from the start's
        measure_other=lambda found: point_of(found)[1],
        max_drift=max_drift,
    )
    assert soup.ingredients[1].share == alpha
    # the start is what is compared with, so that it is measured unasked
    assert [(point.alpha, point.other) for point in soup.sweep] == [(0, 8), (0.25, 6), (0.5, 4), (0.75, 2), (1, 0)]
    assert [point.is_allowed for point in soup.sweep] == [8 - point.other <= max_drift for point in soup.sweep]
    assert point_of(soup.model) == [8 * alpha, 8 - 8 * alpha]


@pytest.mark.parametrize(("alphas", "message"), [([], "none"), ([0.5, 1.2], "1.2"), ([0.1, 0.2], "--val")])
def test_alphas_that_say_nothing_are_refused(alphas, message):
    with pytest.raises(UsageError, match=message):
        interpolate("a", "b", alphas, open_model=opener(a=model([1.0, 0.0]), b=model([0.0, 1.0])))


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UsageError, match="2 models need 2 weights above 0"):
        weighted_soup(["a", "b"], shares, open_model=opener(a=model([1.0, 0.0]), b=model([0.0, 1.0])))


def grown(point):
    found = model(point)
    found.network.register_buffer("extra", torch.zeros(3))
    return found


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            model([0.0, 1.0], config={"embed_dim": 1, "vision_cfg": {"layers": 2, "image_size": 32}}),
            "model_cfg.vision_cfg.layers 1 against 2",
        ),
        (
            model([0.0, 1.0], config={"embed_dim": 1, "vision_cfg": {"layers": 1, "image_size": 32}, "bias": True}),
            "model_cfg.bias absent against true",
        ),
        (model([0.0, 1.0], size=64), "view.size 32 against 64"),
        (model([0.0, 1.0], words="others"), "the tokenizer"),
        (grown([0.0, 1.0]), r"extra absent against \[3\]"),
        (replace(model([0.0, 1.0]), network=nn.Linear(4, 1, bias=False)), r"weight \[1, 2\] against \[1, 4\]"),
    ],
)
def test_models_of_another_kind_are_refused_with_what_differs(other, message):
    kitchen = opener(a=model([1.0, 0.0]), b=other)
    with pytest.raises(UsageError, match=message):
        weighted_soup(["a", "b"], [1.0, 1.0], open_model=kitchen)
    with pytest.raises(UsageError, match=message):
        greedy_soup(["a", "b"], open_model=kitchen, measure=lambda found: 0.0)
    with pytest.raises(UsageError, match=message):
        interpolate("a", "b", [0.5], open_model=kitchen)


def test_runs_that_differ_in_regularisation_alone_are_of_one_kind():
    configs = [
        {"embed_dim": 1, "vision_cfg": {"size": size, "patch_dropout": p}} for p, size in ((0.0, [1]), (0.5, (1,)))
    ]
    kitchen = opener(a=model([1.0, 0.0], config=configs[0]), b=model([0.0, 1.0], config=configs[1]))
    assert point_of(weighted_soup(["a", "b"], [1.0, 1.0], open_model=kitchen).model) == [0.5, 0.5]


def test_the_same_model_under_two_names_is_refused():
    kitchen = opener(run=model([1.0, 0.0]), other=model([2.0, 0.0]), last=model([1.0, 0.0]))
    with pytest.raises(UsageError, match="run and last are the same model"):
        weighted_soup(["run", "other", "last"], [1.0, 1.0, 1.0], open_model=kitchen)


def test_a_model_that_has_diverged_is_refused_by_name():
    kitchen = opener(a=model([1.0, 0.0]), b=model([float("nan"), 0.0]))
    with pytest.raises(VlmError, match=r"\[nan, 0.0\] has weights that are not finite \(in weight\)"):
        greedy_soup(["a", "b"], open_model=kitchen, measure=lambda found: 1.0)
