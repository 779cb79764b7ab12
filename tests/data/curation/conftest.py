import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS, CurationResult, curate
from vlm.data.curation.score_columns import ScoreColumns

MakeShard = Callable[..., str]


@pytest.fixture
def make_shard(tmp_path, make_image) -> MakeShard:
    """Write a tar of samples given as dicts: key, and if wanted image, captions, or any other metadata."""

    def make(samples, *, name="a.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, given in enumerate(samples):
                metadata = {k: v for k, v in given.items() if k not in ("key", "image")}
                image = given.get("image", make_image(number))
                key = given.get("key", f"s{number:05}")
                for extension, data in (("jpg", image), ("json", json.dumps(metadata).encode())):
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        return str(path)

    return make


def run_rules(shards, *filters, columns=(), **options) -> CurationResult:
    shards = [shards] if isinstance(shards, str | Path) else shards
    return curate(
        [str(shard) for shard in shards],
        [parse_filter(sample_filter, FILTERS) for sample_filter in filters],
        columns=ScoreColumns(columns),
        **options,
    )


@pytest.fixture
def apply() -> Callable[..., CurationResult]:
    """Curate shards by rules as people write them."""
    return run_rules


@pytest.fixture
def times_by() -> Callable[..., list[int]]:
    """The times of all samples after rules."""

    def run(shards, *filters, **options):
        selection = run_rules(shards, *filters, **options).selection
        return [int(times) for part in selection.times for times in part]

    return run
