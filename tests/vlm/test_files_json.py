import json

import pytest

from vlm.console import show_json
from vlm.files import json_text


def test_what_json_can_hold_is_written_as_python_writes_it():
    value = {"a": [1, 2.5, None, True, "狗"], "b": {"c": ()}}
    assert json_text(value) == json.dumps(value, ensure_ascii=False)


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    value = {"a": [float("nan"), (float("-inf"), 1)], "b": {"c": float("inf")}}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == {"a": [None, [None, 1]], "b": {"c": None}}


def test_what_utf_8_cannot_hold_is_escaped():
    value = {"name": "caf\udce9 \u72d7", "score": float("nan")}
    assert json.loads(json_text(value)) == {"name": "caf\udce9 \u72d7", "score": None}
    assert json_text(value).isascii()


def test_results_for_machines_hold_no_nan(capsys):
    show_json({"recall": float("nan"), "path": ...})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"recall": None, "path": "Ellipsis"}
