"""Fitting a poly-encoder to frozen towers whose cosine does not see what the captions say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vlm
from tests.random_model import random_model
from vlm.cli.main import main
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace, EmbeddingsWriter, Origin
from vlm.index.reranker_fit import FitOptions, fit_poly_encoder, nearest_candidates, read_rows
from vlm.models.load import load_model, save_model_folder
from vlm.models.poly_encoder import FittedPolyEncoder, PolyEncoder, PolyEncoderSize, save_poly_encoder
from vlm.service.search import Query, SearchService

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
SHAPES = ["star", "circle", "square", "triangle", "heart"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request) -> tuple[Path, Path]:
    """A model folder with a random bag of words, and embeddings in which a number each says colour and shape."""
    tokenizer = open_tokenizer(str(request.getfixturevalue("scene_tokenizer")), 24)
    root = tmp_path_factory.mktemp("reranker")
    model = random_model("timm:test_vit+bag@24", tokenizer)
    save_model_folder(root / "model", model, inputs={})
    loaded = load_model(str(root / "model"))
    rng = np.random.default_rng(0)
    dimension = loaded.embedding_size
    vectors, origins = [], []
    for number in range(200):
        colour, shape = rng.integers(0, len(COLOURS)), rng.integers(0, len(SHAPES))
        vector = rng.normal(scale=0.1, size=dimension)
        vector[colour] += 1
        vector[len(COLOURS) + shape] += 1
        vectors.append(vector / np.linalg.norm(vector))
        caption = f"a {COLOURS[colour]} {SHAPES[shape]}"
        origins.append(
            Origin(
                uid=f"u{number}",
                key=f"{number}",
                shard="/nowhere/0.tar",
                number=number,
                image_offset=0,
                image_size=0,
                caption_number=None,
                captions={"en": (caption, f"{caption}.")},
                metadata={},
            )
        )
    space = EmbeddingSpace(
        model=str(root / "model"), fingerprint=loaded.fingerprint, dimension=dimension, modality="image"
    )
    writer = EmbeddingsWriter(root / "vectors", space=space, identity={})
    writer.add("/nowhere/0.tar", np.array(vectors, np.float32), origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    return root / "model", root / "vectors"


def test_candidates_are_the_own_image_and_the_nearest_that_do_not_share_the_caption(folders):
    model = load_model(str(folders[0]))
    rows = read_rows(Embeddings.open(folders[1]), FitOptions())
    assert len(rows.captions) == 400
    candidates = nearest_candidates(model, rows, 60)
    cosines = model.embed_texts(rows.captions) @ rows.images.T
    are_near = []
    for number in range(0, 400, 20):
        own = int(rows.image_of[number])
        alike = {int(image) for image in rows.image_of[rows.groups == rows.groups[number]]}
        others = [image for image in cosines[number].argsort(descending=True).tolist() if image not in alike]
        are_near.append(int((cosines[number, others] > cosines[number, own]).sum()) < 60)
        assert candidates[number].tolist() == [own if are_near[-1] else -1, *others[:59]]
    assert 0 < sum(are_near) < 20


def test_a_fit_finds_what_the_cosine_does_not_and_a_search_uses_it(folders, tmp_path, capsys):
    model_folder, vectors = folders
    out = tmp_path / "reranker"
    before = {name: value.clone() for name, value in load_model(str(model_folder)).network.state_dict().items()}
    words = ["index", "fit-reranker", str(vectors), str(out), "--epochs", "12", "--held-out", "0.3", "--json"]
    assert main([*words, "--learning-rate", "0.02", "--candidates", "200", "--codes", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["after"]["mrr"] > 2 * shown["before"]["mrr"]
    after = load_model(str(model_folder)).network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    build_index(vectors, tmp_path / "index")
    service = SearchService.open(tmp_path / "index", rerank_spec=str(out))
    plain = service.search(Query(texts=("a red star",), top=200))
    result = service.search(Query(texts=("a red star",), top=200, rerank_top=150))
    assert {hit.uid for hit in result.hits[:150]} == {hit.uid for hit in plain.hits[:150]}
    scores = [hit.likelihood for hit in result.hits[:150]]
    assert scores == sorted(scores, reverse=True)
    assert [hit.uid for hit in result.hits[150:]] == [hit.uid for hit in plain.hits[150:]]

    def mean_place(hits):
        return np.mean([place for place, hit in enumerate(hits[:150]) if hit.entry.captions["en"][0] == "a red star"])

    assert mean_place(result.hits) < mean_place(plain.hits)
    assert result.rerank_milliseconds is not None
    # texts that count against it turn the order round
    against = service.search(Query(texts=("a red star",), minus=("a red star",), weights=(1, 2), top=5, rerank_top=5))
    assert [hit.likelihood for hit in against] == sorted((hit.likelihood for hit in against), reverse=True)


def test_the_python_call_writes_what_a_search_uses(folders, tmp_path):
    _, vectors = folders
    summary = vlm.fit_reranker(vectors, tmp_path / "reranker", epochs=1, codes=2)
    assert summary.images + summary.held_out_images == 200
    vlm.build_index(vectors, tmp_path / "index", index_type="flat")
    index = vlm.open_index(tmp_path / "index", rerank_model=tmp_path / "reranker")
    assert all(hit.likelihood is not None for hit in index.search("a red star", top=5, rerank_top=5))
    with pytest.raises(vlm.UsageError, match="exists"):
        vlm.fit_reranker(vectors, tmp_path / "reranker")
    with pytest.raises(TypeError, match="'code'"):
        vlm.fit_reranker(vectors, tmp_path / "other", code=2)


def test_a_reranker_of_another_model_is_refused(folders, tmp_path):
    model_folder, vectors = folders
    model = load_model(str(model_folder))
    size = PolyEncoderSize(codes=2, width=24, dimension=model.embedding_size)
    other = FittedPolyEncoder(network=PolyEncoder(size, cosine_weight=1.0), model_fingerprint="x", model="runs/other")
    save_poly_encoder(tmp_path / "other", other, configuration={}, details={})
    build_index(vectors, tmp_path / "index")
    service = SearchService.open(tmp_path / "index", rerank_spec=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="was fitted to runs/other"):
        service.search(Query(texts=("a red star",), rerank_top=5))


def test_what_does_not_fit_is_refused(folders, tmp_path):
    model_folder, vectors = folders
    embeddings = Embeddings.open(vectors)
    model = load_model(str(model_folder))
    with pytest.raises(UsageError, match="codes = 0 is too few"):
        fit_poly_encoder(model, embeddings, FitOptions(codes=0))
    with pytest.raises(UsageError, match="0 images with a caption"):
        fit_poly_encoder(model, embeddings, FitOptions(language="de"))
    other = random_model("timm:test_vit+bag@24", model.tokenizer, seed=1)
    with pytest.raises(UsageError, match="made by another model"):
        fit_poly_encoder(other, embeddings, FitOptions())
