"""Pages need nothing but themselves, and show text as text."""

import base64
import hashlib
import re
import subprocess
import sys

import jinja2
import numpy as np
import pytest

from tests.evaluation.measured_pets import models_of, pets_at
from vlm.evaluation.comparison import compare
from vlm.evaluation.evaluation_page import evaluation_page
from vlm.pages import Provenance, render

PROVENANCE = Provenance(command="vlm eval 'a b' --out <c>", date="2026-01-02 03:04 UTC", version="9.8")


@pytest.fixture
def page(tmp_path):
    comparison = compare(models_of(pets_at(tmp_path)), rng=np.random.default_rng(0))
    return evaluation_page(comparison, provenance=PROVENANCE)


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
    assert render("base.html", title="<a>") == render("base.html", title="<a>")
    assert "<h1>&lt;a&gt;</h1>" in render("base.html", title="<a>")


def test_a_name_without_a_value_raises():
    with pytest.raises(jinja2.UndefinedError, match="inspection"):
        render("contact_sheet.html", title="a")


def test_jinja2_is_imported_with_the_first_page():
    code = "import sys, vlm.pages; print('jinja2' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
