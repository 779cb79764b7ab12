"""The shards, the model and the index of the index tests, and an index of points on a circle."""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.service.circle_fixture import SPACE, CircleModel, OpenService, origin, points
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingsWriter, Origin
from vlm.service.search import SearchService

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "index" / "conftest.py"))

model = _SHARED["model"]
make_model = _SHARED["make_model"]
paint = _SHARED["paint"]
write_shard = _SHARED["write_shard"]
shards = _SHARED["shards"]
embeddings = _SHARED["embeddings"]
index = _SHARED["index"]


@pytest.fixture
def open_service(tmp_path: Path) -> OpenService:
    """An index of points on the circle, flat or of the kind asked for, with the origins given or named by number."""

    def make(
        degrees: Sequence[float], origins: Sequence[Origin] = (), *, kind: str = "flat", **wishes: int
    ) -> SearchService:
        writer = EmbeddingsWriter(tmp_path / "vectors", space=SPACE, identity={})
        writer.add(
            "/nowhere/0.tar", points(degrees), list(origins) or [origin(f"u{n}", n=n) for n in range(len(degrees))]
        )
        writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        build_index(tmp_path / "vectors", tmp_path / "index", kind=kind, tuning=TuningParams(**wishes))
        model: Any = CircleModel()
        return SearchService.open(tmp_path / "index", load=lambda _: model)

    return make
