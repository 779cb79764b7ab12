"""Runs whose images are decoded on the device, here the CPU."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.tar_fixture import without_tables
from tests.train.test_run import interrupt_after
from vlm.errors import UsageError
from vlm.train.run import train


@pytest.fixture
def photos(tmp_path) -> Path:
    """A shard of 30 JPEGs, the tables of one of which are gone."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(30):
            file = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((60, 48)).save(file, format="JPEG", quality=95, subsampling=0)
            image = without_tables(file.getvalue()) if number == 11 else file.getvalue()
            for name, data in ((f"k{number}.jpg", image), (f"k{number}.txt", b"a red square")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_decodes_on_the_device_and_accounts_for_what_is_damaged(configure, history, photos, workers):
    runs = [
        configure(f"run-{place}", data=str(photos), batch_size=10, steps=3, loader={"workers": workers} | chosen)
        for place, chosen in (("device", {"decode_on_device": True}), ("workers", {}))
    ]
    there, here = [train(config) for config in runs]
    total = json.loads((Path(runs[0].run) / "ledger.json").read_text())["total"]
    assert (total["asked"], total["seen"], total["replaced"], total["stood_in"]) == (30, 29, 1, 1)
    assert total["corrupt"] == {"unreadable image": 1}
    assert there.bad_samples == here.bad_samples == 1
    first, second = (np.array([loss for _, loss, _ in history(config.run)]) for config in runs)
    assert len(first) == 3
    assert np.abs(first - second).max() < 0.1


def test_a_run_resumed_with_device_decoding_goes_on_as_if_never_stopped(configure, history, photos):
    options = {"data": str(photos), "batch_size": 10, "steps": 4, "safety": {"checkpoint_every": 2}}
    whole, again = (configure(name, loader={"decode_on_device": True}, **options) for name in ("whole", "again"))
    train(whole)
    interrupt_after(again, whole.run, 2)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)
    ledgers = [json.loads((Path(config.run) / "ledger.json").read_text()) for config in (whole, again)]
    assert ledgers[0] == ledgers[1]


def test_where_images_are_decoded_cannot_change_on_resume(configure, photos):
    train(configure("run", data=str(photos), batch_size=10, steps=1))
    changed = configure("run", data=str(photos), batch_size=10, steps=1, loader={"decode_on_device": True})
    with pytest.raises(UsageError, match="decode_on_device: False → True"):
        train(changed, resume=True)
