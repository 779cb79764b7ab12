import pytest
import timm
import torch
from safetensors.torch import save_file

from vlm.errors import UsageError, VlmError
from vlm.models.model import build_network, model_config
from vlm.models.towers.initial_weights import load_initial_weights

TRUNK = "test_efficientnet"


@pytest.fixture(scope="module")
def original():
    """A trained trunk, as timm would save it: with its classifier, every tensor of its own values."""
    torch.manual_seed(1)
    model = timm.create_model(TRUNK, num_classes=10)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def fresh_trunk():
    return timm.create_model(TRUNK, num_classes=0).eval()


def is_same(trunk, original):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.equal(trunk(pixels), original.forward_head(original.forward_features(pixels), pre_logits=True))


def renamed(weights):
    return {f"_layer{number}.{name.rpartition('.')[2]}": value for number, (name, value) in enumerate(weights.items())}


def test_names_that_agree_are_matched_by_name(original, tmp_path):
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    trunk = fresh_trunk()
    loaded = load_initial_weights(trunk, str(tmp_path), "timm:test")
    assert is_same(trunk, original)
    assert loaded.matched == "name"


@pytest.mark.parametrize("wrap", [lambda weights: {"state_dict": weights, "epoch": 3}, lambda weights: {**weights}])
def test_wrappers_of_trainers_are_taken_off(original, tmp_path, wrap):
    torch.save(wrap({f"module.{name}": value for name, value in original.state_dict().items()}), tmp_path / "a.pth")
    trunk = fresh_trunk()
    assert load_initial_weights(trunk, str(tmp_path / "a.pth"), "timm:test").matched == "name"
    assert is_same(trunk, original)


def test_other_names_are_matched_by_order_and_it_is_said(original, tmp_path, logged):
    path = tmp_path / "port.pth"
    torch.save(renamed(original.state_dict()), path)
    trunk = fresh_trunk()
    loaded = load_initial_weights(trunk, str(path), "timm:test")
    assert is_same(trunk, original)
    assert (loaded.source, loaded.matched) == (str(path), "order")
    assert "port.pth names its" in logged.text
    assert "matched by their order" in logged.text


def test_a_shape_at_its_place_that_differs_is_named(original, tmp_path):
    weights = renamed(original.state_dict())
    third = next(name for name, value in weights.items() if value.ndim == 4 and value.shape[2] == 1)
    weights[third] = torch.zeros(7, 7)
    torch.save(weights, tmp_path / "a.pth")
    before = fresh_trunk()
    with pytest.raises(UsageError, match=rf"{third} \(7×7\) there, and .* here"):
        load_initial_weights(before, str(tmp_path / "a.pth"), "timm:test")


def test_shapes_that_agree_do_not_make_a_bias_a_weight(original, tmp_path):
    weights = list(renamed(original.state_dict()).items())
    first = next(number for number, (name, _) in enumerate(weights) if name.endswith("bias"))
    # the weight and the bias of a norm, which have one shape
    weights[first - 1], weights[first] = weights[first], weights[first - 1]
    torch.save(dict(weights), tmp_path / "a.pth")
    with pytest.raises(UsageError, match="does not fit timm:test, by name or by order"):
        load_initial_weights(fresh_trunk(), str(tmp_path / "a.pth"), "timm:test")


def test_another_networks_tensors_do_not_fit(original, tmp_path):
    weights = original.state_dict()
    torch.save(renamed(dict(list(weights.items())[:20])), tmp_path / "short.pth")
    torch.save(renamed(weights | {f"more.{n}": torch.zeros(n + 1) for n in range(3)}), tmp_path / "long.pth")
    save_file(renamed(weights), tmp_path / "sorted.safetensors")
    torch.save(weights | {"conv_stem.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    for name, message in (
        ("short", "ends after"),
        ("long.pth", "5 tensors follow"),
        ("sorted.safetensors", "has no conv_stem.weight"),
        ("shape", "conv_stem.weight has shape 1, and"),
    ):
        file = name if "." in name else f"{name}.pth"
        with pytest.raises(UsageError, match=message):
            load_initial_weights(fresh_trunk(), str(tmp_path / file), "timm:test")


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"not a zip")
    with pytest.raises(VlmError, match=r"bad\.pth cannot be read as weights"):
        load_initial_weights(fresh_trunk(), str(tmp_path), "timm:test")
    (tmp_path / "second.pth").touch()
    with pytest.raises(UsageError, match="holds several files"):
        load_initial_weights(fresh_trunk(), str(tmp_path), "timm:test")
    with pytest.raises(UsageError, match="there are no weights"):
        load_initial_weights(fresh_trunk(), str(tmp_path / "none"), "timm:test")


def test_a_tower_takes_them_by_an_option_of_its_name(original, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(original.state_dict(), path)
    network = build_network(model_config(f"timm:{TRUNK},initial_weights={path}+bag@16"))
    assert is_same(network.visual.get_submodule("trunk").eval(), original)
