import numpy as np
import pytest
import torch

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import colour_shards, png, write_tar
from vlm.errors import UsageError, VlmError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, FeatureCache


@pytest.fixture
def colours(tmp_path):
    return open_evaluation_set(colour_shards(tmp_path / "shards"), label="label", name="colours")


def test_images_and_texts_are_embedded_once_for_all_who_ask(tmp_path, colours):
    encoder = ColourEncoder()
    model = EvaluatedModel(encoder, cache=FeatureCache(tmp_path / "features"))
    data, first = model.image_features(colours)
    assert data is colours
    assert first.argmax(axis=1).tolist() == [0, 1, 2]
    # another view of the same images: labels and names do not count
    _, again = model.image_features(open_evaluation_set(str(tmp_path / "shards"), name="another"))
    assert np.array_equal(first, again)
    texts = ["red", "blue", "red"]
    assert model.text_features(texts).argmax(axis=1).tolist() == [0, 2, 0]
    model.text_features(texts)
    assert (encoder.num_images, encoder.num_texts) == (3, 2)

    other = EvaluatedModel(ColourEncoder(), cache=FeatureCache(tmp_path / "features"))
    assert isinstance(other.image_features(colours)[1], np.memmap)
    assert np.array_equal(other.text_features(texts), model.text_features(texts))
    assert (other.encoder.num_images, other.encoder.num_texts) == (0, 0)


def test_another_model_or_set_has_features_of_its_own(tmp_path, colours):
    cache = FeatureCache(tmp_path / "features")
    EvaluatedModel(ColourEncoder(), cache=cache).image_features(colours)
    other = ColourEncoder()
    other.fingerprint = "another"
    EvaluatedModel(other, cache=cache).image_features(colours)
    assert other.num_images == 3
    EvaluatedModel(other, cache=cache).image_features(colours.select([1]))
    assert other.num_images == 4


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("npy", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("npy", lambda data: data[:-4]),
        ("json", lambda data: data[:5]),
        ("json", lambda data: b"[]"),
        ("json", lambda data: b"{}"),
    ],
)
def test_damaged_features_are_computed_again(tmp_path, colours, logged, suffix, damage):
    folder = tmp_path / "features"
    _, whole = EvaluatedModel(ColourEncoder(), cache=FeatureCache(folder)).image_features(colours)
    expected = whole.copy()
    (file,) = folder.glob(f"*.{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    encoder = ColourEncoder()
    _, rows = EvaluatedModel(encoder, cache=FeatureCache(folder)).image_features(colours)
    assert np.array_equal(rows, expected)
    assert encoder.num_images == 3
    assert "are damaged; they are computed again" in logged.text


def test_without_the_file_of_the_checksum_nothing_counts_as_written(tmp_path, colours):
    folder = tmp_path / "features"
    EvaluatedModel(ColourEncoder(), cache=FeatureCache(folder)).image_features(colours)
    next(folder.glob("*.json")).unlink()
    encoder = ColourEncoder()
    EvaluatedModel(encoder, cache=FeatureCache(folder)).image_features(colours)
    assert encoder.num_images == 3
    assert not list(folder.glob("*.part"))


def test_images_that_cannot_be_decoded_leave_the_set_also_from_the_cache(tmp_path, logged):
    tar = write_tar(
        tmp_path / "0.tar", [("a.png", b"nothing"), ("b.png", png("green")), ("b.txt", b""), ("c.png", png("red"))]
    )
    damaged = open_evaluation_set(str(tar))
    for _ in range(2):
        data, rows = EvaluatedModel(ColourEncoder(), cache=FeatureCache(tmp_path / "f")).image_features(damaged)
        assert (data.keys, rows.argmax(axis=1).tolist()) == (("b", "c"), [1, 0])
    assert "1 of 3 images" in logged.text
    nothing = damaged.select([0])
    with pytest.raises(UsageError, match="can be used: "):
        EvaluatedModel(ColourEncoder()).image_features(nothing)


def test_a_diverged_model_is_refused(colours):
    class Diverged(ColourEncoder):
        def embed_images(self, images):
            return torch.full((len(images), 3), torch.nan)

    with pytest.raises(VlmError, match="diverged"):
        EvaluatedModel(Diverged()).image_features(colours)


def test_a_layer_that_the_model_does_not_give_is_refused(colours):
    with pytest.raises(UsageError, match="before their projection"):
        EvaluatedModel(ColourEncoder()).image_features(colours, layer="pooled")
