"""Folders of sentence-transformers: the library's own embeddings of texts, and no images."""

import json

import numpy as np
import pytest
import torch

from tests.models.huggingface_fixture import CAPTIONS, clip_folder, sentence_folder
from vlm.errors import UsageError
from vlm.models.load import load_model, load_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    return sentence_folder(tmp_path_factory.mktemp("sentence") / "model")


@pytest.mark.parametrize("prompt", ["", "query: "])
def test_texts_have_the_embeddings_of_sentence_transformers(folder, prompt):
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config |= {"prompts": {"query": prompt}, "default_prompt_name": "query"} if prompt else {"prompts": {}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(CAPTIONS, normalize_embeddings=True)
    ours = load_model(str(folder), device="cpu")
    assert np.abs(ours.embed_texts(CAPTIONS).numpy() - theirs).max() <= 1e-5
    assert ours.embedding_size == theirs.shape[1]


def test_the_prompt_is_part_of_the_fingerprint(folder):
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    fingerprints = set()
    for prompt in ("a: ", "b: "):
        config |= {"prompts": {"query": prompt}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
        fingerprints.add(load_model(str(folder), device="cpu").fingerprint)
    assert len(fingerprints) == 2


def test_images_and_what_needs_an_image_tower_are_refused_in_a_sentence(folder):
    model = load_model(str(folder), device="cpu")
    assert not model.embeds_images
    with pytest.raises(UsageError, match="embeds texts only; images need another"):
        model.embed_images(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    with pytest.raises(UsageError, match="no temperature"):
        _ = model.logit_scale
    with pytest.raises(UsageError, match="embeds texts only; give a model with an image tower"):
        load_network(str(folder), device="cpu")


def test_one_around_clip_is_clip(tmp_path):
    clip_folder(tmp_path / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert load_model(str(tmp_path), device="cpu").embeds_images
