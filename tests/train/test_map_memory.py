"""What a locked trunk gives is kept by the pixels it was given."""

from typing import Any

import pytest
import torch

from vlm.errors import UsageError
from vlm.models.model import build_network, model_config
from vlm.train.feature_cache import keep_evaluated_features, keep_locked_features
from vlm.train.run import train
from vlm.train.task import lock_tower

CAPTIONER = "timm:test_byobnet,image_size=32+coca:32x1x1@16"


def network_of() -> Any:
    torch.manual_seed(0)
    network: Any = build_network(model_config(CAPTIONER)).train()
    lock_tower(network, "image")
    return network


def pixels_of(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def count_runs(network: Any) -> list[int]:
    runs: list[int] = []
    network.visual.trunk.stem.register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    return runs


def test_a_view_that_comes_again_costs_no_pass_and_gives_the_same():
    network, plain = network_of(), network_of()
    keep_locked_features(network, 0.01)
    runs = count_runs(network)
    batches = [pixels_of(1), pixels_of(2), torch.cat([pixels_of(1)[2:], pixels_of(3)[:1], pixels_of(2)[:1]])]
    for pixels in batches:
        assert torch.allclose(network.encode_image(pixels), plain.encode_image(pixels), atol=1e-6)
    with torch.inference_mode():
        network.encode_image(pixels_of(4))
    # of the third batch one view alone was new
    assert runs == [4, 4, 1, 4]
    network.encode_image(pixels_of(4)).sum().backward()
    assert runs == [4, 4, 1, 4]
    assert network.visual.head.proj.weight.grad is not None


def test_what_finds_no_room_is_computed_each_time():
    network = network_of()
    keep_locked_features(network, 1e-9)
    runs = count_runs(network)
    first = network.encode_image(pixels_of(1))
    assert torch.equal(network.encode_image(pixels_of(1)), first)
    assert sum(runs) >= 8


def test_features_of_bfloat16_are_stored_and_read_again(tmp_path):
    path = tmp_path / "visual.npz"
    outputs: list[torch.Tensor] = []
    for _ in range(2):
        torch.manual_seed(0)
        network: Any = build_network(model_config("timm:test_byobnet,image_size=32+bag@8"))
        lock_tower(network, "image")
        [features] = keep_evaluated_features(network, {"visual": path})
        runs = count_runs(network)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(network.visual.embed(pixels_of(1)).float())
        features.save()
    assert not runs
    assert torch.equal(*outputs)


def test_only_a_tower_that_is_locked_whole_is_kept():
    network: Any = build_network(model_config(CAPTIONER))
    with pytest.raises(UsageError, match="--lock image"):
        keep_locked_features(network, 1.0)
    for other in ("tiny", "timm:test_byobnet+bag@16"):
        with pytest.raises(UsageError, match="--cache-features"):
            keep_locked_features(build_network(model_config(other)), 1.0)


def test_a_run_with_kept_features_gives_the_weights_of_one_without(configure):
    settings: Any = {
        "steps": 3,
        "batch_size": 8,
        "objective": {"objective": "clip + 2*caption", "label_smoothing": 0.1},
        "loader": {"crop_scale": (1.0, 1.0)},
    }
    weights: list[dict[str, torch.Tensor]] = []
    for gigabytes in (0.0, 0.1):
        model = {"architecture": CAPTIONER, "lock": "image", "locked_features_gb": gigabytes, "dropout": 0.1}
        config = configure(f"run-{gigabytes}", model=model, **settings)
        train(config)
        from vlm.models.load import load_model

        weights.append(load_model(config.run).network.state_dict())
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-6), name
