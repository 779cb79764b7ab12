from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.index.ids import UidAssigner, shorten_shard_names

Shard = Callable[..., str]


def test_a_key_that_is_unique_is_the_uid(shards: list[str]) -> None:
    assert UidAssigner.for_shards(shards).name(1, 0, "10") == "10"


def test_captions_are_numbered(shards: list[str]) -> None:
    assert UidAssigner.for_shards(shards).name(1, 0, "10", 2) == "10#2"


def test_samples_that_share_a_key_are_told_apart_by_shard_and_number(
    tmp_path: Path, write_shard: Shard, paint: Callable[..., bytes]
) -> None:
    sample = [("a", paint("red"), ["x"]), ("b", paint("red"), ["x"]), ("a", paint("blue"), ["x"])]
    paths = [write_shard(tmp_path / folder / "0.tar", rows) for folder, rows in (("l", sample), ("r", sample[:2]))]
    namer = UidAssigner.for_shards(paths)
    names = [namer.name(0, 0, "a"), namer.name(0, 2, "a"), namer.name(1, 0, "a"), namer.name(0, 1, "b")]
    assert names == ["a@l/0:0", "a@l/0:2", "a@r/0", "b@l/0"]


def test_a_key_that_looks_like_the_name_of_a_shared_one_does_not_meet_it(
    tmp_path: Path, write_shard: Shard, paint: Callable[..., bytes]
) -> None:
    keys = ["a", "b@0:1", "a", "a@0:2"]
    namer = UidAssigner.for_shards([write_shard(tmp_path / "0.tar", [(key, paint("red"), ["x"]) for key in keys])])
    names = [namer.name(0, number, key) for number, key in enumerate(keys)]
    assert names == ["a@0:0", "b@0:1", "a@0:2", "a@0:2@0"]


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (["/a/0.tar"], ["0"]),
        (["/a/0.tar", "/a/1.tar"], ["0", "1"]),
        (["/a/x/0.tar", "/b/x/0.tar"], ["a/x/0", "b/x/0"]),
        (["s3://one/0.tar", "/one/0.tar"], ["s3://one/0", "/one/0"]),
        ([], []),
    ],
)
def test_shards_are_named_as_shortly_as_they_can_be(shards: list[str], names: list[str]) -> None:
    assert shorten_shard_names(shards) == names


def test_a_shard_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"/a/0.tar is given 2 times"):
        shorten_shard_names(["/a/0.tar", "/a/0.tar"])
