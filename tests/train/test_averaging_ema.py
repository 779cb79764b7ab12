import copy

import pytest
import torch
from torch import nn

from vlm.errors import VlmError
from vlm.train.averaging import EMA


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers.register_buffer("mask", torch.tensor([True, False]))
    return layers.to(dtype)


def move(layers, seed):
    """Weights as after a step: other values in every parameter and buffer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        layers(torch.randn(5, 3, generator=generator).to(layers[0].weight.dtype))


def snapshot(layers):
    return {name: value.clone() for name, value in layers.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_it_is_the_recursion_of_its_definition_with_warm_up():
    layers = network()
    mean = EMA.from_network(0.9, layers)
    expected = {name: parameter.detach().double() for name, parameter in layers.named_parameters()}
    for step in range(1, 120):
        move(layers, step)
        mean.update(layers, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {
            name: decay * expected[name] + (1 - decay) * parameter.detach().double()
            for name, parameter in layers.named_parameters()
        }
    assert (1 + 119) / (10 + 119) > 0.9  # the warm-up is over
    for name, value in expected.items():
        assert torch.allclose(mean.weights[name].double(), value, atol=1e-5)
    for name, value in layers.named_buffers():
        assert torch.equal(mean.weights[name], value)


def test_the_first_step_keeps_two_elevenths_of_the_fresh_weights():
    layers = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layers.weight, 11.0)
    mean = EMA.from_network(0.999, layers)
    nn.init.constant_(layers.weight, 0.0)
    mean.update(layers, 1)
    assert mean.weights["weight"].item() == pytest.approx(2.0)


def test_weights_that_do_not_move_stay_bit_for_bit():
    layers = network()
    before = snapshot(layers)
    mean = EMA.from_network(0.99, layers)
    for step in range(1, 50):
        mean.update(layers, step)
    assert equal(mean.weights, before)


@pytest.mark.parametrize(("dtype", "kept_in"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_mean_is_kept_in_float32_at_least(dtype, kept_in):
    layers = network(dtype=dtype)
    mean = EMA.from_network(0.9999, layers)
    assert mean.weights["0.weight"].dtype == kept_in
    assert mean.weights["1.num_batches_tracked"].dtype == torch.int64
    move(layers, 1)
    mean.update(layers, 100_000)
    assert not torch.equal(mean.weights["0.weight"].to(dtype), layers.get_parameter("0.weight"))


def test_applied_puts_the_mean_in_and_takes_it_out_bit_for_bit():
    layers = network().eval()
    mean = EMA.from_network(0.5, layers)
    move(layers, 1)
    mean.update(layers, 1)
    own, averaged, image = snapshot(layers), copy.deepcopy(mean.weights), torch.ones(2, 3)
    twin = network()
    twin.load_state_dict(mean.weights)
    with mean.swapped_in(layers):
        assert equal(layers.state_dict(), averaged)
        assert torch.equal(layers(image), twin.eval()(image))
        assert not torch.equal(layers.get_parameter("0.weight"), own["0.weight"])
    assert equal(layers.state_dict(), own)
    assert equal(mean.weights, averaged)


def test_applied_takes_the_mean_out_after_an_error_as_well():
    layers = network()
    mean = EMA.from_network(0.5, layers)
    move(layers, 1)
    own = snapshot(layers)
    with pytest.raises(KeyError), mean.swapped_in(layers):
        raise KeyError
    assert equal(layers.state_dict(), own)


def test_what_is_saved_restores_it_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    layers = network()
    straight, resumed = EMA.from_network(0.95, layers), EMA.from_network(0.95, layers)
    for step in range(1, 9):
        move(layers, step)
        straight.update(layers, step)
        resumed.update(layers, step)
        if step == 5:
            save_file(resumed.weights, tmp_path / "average.safetensors")
            resumed = EMA(0.95, load_file(tmp_path / "average.safetensors"))
    assert equal(straight.weights, resumed.weights)


def test_tied_weights_are_averaged_as_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two = nn.Linear(2, 2)
            self.two.weight = self.one.weight

    layers = Tied()
    mean = EMA.from_network(0.9, layers)
    nn.init.constant_(layers.one.weight, 3.0)
    mean.update(layers, 3)
    assert torch.equal(mean.weights["one.weight"], mean.weights["two.weight"])
    with mean.swapped_in(layers):
        assert torch.equal(layers.two.weight, mean.weights["one.weight"])
    assert torch.equal(layers.one.weight, torch.full((2, 2), 3.0))


@pytest.mark.parametrize(
    ("other", "named"), [(nn.Linear(3, 4), "0.weight"), (nn.Sequential(nn.Linear(3, 5)), "0.weight")]
)
def test_the_mean_of_another_network_is_refused_by_name(other, named):
    mean = EMA.from_network(0.9, nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(VlmError, match=named):
        mean.update(other, 1)
    with pytest.raises(VlmError, match="another network"), mean.swapped_in(other):
        pass


def test_the_dict_that_is_saved_stays_the_same_object():
    layers = network()
    mean = EMA.from_network(0.9, layers)
    saved = mean.weights
    move(layers, 1)
    mean.update(layers, 1)
    assert mean.weights is saved
