"""Relations: equal captions and near-duplicate images of shards, neighbours, and their file."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm.cli.main import main
from vlm.data.sample_relations import read_relations, relate_samples, write_relations
from vlm.data.tar import open_index
from vlm.errors import UsageError


def write_shard(path, samples):
    """A tar of (image, captions) samples."""
    with tarfile.open(path, "w") as tar:
        for number, (image, captions) in enumerate(samples):
            for name, data in (("jpg", image), ("json", json.dumps({"captions": captions}).encode())):
                entry = tarfile.TarInfo(f"{path.stem}-{number}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(path)


@pytest.fixture
def shards(tmp_path, make_image):
    copy = io.BytesIO()
    original = make_image(1, size=(96, 80))
    Image.open(io.BytesIO(original)).save(copy, format="PNG")
    first = write_shard(
        tmp_path / "a.tar",
        [
            (make_image(0), ["a red jug", "a jug"]),
            (original, {"en": ["a cup"], "de": ["eine Tasse"]}),
            (make_image(2), ["a plate", "a plate"]),
        ],
    )
    second = write_shard(
        tmp_path / "b.tar",
        [
            (make_image(3), {"en": ["a jug"], "de": ["ein Krug"]}),
            (copy.getvalue(), ["a mug"]),
            (b"no image", {"en": ["a bowl"], "de": ["eine Tasse"]}),
        ],
    )
    return [first, second]


def groups(relations):
    """The positions that share each group."""
    members = {}
    for shard in relations.shards:
        for number in range(shard.samples):
            for group in shard.groups_of(number):
                members.setdefault(group, []).append(shard.first + number)
    return sorted(members.values())


def test_equal_captions_and_copies_of_an_image_make_groups(shards):
    assert groups(relate_samples(shards)) == [[0, 3], [1, 4]]
    assert groups(relate_samples(shards, images=False)) == [[0, 3]]
    assert groups(relate_samples(shards, images=False, languages=("de",))) == [[1, 5]]


def test_a_file_holds_what_was_related_and_moved_shards_are_found(shards, tmp_path):
    relations = relate_samples(shards).with_neighbours(
        [open_index(shards[1]).fingerprint] * 2 + [open_index(shards[0]).fingerprint],
        [0, 2, 1],
        np.array([[1, 2], [0, -1], [2, 0]]),
    )
    write_relations(tmp_path / "x.relations", relations)
    again = read_relations(tmp_path / "x.relations")
    assert again.fingerprint == relations.fingerprint != relate_samples(shards).fingerprint
    assert groups(again) == [[0, 3], [1, 4]]
    second, first = again.of_shards(shards[::-1])
    assert (first.first, second.first) == (0, 3)
    # a row is no neighbour of itself
    assert [second.neighbours_of(0), second.neighbours_of(1), second.neighbours_of(2)] == [[5, 1], [], [3]]
    assert first.neighbours_of(1) == [3]


def test_what_does_not_fit_is_refused(shards, tmp_path):
    relations = relate_samples(shards[:1], images=False)
    with pytest.raises(UsageError, match="do not know"):
        relations.of_shards(shards)
    with pytest.raises(UsageError, match="1 of the shards that were embedded"):
        relations.with_neighbours([open_index(shards[1]).fingerprint], [0], np.array([[-1]]))
    path = tmp_path / "x.relations"
    with pytest.raises(UsageError, match="vlm relate SHARDS OUT"):
        read_relations(path)
    write_relations(path, relations)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="is damaged"):
        read_relations(path)


def test_the_verb_writes_counts_and_refuses_other_names(shards, tmp_path, capsys):
    out = tmp_path / "x.relations"
    words = ["relate", "::".join(shards), str(out)]
    assert main([*words, "--workers", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["samples"], shown["grouped_samples"]) == (6, 4)
    assert shown["fingerprint"] == read_relations(out).fingerprint
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "x.txt")]) == 2
    assert "must end in .relations" in capsys.readouterr().err
