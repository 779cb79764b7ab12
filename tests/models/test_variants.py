from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.files import compute_fingerprint
from vlm.model_spec import absolute_spec, split_model_spec
from vlm.models.model import VisionLanguageModel
from vlm.models.variants import MirroredModel, TruncatedModel


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3 * 4 * 4, 16), nn.Embedding(100, 16)

    def encode_image(self, pixels):
        return self.image(pixels.flatten(1))

    def encode_text(self, tokens):
        return self.text(tokens).mean(1)


class Letters(Tokenizer):
    context_length, vocab_size, start_token, end_token, pad_token = 6, 100, 1, 2, 0

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def save(self, folder):
        (folder / "letters").touch()

    def encode(self, texts):
        return torch.tensor([[ord(letter) % 100 for letter in text.ljust(6)[:6]] for text in texts]).numpy()

    def fingerprint(self) -> str:
        return "letters"


@pytest.fixture
def whole() -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(
        name="given",
        network=cast(Any, Network().eval()),
        config={"embed_dim": 16},
        view=EvalTransform(size=4),
        tokenizer=Letters(),
    )


def test_the_first_numbers_are_kept_at_unit_length_in_a_space_of_their_own(whole):
    short = TruncatedModel.of(whole, 5)
    images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    for found, full in (
        (short.embed_images(images), whole.embed_images(images)),
        (short.embed_texts(["red", "a star"]), whole.embed_texts(["red", "a star"])),
    ):
        expected = full[:, :5] / full[:, :5].norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected)
    assert short.embedding_size == 5
    assert short.fingerprint == compute_fingerprint(whole.fingerprint, "prefix", "5")
    assert (short.name, short.view) == ("given#5", whole.view)
    assert TruncatedModel.of(short, 2).fingerprint != TruncatedModel.of(whole, 2).fingerprint


def test_all_dimensions_are_the_model_itself_and_more_or_none_are_refused(whole):
    assert TruncatedModel.of(whole, 16) is whole
    for wrong in (0, 17):
        with pytest.raises(UsageError, match=f"given#{wrong}.*16 dimensions; keep from 1 to 16"):
            TruncatedModel.of(whole, wrong)


def test_an_image_is_embedded_with_its_mirror_image_in_a_space_of_its_own(whole):
    both = MirroredModel.of(whole)
    images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    mean = whole.embed_images(images) + whole.embed_images(images.flip(3))
    torch.testing.assert_close(both.embed_images(images), mean / mean.norm(dim=1, keepdim=True))
    torch.testing.assert_close(both.embed_images(images.flip(3)), both.embed_images(images))
    assert torch.equal(both.embed_texts(["red", "a star"]), whole.embed_texts(["red", "a star"]))
    assert (both.name, both.derived_from, both.embedding_size) == ("given#mirror", "given", 16)
    assert both.fingerprint == compute_fingerprint(whole.fingerprint, "mirror")
    short = TruncatedModel.of(both, 5)
    assert short.name == "given#mirror#5"
    expected = torch.nn.functional.normalize(both.embed_images(images)[:, :5], dim=1)
    torch.testing.assert_close(short.embed_images(images), expected)


def test_images_in_their_own_shape_are_not_mirrored(whole):
    grid = EvalTransform(size=4, resize_mode="aspect", patch=2, tokens=2)
    with pytest.raises(UsageError, match="given#mirror: images keep their shape"):
        MirroredModel.of(replace(whole, view=grid))


def test_what_follows_the_last_sign_is_a_number_or_the_mirror_unless_a_path_is_named_so(tmp_path, monkeypatch):
    assert split_model_spec("runs/a#64") == ("runs/a", 64)
    assert split_model_spec("ViT-B-32:openai") == ("ViT-B-32:openai", None)
    (tmp_path / "run#2").mkdir()
    assert split_model_spec(f"{tmp_path}/run#2") == (f"{tmp_path}/run#2", None)
    assert split_model_spec(f"{tmp_path}/run#2#8") == (f"{tmp_path}/run#2", 8)
    assert split_model_spec("runs/a#mirror") == ("runs/a", "mirror")
    assert split_model_spec("runs/a#mirror#8") == ("runs/a#mirror", 8)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("run#mirror#8") == f"{tmp_path.resolve()}/run#mirror#8"
    with pytest.raises(UsageError, match="an image is mirrored once; write runs/a#mirror"):
        split_model_spec("runs/a#mirror#mirror")
    for wrong in ("runs/a#", "runs/a#b", "runs/a#-1", "runs/a#²"):
        with pytest.raises(UsageError, match="is not a number of dimensions"):
            split_model_spec(wrong)
