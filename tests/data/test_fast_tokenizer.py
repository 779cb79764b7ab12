"""Hugging Face tokenizers without transformers: equal ids, or none."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlm.data.tokenizers import (
    FastTokenizer,
    HuggingFaceTokenizer,
    TransformersTokenizer,
    open_tokenizer,
    save_without_torch,
    trial_texts,
)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory) -> Path:
    """A BERT tokenizer of letters and some words."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "star", "dog", *letters, *(f"##{x}" for x in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["transformers", "whitespace", "canonicalize", "lower"])
def test_ids_are_those_of_the_wrapped_tokenizer(wordpiece, tmp_path, kind):
    if kind == "transformers":
        theirs = TransformersTokenizer(str(wordpiece), 24)
    else:
        theirs = HuggingFaceTokenizer(str(wordpiece), 24, {"clean": kind})
    assert save_without_torch(theirs, tmp_path, open_tokenizer)
    ours = open_tokenizer(str(tmp_path))
    assert isinstance(ours, FastTokenizer)
    texts = [*trial_texts(600), "A red_star, a DOG!", "dog " * 100]
    assert np.array_equal(ours.encode(texts), theirs.encode(texts))
    assert ours.encode([]).shape == (0, 24)
    ids = ours.encode(["red dog"])[0].tolist()
    assert ours.decode(ids) == theirs.decode(ids)
    for name in ("start_token", "end_token", "pad_token", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_tokenizer_that_would_give_other_ids_is_saved_as_it_is(wordpiece, tmp_path):
    class Shouting(TransformersTokenizer):
        def encode(self, texts):
            return super().encode([f"{text} dog" for text in texts])

    assert not save_without_torch(Shouting(str(wordpiece), 24), tmp_path, open_tokenizer)
    assert json.loads((tmp_path / "vlm_tokenizer.json").read_text())["kind"] == "transformers"
