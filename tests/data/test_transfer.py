import numpy as np
import pytest
import torch

from vlm.data.training_batches import TrainingBatch
from vlm.data.transfer import DeviceAhead


def batches(number):
    for place in range(number):
        yield TrainingBatch(
            images=torch.full((2, 3, 4, 4), place, dtype=torch.uint8),
            tokens=torch.full((2, 5), place),
            keys=("a", "b"),
            drawn=(),
            addresses=(),
            used=(),
            incidents=(),
            arrays={"teacher_text": torch.from_numpy(np.full((2, 3), place, np.float32))},
        )


def values(batch):
    return (batch.images.unique().item(), batch.tokens.unique().item(), batch.arrays["teacher_text"].unique().item())


def test_on_the_cpu_batches_pass_through():
    assert [values(batch) for batch in DeviceAhead(batches(3), torch.device("cpu"))] == [(n, n, n) for n in range(3)]
    assert list(DeviceAhead(batches(0), torch.device("cpu"))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_all_batches_arrive_in_order():
    arrived = list(DeviceAhead((batch.pin_memory() for batch in batches(5)), torch.device("cuda")))
    assert {batch.images.device.type for batch in arrived} == {"cuda"}
    assert [values(batch) for batch in arrived] == [(n, n, n) for n in range(5)]
