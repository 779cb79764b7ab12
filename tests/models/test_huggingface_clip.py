"""Dual encoders of transformers: the same ids, embeddings and fingerprints as there, in the model folders of here."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tests.models.huggingface_fixture import CAPTIONS, FOLDERS, siglip2_folder
from vlm.cli.main import main
from vlm.data.tokenizers import HuggingFaceTokenizer
from vlm.errors import UsageError, VlmError
from vlm.models.load import load_model, load_network, save_model_folder

TEXTS = [*CAPTIONS, "many words that do not fit into the context of so small a model and are therefore cut " * 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("huggingface")
    return {family: build(root / family) for family, build in FOLDERS.items()}


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def embeddings(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output


@torch.inference_mode()
def their_texts(folder, model):
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    # transformers 4 also gives token types, which these models do not take
    used = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    rows = embeddings(model.get_text_features(**used))
    return inputs["input_ids"], torch.nn.functional.normalize(rows, dim=-1)


@torch.inference_mode()
def their_images(folder, model, images):
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    rows = embeddings(model.get_image_features(**processor(images=images, return_tensors="pt")))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("family", FOLDERS)
def test_texts_have_the_ids_and_embeddings_of_transformers(folders, family):
    theirs = AutoModel.from_pretrained(folders[family]).eval()
    ours = load_model(str(folders[family]), device="cpu")
    ids, rows = their_texts(folders[family], theirs)
    assert np.array_equal(ours.tokenizer.encode(TEXTS), ids.numpy())
    assert (ours.embed_texts(TEXTS) - rows).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FOLDERS)
def test_images_have_the_embeddings_of_transformers(folders, family):
    theirs = AutoModel.from_pretrained(folders[family]).eval()
    ours = load_model(str(folders[family]), device="cpu")
    # squares, which NaFlex leaves squares
    images = [noise(32, 32), noise(96, 96, 1)]
    ours_rows = ours.embed_images(torch.from_numpy(np.stack([ours.view(png(image)) for image in images])))
    assert (ours_rows - their_images(folders[family], theirs, images)).abs().max() <= 1e-5
    assert ours.embedding_size == ours_rows.shape[1]


@pytest.mark.parametrize("family", FOLDERS)
def test_pooled_features_are_projected_to_the_embedding_where_there_is_a_projection(folders, family):
    ours = load_model(str(folders[family]), device="cpu")
    pixels = torch.from_numpy(np.stack([ours.view(png(noise(32, 32)))]))
    pooled = ours.pool_images(pixels)
    trunk = ours.network.trunk
    with torch.inference_mode():
        projected = trunk.visual_projection(pooled) if "clip" in family else pooled
    assert pooled.norm(dim=-1).item() != pytest.approx(1, abs=0.01)
    assert torch.allclose(torch.nn.functional.normalize(projected, dim=-1), ours.embed_images(pixels), atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip"])
@pytest.mark.parametrize("size", [(40, 64), (65, 33), (200, 90), (32, 35), (37, 32)])
def test_the_view_is_their_image_processor_on_pillow(folders, family, size):
    """Exactly; and within 16 of 255 levels of noise (one on average) their default, which resizes with torchvision."""
    ours = load_model(str(folders[family]), device="cpu")
    image = noise(*size)
    view = ours.view(png(image)).astype(np.float64)
    for backend, bound in (("pil", 1e-3), ("torchvision", 16)):
        processor: Any = AutoImageProcessor.from_pretrained(folders[family], backend=backend)
        theirs = processor(images=image, return_tensors="pt", do_normalize=False)["pixel_values"][0].double() * 255
        difference = np.abs(view - theirs.numpy())
        assert difference.max() <= bound
        assert difference.mean() <= 1


def test_a_naflex_image_that_is_no_square_becomes_one(folders):
    """Theirs keeps the proportions, with fewer patches on one side; ours is squeezed (docs/api.md says so)."""
    theirs = AutoModel.from_pretrained(folders["siglip2"]).eval()
    ours = load_model(str(folders["siglip2"]), device="cpu")
    image = noise(40, 20)
    squeezed = ours.embed_images(torch.from_numpy(ours.view(png(image)))[None])
    same = their_images(folders["siglip2"], theirs, [image.resize((32, 32), Image.Resampling.BILINEAR)])
    assert (squeezed - same).abs().max() <= 1e-5


def test_siglips_underscore_is_left_out_as_in_transformers_and_a_space_in_open_clip(folders):
    ours = load_model(str(folders["siglip"]), device="cpu").tokenizer
    through_open_clip = HuggingFaceTokenizer(str(folders["siglip"]), ours.context_length, {"clean": "canonicalize"})
    joined = ours.encode(["hello_world", "helloworld"])
    parted = through_open_clip.encode(["hello_world", "hello world"])
    assert np.array_equal(joined[0], joined[1])
    assert np.array_equal(parted[0], parted[1])
    assert not np.array_equal(joined[0], parted[0])
    assert ours.fingerprint() != through_open_clip.fingerprint()


def test_a_tokenizer_that_gives_a_mask_has_it_used(tmp_path):
    folder = siglip2_folder(tmp_path / "masked", has_mask=True)
    theirs = AutoModel.from_pretrained(folder).eval()
    _, rows = their_texts(folder, theirs)
    assert (load_model(str(folder), device="cpu").embed_texts(TEXTS) - rows).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FOLDERS)
def test_it_becomes_a_model_folder_with_the_same_space(folders, family, tmp_path):
    model = load_network(str(folders[family]), device="cpu")
    save_model_folder(tmp_path / "saved", model, inputs={})
    again = load_model(str(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))


def test_both_towers_get_gradients(folders):
    network = load_model(str(folders["siglip"]), device="cpu").network.train()
    outputs = network(torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.long))
    (outputs["image_features"] @ outputs["text_features"].T * outputs["logit_scale"]).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter is not network.logit_bias)


def test_another_kind_of_model_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match=r"'bert'.*clip, metaclip_2, siglip, siglip2"):
        load_model(str(tmp_path))


def test_missing_weights_and_missing_preprocessing_are_named(tmp_path):
    folder = FOLDERS["siglip"](tmp_path / "a")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="does not say how images are prepared"):
        load_model(str(folder))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(VlmError, match="cannot be read"):
        load_model(str(folder))


def test_weights_that_leave_out_a_layer_are_refused_rather_than_drawn(tmp_path):
    folder = FOLDERS["clip"](tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmError, match=r"lack \d+ tensors of its configuration, such as text_model\."):
        load_model(str(folder))


def test_shards_are_embedded_indexed_and_searched_with_it(folders, scene_shards, tmp_path, capsys):
    """As with any other MODEL, by its folder."""
    steps = [
        ["embed", folders["siglip"], scene_shards / "val", tmp_path / "embeddings", "--workers", "0"],
        ["index", "build", tmp_path / "embeddings", tmp_path / "index"],
        ["search", tmp_path / "index", "a red circle", "--top", "3", "--json"],
    ]
    for step in steps:
        assert main([str(word) for word in step]) == 0
        printed = capsys.readouterr().out
    hits = json.loads(printed)
    assert len(hits["hits"] if isinstance(hits, dict) else hits[0]["hits"]) == 3


def test_it_can_be_trained_on(folders, scene_shards, tmp_path, capsys):
    flags = ["--start-from", folders["clip"], "--steps", "2", "--batch-size", "8", "--workers", "0"]
    words = ["train", "tiny", "--data", scene_shards / "train", "--run", tmp_path / "run", *flags]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    trained = load_model(str(tmp_path / "run"), device="cpu")
    assert trained.fingerprint != load_model(str(folders["clip"]), device="cpu").fingerprint
    assert trained.embed_texts(["a"]).shape == (1, 12)
