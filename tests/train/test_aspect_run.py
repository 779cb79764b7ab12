"""Runs whose images keep their shape."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.test_run import interrupt_after
from vlm.data.transforms import TokenGrid
from vlm.errors import UsageError, VlmError
from vlm.models.load import load_model
from vlm.models.onnx_export import export_onnx
from vlm.service.query import open_export
from vlm.train.run import train

TOWERS = (
    "timm:naflexvit_base_patch16_gap,tokens=12,overrides={'embed_dim':16,'depth':1,'num_heads':2,'patch_size':8}+bag@16"
)
MODEL = {"architecture": TOWERS, "image_size": 0}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A shard of 24 wide, tall and square photos."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(24):
            file = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize(((60, 40), (40, 60), (50, 50))[number % 3]).save(file, format="PNG")
            for name, data in ((f"k{number}.png", file.getvalue()), (f"k{number}.txt", b"a red square")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder


def test_a_run_whose_images_keep_their_shape_resumes_and_its_model_sees_them_so(configure, history, photos):
    options = {"data": str(photos), "batch_size": 10, "steps": 4, "safety": {"checkpoint_every": 2}}
    whole, again = (configure(name, model=MODEL, **options) for name in ("whole", "again"))
    train(whole)
    interrupt_after(again, whole.run, 2)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)

    model = load_model(whole.run)
    assert model.view.grid == TokenGrid(patch=8, tokens=12)
    views: list[torch.Tensor] = []
    for size in ((60, 40), (40, 60)):
        file = io.BytesIO()
        Image.new("RGB", size, "white").save(file, format="PNG")
        views.append(torch.from_numpy(model.view(file.getvalue())))
    assert [tuple((view[0] > 0).sum(dim=axis).max().item() for axis in (0, 1)) for view in views] == [
        (24, 32),
        (32, 24),
    ]
    together = model.embed_images(torch.stack(views))
    assert torch.allclose(together[:1], model.embed_images(views[0][None]), atol=1e-5)
    with pytest.raises(VlmError, match="has no ONNX form"):
        export_onnx(model, photos / "onnx", spec=whole.run, source=None)
    # so of its mirror variant there is none either, by torch or by an export
    with pytest.raises(UsageError, match="images keep their shape there; leave #mirror out"):
        load_model(f"{whole.run}#mirror")
    with pytest.raises(UsageError, match="has no ONNX export"):
        open_export(f"{whole.run}#mirror")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loader": {"decode_on_device": True}}, "--decode-on-device fills squares"),
        ({"model": MODEL | {"resize_mode": "squash"}}, "keep their shape by the tower's tokens="),
        ({"model": MODEL | {"image_size": 96}}, "makes the canvas 32 pixels, not 96"),
    ],
)
def test_what_shows_squares_only_is_refused(configure, photos, changes, reason):
    with pytest.raises(UsageError, match=reason):
        train(configure("run", data=str(photos), batch_size=10, **({"model": MODEL} | changes)))
