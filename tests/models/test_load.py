import dataclasses
import io
import json
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.models.load import load_model, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config

TEXTS = ["a small red circle", "two large blue stars on a white background"]


@pytest.fixture(params=["micro", "micro-coca"])
def model(request, scene_tokenizer):
    tokenizer = open_tokenizer(str(scene_tokenizer), 24)
    config = fit_to_tokenizer(model_config(request.param), tokenizer)
    torch.manual_seed(0)
    return VisionLanguageModel(
        name="test",
        network=build_network(config).eval(),
        config=config,
        view=EvalTransform(size=32),
        tokenizer=tokenizer,
    )


@pytest.fixture
def pil_image():
    noise = torch.randint(0, 255, (57, 41, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def encoded(pil_image):
    file = io.BytesIO()
    pil_image.save(file, "PNG")
    return file.getvalue()


def test_open_clip_loads_the_folder_and_gives_the_same_embeddings(model, pil_image, tmp_path):
    save_model_folder(tmp_path, model, inputs={})
    opened: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs, _, preprocess = opened
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image(preprocess(pil_image)[None], normalize=True)
        text = theirs.encode_text(torch.from_numpy(model.tokenizer.encode(TEXTS)), normalize=True)
    ours = model.embed_images(torch.from_numpy(model.view(encoded(pil_image)))[None])
    assert torch.allclose(ours, image, atol=1e-5)
    assert torch.allclose(model.embed_texts(TEXTS), text, atol=1e-5)


def test_a_loaded_model_is_the_saved_one(model, tmp_path):
    save_model_folder(tmp_path, model, inputs={})
    loaded = load_model(str(tmp_path))
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))


def test_the_fingerprint_follows_weights_view_and_tokenizer(model):
    before = model.fingerprint
    changed = VisionLanguageModel(
        **{
            "name": "other",
            "network": model.network,
            "config": model.config,
            "tokenizer": model.tokenizer,
            "view": EvalTransform(size=32, mean=(0.5, 0.5, 0.5)),
        }
    )
    assert changed.fingerprint != before
    with torch.no_grad():
        model.network.logit_scale.add_(0.1)
    same_place = VisionLanguageModel(
        name="x", network=model.network, config=model.config, view=model.view, tokenizer=model.tokenizer
    )
    assert same_place.fingerprint != before


def test_changed_weights_do_not_pass_as_the_saved_model(model, tmp_path):
    save_model_folder(tmp_path, model, inputs={})
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(VlmError, match="not what its manifest says"):
        load_model(str(tmp_path))


def test_a_model_of_rectangular_images_is_refused_by_their_size(model, tmp_path):
    model.config["vision_cfg"]["pos_embed_type"] = "sin_cos_2d"  # whose tower cannot even be built
    save_model_folder(tmp_path, dataclasses.replace(model, network=build_network(model.config)), inputs={})
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = config["preprocess_cfg"]["size"] = [32, 48]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="The model takes 32×48 images; only square ones are supported"):
        load_model(str(tmp_path), device="cpu")


def test_damaged_weights_are_named(model, tmp_path):
    save_model_folder(tmp_path, model, inputs={})
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(VlmError, match="cannot be read"):
        load_model(str(tmp_path))


def test_a_fresh_decoder_has_no_uninitialised_weights(scene_tokenizer):
    config = fit_to_tokenizer(model_config("micro-coca"), open_tokenizer(str(scene_tokenizer), 24))
    torch.manual_seed(0)
    first = build_network(config).get_parameter("text_decoder.text_projection")
    torch.manual_seed(0)
    again = build_network(config).get_parameter("text_decoder.text_projection")
    assert torch.equal(first, again)
    assert 0.5 < float(first.detach().std()) * first.shape[0] ** 0.5 < 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "There is no model 'nowhere'"),
        ("ViT-B-32:laion3b", "it has for example ViT-B-32:"),
        (".", "holds no model"),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_what_is(spec, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_model(spec)


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UsageError, match="ViT-B-32"):
        model_config("ViT-B-31")


def test_pretrained_weights_out_of_reach_are_an_error_with_the_reason():
    with pytest.raises(VlmError, match="neither cached nor within reach"):
        load_model("ViT-B-32:laion2b_s34b_b79k")


def test_captions_end_at_the_end_token_and_greedy_is_the_likeliest(model):
    if not model.can_caption:
        with pytest.raises(UsageError, match="no caption decoder"):
            model.caption_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        return
    from vlm.models.caption_search import write_captions
    from vlm.models.decoding_options import DecodingOptions

    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = write_captions(model.network, pixels, model.tokenizer, DecodingOptions()).tokens[:, 0]
        logits = model.network(pixels, rows)["logits"]
    tokenizer = model.tokenizer
    logits[:, :, [tokenizer.start_token, tokenizer.pad_token]] = -torch.inf
    for row, scores in zip(rows, logits, strict=True):
        for place in range(1, len(row)):
            assert int(row[place]) == int(scores[place - 1].argmax())
            if int(row[place]) == tokenizer.end_token:
                break
