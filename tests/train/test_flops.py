import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm.models.dropout import PerSampleDropout, PerSampleNoise
from vlm.train.metrics import FlopCounter, SampleFlops


def count_flops(network, inputs) -> SampleFlops:
    """The FLOPs of one sample."""
    sample = FlopCounter(network).sample_flops(inputs)
    assert sample is not None
    return sample


class Named(nn.Module):
    """A module as the student is: inputs and outputs by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return {"features": self.inner(inputs["pixels"])}


def test_a_linear_layer_is_two_operations_a_weight_and_its_gradient_as_many():
    flops = count_flops(Named(nn.Linear(5, 7)), {"pixels": torch.zeros(4, 5)})
    assert flops.forward == 2 * 5 * 7
    assert flops.backward == 2 * 5 * 7  # of the weights; nobody asks for that of the pixels


def test_a_second_layer_passes_its_gradient_on():
    flops = count_flops(
        Named(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))), {"pixels": torch.zeros(4, 5)}
    )
    assert flops.forward == 2 * (5 * 7 + 7 * 3)
    assert flops.backward == 2 * (5 * 7 + 2 * 7 * 3)
    assert flops.total == flops.forward + flops.backward


def test_a_convolution_is_counted_at_every_place():
    flops = count_flops(Named(nn.Conv2d(3, 8, 3, padding=1, bias=False)), {"pixels": torch.zeros(2, 3, 10, 10)})
    assert flops.forward == 2 * 3 * 3 * 3 * 8 * 100


def test_attention_counts_all_pairs_of_places():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    width, length, heads = 8, 6, 2
    inputs = {"pixels": torch.zeros(3, heads, length, width)}
    assert count_flops(Named(Attention()), inputs).forward == 2 * 2 * heads * length * length * width


def test_locked_layers_have_no_gradient_of_their_weights():
    first = nn.Linear(5, 7).requires_grad_(False)
    network = Named(nn.Sequential(first, nn.Linear(7, 3)))
    assert count_flops(network, {"pixels": torch.zeros(4, 5)}).backward == 2 * 7 * 3
    network.requires_grad_(False)
    assert count_flops(network, {"pixels": torch.zeros(4, 5)}).backward == 0


class Recomputing(nn.Module):
    """A block that can compute its activations again, told as timm's and open_clip's are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        self.grad_checkpointing = False

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False) if self.grad_checkpointing else self.layers(x)


def test_recomputation_is_not_counted():
    block = Recomputing()
    plain = count_flops(Named(block), {"pixels": torch.zeros(4, 5)})
    block.grad_checkpointing = True
    assert count_flops(Named(block), {"pixels": torch.zeros(4, 5)}) == plain
    assert block.grad_checkpointing


def test_counting_leaves_everything_as_it_was():
    network = Named(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)))
    network({"pixels": torch.randn(4, 5)})["features"].sum().backward()
    before = copy.deepcopy(network.state_dict())
    gradients = [parameter.grad for parameter in network.parameters()]
    values = [gradient.clone() for gradient in gradients if gradient is not None]
    generator = torch.get_rng_state()
    count_flops(network, {"pixels": torch.ones(4, 5)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(network.parameters(), gradients, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(gradients, values, strict=True) if g is not None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert network.training


def test_dropout_by_sample_is_counted_without_the_numbers_of_the_batch():
    noise = PerSampleNoise(seed=0, rows=torch.arange(64))
    network = Named(nn.Sequential(nn.Linear(5, 7), PerSampleDropout(noise, "x", 0.5)))
    assert count_flops(network, {"pixels": torch.zeros(64, 5)}).forward == 2 * 5 * 7
    assert len(noise.rows) == 64


class Conditional(nn.Module):
    """Asks for a value, which a tensor without data has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) >= 0 else x


def test_a_network_that_looks_at_its_data_is_counted_on_its_own_device():
    assert count_flops(Named(Conditional()), {"pixels": torch.zeros(4, 5)}).forward == 2 * 5 * 7


def test_each_shape_is_counted_once_and_the_batch_is_multiplied():
    counts = FlopCounter(Named(nn.Linear(5, 7)))
    assert counts.of({"pixels": torch.zeros(4, 5)}) == 4 * 4 * 5 * 7
    sequence = counts.of({"pixels": torch.zeros(6, 3, 5)})
    assert sequence == 6 * 3 * 4 * 5 * 7


def test_counts_made_before_a_network_changes_hold_after():
    network = Named(nn.Linear(5, 7))
    counts = FlopCounter(network)
    network.inner = nn.Identity()  # as wrapping for several processes takes the layers apart
    assert counts.of({"pixels": torch.zeros(4, 5)}) == 4 * 4 * 5 * 7


def test_a_network_that_cannot_be_copied_ends_nothing(caplog):
    class Alone(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("only one of me")

    assert FlopCounter(Named(Alone())).sample_flops({"pixels": torch.zeros(4, 5)}) is None
    assert "only one of me" in caplog.text


def test_what_cannot_be_counted_is_said_once_and_ends_nothing(caplog):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 7)

        def forward(self, x):
            raise ValueError("no")

    counts = FlopCounter(Named(Broken()))
    assert math.isnan(counts.of({"pixels": torch.zeros(4, 5)}))
    assert math.isnan(counts.of({"pixels": torch.zeros(4, 5)}))
    assert caplog.text.count("no MFU") == 1


@pytest.mark.slow
def test_clip_takes_what_open_clips_table_says():
    import open_clip

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = open_clip.create_model("ViT-B-32", output_dict=True)

        def forward(self, inputs):
            return self.network(inputs["pixels"], inputs["tokens"])

    inputs = {"pixels": torch.zeros(2, 3, 224, 224), "tokens": torch.ones(2, 77, dtype=torch.long)}
    flops = count_flops(Clip(), inputs)
    assert flops.forward == pytest.approx(14.78e9, rel=0.001)  # docs/model_profile.csv
    assert flops.backward == pytest.approx(2 * flops.forward, rel=0.02)
