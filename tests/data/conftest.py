import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"

MakeImage = Callable[..., bytes]


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The real pictures beside the repository."""
    if not DATASETS.is_dir():
        pytest.skip(f"the real data is not at {DATASETS}")
    return DATASETS


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """Encoded smooth pictures, a different one for each number."""

    def make(number: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "JPEG") -> bytes:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, format=kind)
        return file.getvalue()

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of read-only folders are cached away from the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
