import contextlib

import numpy as np
import pytest

from tests.data.selection_fixture import select_all
from vlm.data.selection import (
    SelectedShard,
    Selection,
    add,
    intersect_selections,
    read_selection,
    reweight,
    subtract_selection,
    write_selection,
)
from vlm.data.shards import expand_shards
from vlm.errors import UsageError


def selection_of(*times, lineage=()):
    shards = tuple(
        SelectedShard(name=f"{n}.tar", fingerprint=f"f{n}", samples=len(part)) for n, part in enumerate(times)
    )
    return Selection(shards=shards, times=tuple(np.array(part, np.uint16) for part in times), lineage=lineage)


def listed(selection):
    return [part.tolist() for part in selection.times]


def test_a_selection_is_read_as_it_was_written(tmp_path):
    written = selection_of([0, 1, 3], [2], lineage=({"step": "rule", "rule": "size"},))
    write_selection(tmp_path / "a.selection", written)
    found = read_selection(tmp_path / "a.selection")
    assert (listed(found), found.lineage, found.fingerprint) == ([[0, 1, 3], [2]], written.lineage, written.fingerprint)
    assert (found.visits, found.kept, found.samples) == (6, 3, 4)


def test_selections_compose_and_tell_their_lineage():
    one, other = selection_of([1, 2, 0, 1]), selection_of([2, 0, 1, 1], lineage=({"step": "rule"},))
    assert listed(intersect_selections(one, other)) == [[2, 0, 0, 1]]
    assert listed(subtract_selection(one, other)) == [[0, 2, 0, 0]]
    assert listed(add(one, other)) == [[3, 2, 1, 2]]
    assert [step["step"] for step in add(intersect_selections(one, other), other).lineage] == ["and", "plus"]
    assert add(one, other).lineage[0]["lineage"] == [{"step": "rule"}]


def test_a_weight_is_met_on_the_mean_and_repeats_exactly():
    heavy = reweight(selection_of([1] * 10_000), 1.25, seed=3)
    assert set(heavy.times[0].tolist()) == {1, 2}
    assert heavy.visits / 10_000 == pytest.approx(1.25, abs=0.02)
    assert listed(reweight(selection_of([1] * 10_000), 1.25, seed=3)) == listed(heavy)
    assert listed(reweight(selection_of([1, 0, 2]), 2.0)) == [[2, 0, 4]]


def test_times_are_found_by_content_and_unknown_shards_are_refused(scene_shards):
    shards = expand_shards(str(scene_shards / "train"))
    selection = select_all(shards)
    assert [len(times) for times in selection.times_of(shards[::-1])] == [16, 40, 40]
    with pytest.raises(UsageError, match="does not know"):
        selection.times_of(expand_shards(str(scene_shards / "val")))


def test_selections_of_different_shards_are_not_composed():
    with pytest.raises(UsageError, match="different shards"):
        intersect_selections(selection_of([1], [1]), selection_of([1]))


def test_a_damaged_selection_is_refused_or_read_as_it_was(tmp_path):
    path = tmp_path / "a.selection"
    write_selection(path, selection_of([0, 1, 3] * 20, [2] * 9, lineage=({"step": "rule"},)))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        with contextlib.suppress(UsageError):
            found = read_selection(path)
            assert [len(times) for times in found.times] == [shard.samples for shard in found.shards]


def test_times_of_another_length_than_the_tar_are_not_applied(tmp_path, scene_shards):
    (shard, *_) = expand_shards(str(scene_shards / "train"))
    whole = select_all([shard])
    short = Selection(shards=whole.shards, times=(np.ones(3, np.uint16),))
    write_selection(tmp_path / "a.selection", short)
    with pytest.raises(UsageError, match="as many times"):
        read_selection(tmp_path / "a.selection")
    with pytest.raises(UsageError, match="does not know"):
        short.times_of([shard])


@pytest.mark.parametrize("content", [b"", b"not arrow", b"ARROW1" * 40])
def test_what_is_no_selection_is_refused(tmp_path, content):
    path = tmp_path / "a.selection"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="selection"):
        read_selection(path)
    with pytest.raises(UsageError, match="There is no selection"):
        read_selection(tmp_path / "b.selection")
