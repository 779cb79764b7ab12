import json
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import colour_shards
from vlm.errors import UsageError
from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.caption_evaluator import CaptionMetrics
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel


class ColourCaptioner(ColourEncoder):
    """Names the colour that it sees, or always the same."""

    def __init__(self, always=None):
        super().__init__()
        self.always = always

    def caption_images(self, images, prompt=""):
        names = ["red", "green", "blue"]
        return [prompt + (self.always or names[row.argmax()]) for row in self.embed_images(images).numpy()]


COLOURS = ["red", "green", "blue", "red", "red", "green", "blue", "red", "green", "green", "blue", "red"]


@pytest.fixture
def colours(tmp_path):
    return open_evaluation_set(colour_shards(tmp_path, colours=COLOURS), name="colours")


def test_a_perfect_captioner_is_measured_with_a_row_for_each_image(colours):
    measured = CaptionMetrics().run(EvaluatedModel(ColourCaptioner()), colours)
    assert next(iter(measured.values)) == "cider_d"
    assert measured.values["bleu_1"].value == pytest.approx(1)
    assert measured.values["rouge_l_single"].value == 1
    assert measured.values["clip_score"].value == pytest.approx(2.5, abs=0.01)
    assert measured.num_images == measured.samples.num_rows == 12
    assert measured.samples["caption"].to_pylist() == COLOURS
    # a value that has the name of a column is its mean
    shared = set(measured.values) & set(measured.samples.column_names)
    assert {"cider_d", "cider", "rouge_l", "clip_score", "ref_clip_score"} <= shared
    for name in shared:
        assert measured.values[name].value == pytest.approx(np.mean(measured.samples[name].to_numpy()))
    values = measured.samples["cider_d"].to_numpy()
    interval = mean_interval(values, rng=np.random.default_rng(0))
    assert (measured.values["cider_d"].low, measured.values["cider_d"].high) == (interval.low, interval.high)
    json.dumps(measured.to_json())
    assert measured.details.examples[0].references == ("red",)
    assert measured.details.judge == "colours"


def test_a_captioner_that_says_the_same_of_every_image_is_told_so(colours):
    measured = CaptionMetrics().run(EvaluatedModel(ColourCaptioner(always="red")), colours)
    assert measured.details.num_different == 1
    assert any("says the same of every image" in warning for warning in measured.warnings)
    assert measured.values["bleu_1"].value == pytest.approx(5 / 12)
    # half of the examples are the worst
    assert {example.cider_d for example in measured.details.examples[8:]} >= {0.0}


def test_prompt_language_and_judge_are_used(colours):
    judge = ColourEncoder()
    judge.name = "judge"
    evaluator = CaptionMetrics(prompt="see ", languages=("de",), judge=EvaluatedModel(judge))
    measured = evaluator.run(EvaluatedModel(ColourCaptioner()), colours)
    assert measured.samples["caption"].to_pylist()[0] == "see red"
    assert measured.details.examples[0].references == ("red auf Deutsch",)
    assert measured.details.judge == "judge"
    assert judge.num_images == 12


def test_what_cannot_be_captioned_or_compared_is_refused(colours):
    with pytest.raises(UsageError, match=r"colours has no caption decoder; train one, e\.g\. vlm train tiny-coca"):
        CaptionMetrics().run(EvaluatedModel(ColourEncoder()), colours)
    english = replace(colours, captions=({"en": ("red",)},) * len(colours))
    with pytest.raises(UsageError, match="No image of colours has a caption in fr"):
        CaptionMetrics(languages=("fr",)).run(EvaluatedModel(ColourCaptioner()), english)
