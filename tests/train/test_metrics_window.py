import json

import torch

from vlm.train.metrics import WindowMean


def test_the_mean_is_over_the_steps_since_the_last_reading():
    window = WindowMean()
    window.add({"loss": torch.tensor(1.0), "norm": 4.0})
    window.add({"loss": torch.tensor(3.0), "norm": 6.0})
    assert {name: float(value) for name, value in window.read().items()} == {"loss": 2.0, "norm": 5.0}
    window.add({"loss": torch.tensor(7.0)})
    assert {name: float(value) for name, value in window.read().items()} == {"loss": 7.0}
    assert window.read() == {}


def test_a_name_that_some_steps_lack_is_averaged_over_those_that_have_it():
    window = WindowMean()
    window.add({"a": 1.0})
    window.add({"a": 3.0, "b": 5.0})
    assert {name: float(value) for name, value in window.read().items()} == {"a": 2.0, "b": 5.0}


def test_a_window_that_is_saved_and_restored_goes_on_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(7, generator=generator)
    whole, first, second = WindowMean(), WindowMean(), WindowMean()
    for loss in losses:
        whole.add({"loss": loss})
    for loss in losses[:4]:
        first.add({"loss": loss})
    second.restore(json.loads(json.dumps(first.to_values())), torch.device("cpu"))
    for loss in losses[4:]:
        second.add({"loss": loss})
    assert torch.equal(whole.read()["loss"], second.read()["loss"])


def test_a_window_of_one_step_is_that_step():
    loss = torch.tensor(0.1234567)
    window = WindowMean()
    window.add({"loss": loss})
    assert float(window.read()["loss"].float()) == float(loss)
