import pytest
import torch

from vlm.errors import UsageError
from vlm.models.network import build_network, model_config
from vlm.models.short_texts import accept_short_texts


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
    accept_short_texts(network)
    assert torch.allclose(encode(network, short_rows()[:, :8]), whole, atol=1e-6)
    assert torch.allclose(encode(network, short_rows()), whole, atol=1e-6)


@pytest.mark.parametrize(("name", "why"), [("micro-coca", "class token"), ("micro", "adds all positions")])
def test_networks_that_need_the_whole_row_are_refused(name, why):
    with pytest.raises(UsageError, match=why):
        accept_short_texts(build_network(model_config(name)))
