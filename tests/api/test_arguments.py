"""What calls make of their arguments before anything is loaded."""

import subprocess
import sys

import pytest

import vlm
from vlm.errors import UsageError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: vlm.soup(["a", "b"], folder / "soup", weights=0.5), "weights = 0.5 is not a list of numbers"),
        (lambda folder: vlm.soup("a", folder / "soup", interpolate="b", alphas="0.5"), "alphas = '0.5' is not a list"),
        (lambda folder: vlm.export("a", folder / "out", to="openclip"), "to = 'openclip' is unknown"),
        (lambda folder: vlm.build_concepts("a.txt", folder / "out", case="lower"), "case = 'lower' is unknown"),
        (lambda folder: vlm.serve(folder, cors=1), "cors = 1 is not a text"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, call, message):
    with pytest.raises(UsageError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_language_is_not_taken_for_its_letters(scene_shards):
    def captions(languages):
        batches = vlm.stream(scene_shards / "val", transform="evaluation", languages=languages, image_size=16)
        return [caption for batch in batches for caption in batch.texts]

    assert captions("de") == captions(("de",)) != captions("en")


def test_curation_needs_no_torch():
    words = "import sys, vlm; vlm.curate, vlm.inspect; assert not {'torch', 'faiss'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", words], check=True)
