import pytest
import torch
from torch import nn

from vlm.errors import VlmError
from vlm.models.dropout import (
    PerSampleDropout,
    PerSampleDropPath,
    PerSampleNoise,
    PerSamplePatchDropout,
    use_per_sample_dropout,
)


def noise_of(rows, seed=7):
    return PerSampleNoise(seed=seed, rows=torch.tensor(rows))


def test_a_part_draws_what_the_whole_draws():
    noise = noise_of([10, 11, 12, 13])
    layer = PerSampleDropout(noise, "a", 0.4).train()
    values = torch.ones(4, 5, 6)
    whole = layer(values)
    noise.rows = torch.tensor([12, 13])
    assert torch.equal(layer(values[2:]), whole[2:])


def test_several_rows_of_a_sample_draw_apart_but_with_it():
    noise = noise_of([3, 4])
    layer = PerSampleDropout(noise, "a", 0.5).train()
    whole = layer(torch.ones(6, 40))
    noise.rows = torch.tensor([4])
    assert torch.equal(layer(torch.ones(3, 40)), whole[3:])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("other", [{"seed": 8}, {"rows": [1, 2]}, {"name": "b"}])
def test_seed_sample_and_layer_change_the_draw(other):
    def draw(seed=7, rows=(10, 11), name="a"):
        return PerSampleDropout(noise_of(list(rows), seed), name, 0.5).train()(torch.ones(2, 200))

    assert not torch.equal(draw(), draw(**other))


def test_the_numbers_are_uniform_and_independent():
    noise = noise_of(list(range(5_000_000_000, 5_000_000_000 + 2000)))
    numbers = noise.uniform(12345, 2000, 500, torch.device("cpu")).double()
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    assert float(((counts - 50_000) ** 2 / 50_000).sum()) < 60  # chi-square, 19 degrees of freedom
    centred = numbers - 0.5
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean(), (centred[1:] * centred[:-1]).mean()
    assert max(abs(float(value)) for value in neighbours) < 5e-4
    assert float(numbers.mean(dim=1).std()) == pytest.approx((1 / 12 / 500) ** 0.5, rel=0.1)


def test_dropout_keeps_the_mean_and_rests_when_not_training():
    layer = PerSampleDropout(noise_of(list(range(64))), "a", 0.3)
    values = torch.ones(64, 1000)
    assert float(layer.train()(values).mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(values), values)


def test_paths_drop_whole_rows():
    layer = PerSampleDropPath(noise_of(list(range(1000))), "a", 0.25, rescale=True).train()
    rows = layer(torch.ones(1000, 3, 2)).flatten(1)
    assert rows.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(rows.min(dim=1).values, rows.max(dim=1).values)
    assert float((rows[:, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.05)


def test_patches_stay_in_order_with_their_prefix():
    layer = PerSamplePatchDropout(noise_of([1, 2]), "a", 0.5, prefix_tokens=1).train()
    tokens = torch.arange(9.0).expand(2, 9)[:, :, None]
    kept = layer(tokens)[:, :, 0]
    assert kept.shape == (2, 5)
    assert kept[:, 0].tolist() == [0, 0]
    assert bool((kept.diff(dim=1) > 0).all())
    assert not torch.equal(kept[0], kept[1])


def test_layers_that_drop_are_replaced():
    from timm.layers.drop import DropPath
    from timm.layers.patch_dropout import PatchDropout

    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)),
        DropPath(0.2),
        PatchDropout(0.5, num_prefix_tokens=2),
        nn.Dropout(0),
    )
    assert use_per_sample_dropout(network, noise_of([1])) == 3
    kinds = [type(layer).__name__ for layer in network.modules()]
    assert {"PerSampleDropout", "PerSampleDropPath", "PerSamplePatchDropout"} <= set(kinds)
    patches = network[2]
    assert isinstance(patches, PerSamplePatchDropout)
    assert patches.prefix_tokens == 2


def test_a_wrong_number_of_rows_is_refused():
    with pytest.raises(VlmError, match="5 rows for 2 samples"):
        PerSampleDropout(noise_of([1, 2]), "a", 0.5).train()(torch.ones(5, 3))
