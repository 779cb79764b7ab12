import pytest
import torch
from torch import nn

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.load import load_model, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, enable_padding_trim, model_config


def encode(network, tokens):
    return network.encode_text(tokens)


def short_rows():
    tokens = torch.zeros(3, 24, dtype=torch.int64)
    for row, length in enumerate((3, 8, 5)):
        tokens[row, :length] = torch.arange(5, 5 + length)
        tokens[row, length - 1] = 299
    return tokens


def test_cut_rows_give_the_vectors_of_whole_ones():
    torch.manual_seed(0)
    network = build_network(model_config("micro") | {"custom_text": True}).eval()
    whole = encode(network, short_rows())
    assert enable_padding_trim(network)
    assert torch.allclose(encode(network, short_rows()[:, :8]), whole, atol=1e-6)
    assert torch.allclose(encode(network, short_rows()), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["micro-coca", "micro"])  # class token at the end; positions of the whole context
def test_networks_that_need_the_whole_row_are_left_alone(name):
    network = build_network(model_config(name))
    assert not enable_padding_trim(network)
    assert not any(layer._forward_pre_hooks for layer in network.modules())


@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"embed_cls": True}])
def test_towers_that_attend_to_padding_or_end_with_a_class_token_get_the_whole_row(changes):
    config = model_config("micro")
    network = build_network(config | {"custom_text": True, "text_cfg": config["text_cfg"] | changes}).eval()
    assert not enable_padding_trim(network, is_trained=False)


def test_towers_whose_padding_is_masked_are_cut():
    torch.manual_seed(0)
    config = model_config("micro")
    changes = {"text_cfg": config["text_cfg"] | {"no_causal_mask": True}}
    network = build_network(config | {"custom_text": True} | changes).eval()
    network.get_submodule("text").use_pad_mask = True  # pyright: ignore[reportArgumentType]
    whole = encode(network, short_rows())
    assert enable_padding_trim(network)
    assert torch.allclose(encode(network, short_rows()[:, :8]), whole, atol=1e-6)


def test_texts_that_pass_through_dropout_stay_whole_in_training_alone():
    network = build_network(model_config("micro") | {"custom_text": True})
    network.get_submodule("text").add_module("drop", nn.Dropout(0.1))
    assert not enable_padding_trim(network)
    assert enable_padding_trim(network, is_trained=False)


def test_a_loaded_model_with_dropout_embeds_short_texts_as_padded_ones(tmp_path):
    config = model_config("timm:test_vit+bag,dropout=0.3@16")
    tokenizer = open_tokenizer("clip", 24)
    view = EvalTransform(size=32)
    built = VisionLanguageModel(
        name="dropping", network=build_network(config), config=config, view=view, tokenizer=tokenizer
    )
    save_model_folder(tmp_path / "model", built, inputs={})
    model = load_model(str(tmp_path / "model"))
    texts = ["a red star", "two blue squares"]
    assert model.trims_padding
    whole = model.network.encode_text(torch.from_numpy(tokenizer.encode(texts)))
    assert torch.allclose(model.embed_texts(texts), nn.functional.normalize(whole, dim=-1), atol=1e-6)
