"""Results of equal score come by row, for every index type, page and filter, also across segments and after updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.circle_fixture import SPACE, CircleModel, origin, points
from tests.service.paging_helper import pages, uids
from vlm.index.ann.index_types import INDEX_TYPES
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingsWriter
from vlm.index.engine_writer import InsertBatch
from vlm.index.writer import IndexWriter
from vlm.service.query import Query
from vlm.service.search import SearchService

# forty copies of each of ten points, in a random order
DEGREES = np.random.default_rng(2).permutation(np.repeat(np.arange(0, 100, 10.0), 40))


@pytest.fixture(params=list(INDEX_TYPES))
def service(request: pytest.FixtureRequest, tmp_path: Path) -> SearchService:
    """400 rows, a hundred of them deleted, a hundred more inserted into a second segment."""
    writer = EmbeddingsWriter(tmp_path / "vectors", space=SPACE, identity={})
    origins = [origin(f"u{number}", n=number, angle=int(angle)) for number, angle in enumerate(DEGREES)]
    writer.add("/nowhere/0.tar", points(DEGREES.tolist()), origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(tmp_path / "vectors", tmp_path / "index", kind=request.param)
    later = DEGREES[:100]
    inserted = [origin(f"v{number}", n=number, angle=int(angle)) for number, angle in enumerate(later)]
    with IndexWriter(tmp_path / "index") as index_writer:
        index_writer.delete([f"u{number}" for number in range(0, 400, 4)])
        batch = InsertBatch(
            space=SPACE,
            count=100,
            source="",
            shards=("/nowhere/0.tar",),
            blocks=lambda: [points(later.tolist()).astype(np.float16)],
            origins=lambda: inserted,
        )
        index_writer.add(batch)
    model: Any = CircleModel()
    return SearchService.open(tmp_path / "index", load=lambda _: model)


def expected(angles: range) -> list[str]:
    """The uids by angle, then row: those of the first segment before those of the second."""
    found: list[str] = []
    for angle in angles:
        for name, degrees in (("u", DEGREES), ("v", DEGREES[:100])):
            for number in np.flatnonzero(degrees == angle).tolist():
                if name == "v" or number % 4:
                    found.append(f"{name}{number}")
    return found


@pytest.mark.parametrize("is_filtered", [False, True])
def test_few_results_are_the_first_of_many_and_pages_go_on_where_they_end(
    service: SearchService, is_filtered: bool
) -> None:
    query = Query(texts=("0",), where="n in (0, 2, 4, 6) or n > 6 and n < 500" if is_filtered else "")
    order = expected(range(0, 100, 10))
    if is_filtered:
        order = [uid for uid in order if int(uid[1:]) not in (1, 3, 5)]
    for top in (1, 5, 50, 120):
        assert uids(service.search(replace(query, top=top))) == order[:top]
    assert pages(service, replace(query, top=37)) == order
