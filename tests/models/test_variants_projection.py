import numpy as np
import pytest
import torch

from tests.random_model import random_model
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError
from vlm.models.load import load_model, save_model_folder
from vlm.models.variants import CompatibilityProjection, save_projection

TEXTS = ["a small red circle", "two large blue stars on a white background"]


def make_model(scene_tokenizer, seed=0):
    return random_model("micro", open_tokenizer(str(scene_tokenizer), 24), seed=seed)


def head_for(size, fingerprint, folder, *, old="old", extra=5):
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((size + extra, size)))[0]
    return CompatibilityProjection(
        matrix=torch.from_numpy(matrix.astype(np.float32)), old_dimension=7, old=old, new=fingerprint, model=str(folder)
    )


@pytest.fixture
def new(scene_tokenizer, tmp_path):
    model = make_model(scene_tokenizer)
    save_model_folder(tmp_path / "new", model, inputs={})
    head = head_for(model.embedding_size, model.fingerprint, tmp_path / "new")
    save_projection(tmp_path / "head", head, configuration={}, details={})
    return model


def test_an_upgrade_folder_is_a_model(new, tmp_path):
    model = load_model(str(tmp_path / "head"))
    assert model.embedding_size == new.embedding_size + 5
    assert model.fingerprint not in (new.fingerprint, "old")
    assert model.view == new.view
    images = torch.randint(0, 255, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for ours, theirs in (
        (model.embed_images(images), new.embed_images(images)),
        (model.embed_texts(TEXTS), new.embed_texts(TEXTS)),
        (model.embed_texts([]), torch.zeros(0, new.embedding_size)),
    ):
        assert ours.shape == (len(theirs), model.embedding_size)
        assert torch.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-6)


def test_a_head_may_stand_on_a_head(new, tmp_path):
    below = load_model(str(tmp_path / "head"))
    head = head_for(below.embedding_size, below.fingerprint, tmp_path / "head", extra=2)
    save_projection(tmp_path / "second", head, configuration={}, details={})
    above = load_model(str(tmp_path / "second"))
    assert above.embedding_size == new.embedding_size + 7
    assert torch.allclose(above.embed_texts(TEXTS), below.embed_texts(TEXTS) @ head.matrix.T, atol=1e-6)


def test_the_space_is_of_both_models_and_of_the_matrix(new, tmp_path):
    size = new.embedding_size
    one = head_for(size, new.fingerprint, tmp_path)
    others = [
        head_for(size, new.fingerprint, tmp_path, old="another"),
        head_for(size, "another", tmp_path),
        head_for(size, new.fingerprint, tmp_path, extra=6),
    ]
    assert len({head.fingerprint for head in (one, *others)}) == 4
    assert head_for(size, new.fingerprint, tmp_path / "moved").fingerprint == one.fingerprint


def test_a_model_that_has_changed_is_refused(new, tmp_path, scene_tokenizer):
    (tmp_path / "new" / "manifest.json").unlink()
    save_model_folder(tmp_path / "new", make_model(scene_tokenizer, seed=1), inputs={})
    with pytest.raises(UsageError, match="has changed since the head"):
        load_model(str(tmp_path / "head"))
