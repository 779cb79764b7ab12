"""Pages need nothing but themselves, and show text as text."""

import base64
import hashlib
import re
import subprocess
import sys

import jinja2
import pytest

from vlm.evaluation.caption_accuracy import CaptionTruth
from vlm.evaluation.caption_evaluator import CaptionExample, CaptionReport
from vlm.evaluation.caption_metrics import caption_metrics
from vlm.evaluation.eval_report import EvalData, Evaluation, evaluation_page
from vlm.evaluation.retrieval_metrics import Direction, RetrievalResult
from vlm.evaluation.zero_shot import ClassScore, ZeroShot
from vlm.pages import Provenance, render

PROVENANCE = Provenance(command="vlm eval 'a b' --out <c>", date="2026-01-02 03:04 UTC", version="9.8")


@pytest.fixture
def page():
    direction = Direction(recall={1: 0.25, 5: 0.5, 10: 1.0}, median_rank=3.5, num_queries=1200)
    evaluation = Evaluation(
        model="<b>run</b>",
        fingerprint="abc123",
        retrieval=RetrievalResult(
            text_to_image=direction, image_to_text=direction, num_images=1000, num_texts=5000, num_bad=2
        ),
        zero_shot=ZeroShot(
            top1=0.5,
            top5=0.75,
            mean_per_class=0.4,
            majority=0.1,
            num_images=30,
            num_classes=2,
            classes=(ClassScore(name="a & b", num_images=10, accuracy=0.125),),
        ),
        caption_truth=CaptionTruth(
            true=0.625,
            num_captions=8,
            wrong={"colour": 3},
            examples=({"key": "k1", "caption": "<i>a cat", "true": False, "reason": "no cat"},),
        ),
        captions=CaptionReport(
            scores=caption_metrics(["a cat", "a dog"], [["a cat"], ["the dog"]]),
            num_different=2,
            judge="<b>judge</b>",
            examples=(CaptionExample(key="k2", caption="<i>a dog", references=("the <dog>",), cider_d=1.25),),
        ),
    )
    data = EvalData(retrieval="data/val-{00..03}.tar", zero_shot="classes/", captions="shapes/")
    return evaluation_page(evaluation, data=data, provenance=PROVENANCE)


def test_an_evaluation_shows_every_figure_with_its_data_set(page):
    for text in ("data/val-{00..03}.tar", "classes/", "shapes/", "abc123"):
        assert text in page
    for figure in ("25.0%", "3.5", "1,200", "1,000 images", "5,000 captions", "2 unusable samples", "75.0%", "12.5%"):
        assert figure in page
    for text in ("62.5%", "wrong: colour", "no cat", "&lt;i&gt;a cat", "a &amp; b", "&lt;b&gt;run"):
        assert text in page
    for text in ("0.7500", "&lt;b&gt;judge", "&lt;i&gt;a dog", "the &lt;dog&gt;", "1.25"):
        assert text in page


def test_the_footer_names_command_date_and_version(page):
    footer = page.split("<footer>")[1]
    assert "vlm eval &#39;a b&#39; --out &lt;c&gt;" in footer
    assert "2026-01-02 03:04 UTC, vlm 9.8" in footer


def test_the_security_policy_allows_the_style_sheet_alone(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert style is not None
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert digest in policy[1].replace("&#43;", "+")
    for refused in ("<script", " style=", " onload=", "<link", "url("):
        assert refused not in page


def test_the_same_values_give_the_same_page():
    values = {"title": "a", "evaluation": Evaluation(model="m", fingerprint="f"), "data": EvalData()}
    assert render("evaluation.html", **values) == render("evaluation.html", **values)


def test_a_name_without_a_value_raises():
    with pytest.raises(jinja2.UndefinedError, match="evaluation"):
        render("evaluation.html", title="a")


def test_jinja2_is_imported_with_the_first_page():
    code = "import sys, vlm.pages; print('jinja2' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
