"""`import vlm`: light, and every name of `__all__` there."""

import importlib
import subprocess
import sys

import pytest

import vlm

HEAVY = ("torch", "numpy", "pydantic", "PIL", "tyro", "faiss", "pyarrow", "open_clip", "transformers")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, vlm; vlm.VlmError; vlm.__all__; vlm.train; dir(vlm); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize("name", vlm.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(vlm, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'vlm' has no attribute 'laod'"):
        _ = getattr(vlm, "laod")  # noqa: B009


def test_the_names_are_listed_for_completion():
    assert set(vlm.__all__) <= set(dir(vlm))


def test_train_is_a_package_that_can_be_called():
    package = importlib.import_module("vlm.train")
    assert callable(package)
    importlib.import_module("vlm.train.presets")
    # importing a module of a package makes the package an attribute of the one above it
    assert vars(vlm)["train"] is package
