import pytest
import torch

from vlm.errors import VlmError
from vlm.train.averaging import WeightedMean


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(4, 3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
        "count": torch.tensor(seed),
    }


def test_the_mean_of_two_is_their_mean():
    one, two = weights(1), weights(2)
    mean = WeightedMean().plus(one).plus(two).weights()
    for name in ("matrix", "scale"):
        assert torch.equal(mean[name], ((one[name].double() + two[name].double()) / 2).float())
        assert mean[name].dtype == torch.float32


def test_shares_count_by_their_proportions():
    by_hand = (0.7 * weights(1)["matrix"].double() + 0.3 * weights(2)["matrix"].double()).float()
    mean = WeightedMean().plus(weights(1), 0.7).plus(weights(2), 0.3).weights()
    same = WeightedMean().plus(weights(1), 7.0).plus(weights(2), 3.0).weights()
    assert torch.allclose(mean["matrix"], by_hand, atol=1e-7)
    assert torch.allclose(same["matrix"], by_hand, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_alone_comes_out_bit_for_bit_with_its_zeros_signs_and_infinities(dtype):
    own = weights(1, dtype)
    own["matrix"][0] = torch.tensor([-0.0, torch.inf, 1e-38], dtype=dtype)
    for mean in (WeightedMean().plus(own), WeightedMean().plus(weights(2, dtype), 0.0).plus(own).plus(own, 0.0)):
        for name, value in mean.weights().items():
            assert value.dtype == own[name].dtype
            assert torch.equal(value, own[name])
            assert torch.equal(torch.signbit(value), torch.signbit(own[name]))


def test_a_thousand_times_the_same_is_the_same():
    mean = WeightedMean()
    for _ in range(1000):
        mean = mean.plus(weights(1))
    assert torch.equal(mean.weights()["matrix"], weights(1)["matrix"])


def test_small_weights_beside_large_ones_are_not_lost():
    large, small = {"w": torch.tensor([1e8])}, {"w": torch.tensor([1.0])}
    opposite = {"w": torch.tensor([-1e8])}
    mean = WeightedMean().plus(large).plus(small).plus(opposite).weights()
    assert mean["w"].item() == pytest.approx(1 / 3)


def test_whole_numbers_are_those_of_the_largest_share():
    mean = WeightedMean().plus(weights(1), 0.2).plus(weights(2), 0.4).plus(weights(3), 0.4)
    assert mean.weights()["count"].item() == 2


def test_adding_leaves_the_mean_as_it_was():
    one = WeightedMean().plus(weights(1))
    one.plus(weights(2))
    assert torch.equal(one.weights()["matrix"], weights(1)["matrix"])


def test_weights_of_another_network_are_refused_by_name():
    with pytest.raises(VlmError, match="differ in scale"):
        WeightedMean().plus(weights(1)).plus({"matrix": torch.zeros(4, 3), "count": torch.tensor(1)})
    with pytest.raises(VlmError, match="differ in matrix"):
        WeightedMean().plus(weights(1)).plus(weights(2) | {"matrix": torch.zeros(1, 3)})
