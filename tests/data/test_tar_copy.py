import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from tests.data.tar_fixture import tiny_image
from vlm.data.tar import ShardReader
from vlm.train.dataset_reinforcement import copy_with_arrays

CAPTION = json.dumps({"captions": ["one"]}).encode()


def array_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uname = len(data), 12345, "somebody"
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def content(path):
    with tarfile.open(path) as tar:
        return [(entry.name, (tar.extractfile(entry) or io.BytesIO()).read()) for entry in tar]


def copied(url, out, arrays):
    with out.open("wb") as file:
        copy_with_arrays(url, file, iter(arrays))
    return content(out)


FOREIGN = [
    ("README.md", b"not a sample: a sample of its own without known parts"),
    ("./a/b.c.jpg", b"a second dot makes it another extension"),
    ("./a/b.jpg", tiny_image(1)),
    (".hidden", b"no sample at all"),
    ("./a/b.json", CAPTION),
    ("./a/b.cls", b"7"),
    ("größe" * 40 + ".png", tiny_image(2)),
    ("größe" * 40 + ".txt", b"ein Bild"),
    ("last.png", tiny_image(3)),
]


def test_every_file_stays_and_the_arrays_follow_the_last_known_part(tmp_path):
    url = write(tmp_path / "0.tar", FOREIGN)
    assert [ShardReader(url).index[number].key for number in range(4)] == [
        "README",
        "./a/b",
        "größe" * 40,
        "last",
    ]
    arrays = [{}, {"x": np.arange(3)}, {"y": np.ones((2, 2), np.float16), "x": np.arange(2)}, {}]
    found = copied(url, tmp_path / "out.tar", arrays)
    added = [(name, data) for name, data in found if name.endswith(".npy")]
    assert [member for member in found if member not in added] == FOREIGN
    assert [name for name, _ in added] == ["./a/b.x.npy", "größe" * 40 + ".x.npy", "größe" * 40 + ".y.npy"]
    reader = ShardReader(str(tmp_path / "out.tar"))
    assert len(reader) == 4
    assert reader.read(1, arrays=("x",)).arrays["x"].tolist() == [0, 1, 2]
    assert reader.read(2, arrays=("y",)).arrays["y"].dtype == np.float16
    assert reader.read(2).captions == {"": ("ein Bild",)}
    assert reader.read(3).image == tiny_image(3)


def test_times_and_owners_have_no_influence_on_the_bytes(tmp_path):
    url = write(tmp_path / "0.tar", FOREIGN)
    copied(url, tmp_path / "once.tar", [{}] * 4)
    copied(str(tmp_path / "once.tar"), tmp_path / "twice.tar", [{}] * 4)
    assert (tmp_path / "once.tar").read_bytes() == (tmp_path / "twice.tar").read_bytes()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_array_of_the_same_name_is_replaced_wherever_it_stands(tmp_path, place):
    members = [("k.jpg", tiny_image(1)), ("k.json", CAPTION), ("k.other.npy", array_file(np.array([9])))]
    members.insert(place + (place == 2), ("k.x.npy", array_file(np.array([1]))))
    url = write(tmp_path / "0.tar", members)
    found = copied(url, tmp_path / "out.tar", [{"x": np.array([2.5])}])
    assert sorted(name for name, _ in found) == ["k.jpg", "k.json", "k.other.npy", "k.x.npy"]
    arrays = ShardReader(str(tmp_path / "out.tar")).read(0, arrays=("x", "other")).arrays
    assert (arrays["x"].tolist(), arrays["other"].tolist()) == ([2.5], [9])


def test_two_samples_of_one_key_apart_from_each_other_get_their_own(tmp_path):
    members = [("k.jpg", tiny_image(1)), ("l.jpg", tiny_image(2)), ("k.jpg", tiny_image(3))]
    url = write(tmp_path / "0.tar", members)
    copied(url, tmp_path / "out.tar", [{"x": np.array([number])} for number in range(3)])
    reader = ShardReader(str(tmp_path / "out.tar"))
    assert [reader.read(number, arrays=("x",)).arrays["x"].item() for number in range(3)] == [0, 1, 2]


def test_the_arrays_are_taken_to_their_end(tmp_path):
    url = write(tmp_path / "0.tar", [*FOREIGN, ("junk.bin", b"")])
    taken = []

    def arrays():
        for number in range(5):
            taken.append(number)
            yield {"x": np.array([number])}
        taken.append("end")

    with (tmp_path / "out.tar").open("wb") as file:
        copy_with_arrays(url, file, arrays())
    assert taken == [0, 1, 2, 3, 4, "end"]


def test_a_compressed_tar_is_copied_plain_and_of_a_cut_one_the_whole_files(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    plain = write(tmp_path / "0.tar", FOREIGN)
    packed = tmp_path / "1.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    assert copied(str(packed), tmp_path / "out.tar", [{}] * 4) == FOREIGN
    cut = tmp_path / "2.tar"
    with tarfile.open(plain) as tar:
        middle = tar.getmember("last.png").offset_data + 20
    cut.write_bytes((tmp_path / "0.tar").read_bytes()[:middle])
    assert copied(str(cut), tmp_path / "cut.tar", [{}, {"x": np.arange(2)}, {}, {}])[-1][0].endswith(".txt")
    assert len(content(tmp_path / "cut.tar")) == len(FOREIGN)  # one less, one array more
