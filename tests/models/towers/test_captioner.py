"""Captioners over image towers of ours: coca: and cptr:."""

from typing import Any

import pytest
import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.caption_search import write_captions
from vlm.models.caption_state import can_cache
from vlm.models.decoding_options import DecodingOptions
from vlm.models.load import load_model_folder, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, enable_padding_trim, fit_to_tokenizer, model_config
from vlm.models.patch_features import run_image_tower
from vlm.models.towers.tower_registry import set_dropout

NAMES = {
    "coca over a convolution": "timm:test_byobnet,image_size=64+coca:32x1x2@24",
    "cptr": "vit:32x1/16,image_size=64,head_width=16+cptr:32x2@24",
}
WAYS = {
    "greedy": DecodingOptions(max_length=9),
    "beams": DecodingOptions(beams=3, captions=2, max_length=9),
    "sampled": DecodingOptions(sample=True, captions=2, max_length=9),
}


@pytest.fixture
def open_captioner(scene_tokenizer):
    """A function that makes a captioner by the name of its towers."""

    def make(name: str, **dropout: float) -> VisionLanguageModel:
        tokenizer = open_tokenizer(str(scene_tokenizer), 16)
        config = set_dropout(fit_to_tokenizer(model_config(name), tokenizer), **dropout)
        torch.manual_seed(0)
        network: Any = build_network(config).eval()
        with torch.no_grad():
            # so that captions differ from image to image
            for weights in (*network.text_decoder.parameters(), network.visual.memory.proj.weight):
                weights.mul_(2.5)
            network.visual.memory.norm.weight.mul_(4)
        view = EvalTransform(size=config["vision_cfg"]["image_size"])
        return VisionLanguageModel(name="test", network=network, config=config, view=view, tokenizer=tokenizer)

    return make


def pixels_of(model: VisionLanguageModel, number: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    colours = 3 * torch.randn(number, 3, 1, 1, generator=draw)
    return colours + torch.randn(number, 3, model.view.size, model.view.size, generator=draw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_cached_decoding_gives_the_tokens_of_uncached(open_captioner, name, way):
    model = open_captioner(NAMES[name])
    network: Any = model.network.double()
    assert can_cache(network)
    pixels = pixels_of(model).double()
    cached = write_captions(network, pixels, model.tokenizer, WAYS[way], has_attention=True)
    uncached = write_captions(network, pixels, model.tokenizer, WAYS[way], is_cached=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.allclose(cached.log_likelihoods, uncached.log_likelihoods)
    assert len({tuple(row) for row in cached.tokens[:, 0].tolist()}) > 1
    # what was written last was written by looking somewhere, and the embedding is that of the image
    assert cached.attention is not None
    place = len(model.tokenizer.encode([""])[0].nonzero()[0]) - 1
    assert torch.allclose(cached.attention[:, 0, place].sum(dim=-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(cached.image_embeddings, network.encode_image(pixels, normalize=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_captioner_writes_the_same(open_captioner, name, tmp_path):
    model = open_captioner(NAMES[name])
    save_model_folder(tmp_path / "model", model, inputs={})
    loaded = load_model_folder(tmp_path / "model", torch.device("cpu"), torch.float32)
    images = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert loaded.can_caption
    assert loaded.caption_images(images) == model.caption_images(images)
    assert torch.equal(loaded.embed_texts(["two red circles"]), model.embed_texts(["two red circles"]))


def test_words_know_their_place_and_nothing_after_them(open_captioner):
    model = open_captioner(NAMES["cptr"])
    network: Any = model.network
    tokens = torch.from_numpy(model.tokenizer.encode(["two red circles", "red two circles"]))
    _, states = network._encode_text(tokens)
    assert not torch.allclose(states[0, 1], states[1, 2])
    short = network._encode_text(tokens[:, :4])
    assert torch.equal(short[1], states[:, :4])
    # no row depends on its padding, so batches are cut to their longest caption
    assert enable_padding_trim(network)
    assert not enable_padding_trim(open_captioner(NAMES["coca over a convolution"]).network)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_in_every_layer_while_training_and_in_no_weight(open_captioner, name):
    plain, dropping = open_captioner(NAMES[name]), open_captioner(NAMES[name], dropout=0.3)
    assert plain.network.state_dict().keys() == dropping.network.state_dict().keys()
    layers = [module for module in dropping.network.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    blocks = 4 + (1 if name.startswith("coca") else 0)
    # two in each block, and that of the pooled image
    assert len(layers) == 2 * blocks + 1
    tokens = torch.from_numpy(dropping.tokenizer.encode(["two red circles"]))
    pixels = pixels_of(dropping, 1)
    first = dropping.network(pixels, tokens)["logits"]
    assert torch.equal(first, dropping.network(pixels, tokens)["logits"])
    assert not torch.equal(first, dropping.network.train()(pixels, tokens)["logits"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_vit+coca:32x1", "coca:WIDTHxTEXT_LAYERSxDECODER_LAYERS"),
        ("timm:test_vit+cptr:30x1", "multiple of 32"),
        ("timm:test_vit+cptr:32x0", "a layer at least"),
        ("open_clip:ViT-B-32+coca:32x1x1", "gives a decoder no tokens"),
    ],
)
def test_a_captioner_that_cannot_be_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        model_config(name)


def test_the_decoder_attends_to_all_tokens_of_the_trunk(open_captioner):
    model = open_captioner(NAMES["cptr"])
    memory = run_image_tower(model.network, pixels_of(model)).memory
    assert memory is not None
    assert memory.shape == (5, 16, 32)
