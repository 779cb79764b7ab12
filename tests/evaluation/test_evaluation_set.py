import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm.data.sources.source import SourceOptions
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set

VIEW = EvalTransform(size=8)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (10, 10), COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def colour_shards(folder, colours=("red", "green", "blue"), *, per_shard=2, cls=None):
    """Shards of images of one colour each, with it in the metadata and the caption, and perhaps a KEY.cls."""
    for first in range(0, len(colours), per_shard):
        members = []
        for number, colour in enumerate(colours[first : first + per_shard]):
            words = {"label": colour, "captions": [colour], "captions_de": [f"{colour} auf Deutsch"]}
            members += [(f"{number}.png", png(colour)), (f"{number}.json", json.dumps(words).encode())]
            if cls:
                members.append((f"{number}.cls", cls[first + number].encode()))
        write_tar(folder / f"{first:05}.tar", members)
    return str(folder)


def batches_of(data, **options):
    return list(data.iter_images(VIEW, **options))


def mean_colours(data, **options):
    return np.concatenate([batch.images.float().mean(dim=(2, 3)).numpy() for batch in batches_of(data, **options)])


def test_shards_are_read_in_order_with_all_that_is_said(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path), label="label", name="colours")
    assert data.labels == (("red",), ("green",), ("blue",))
    assert data.candidates == ["blue", "green", "red"]
    assert data.captions[1] == {"": ("green",), "de": ("green auf Deutsch",)}
    # the keys of the shards repeat, and a row is known by its key
    assert data.keys == ("0", "1", "0 (2)")
    assert mean_colours(data).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert data.image_file(data.rows_by_key["0 (2)"]) == png("blue")


def test_workers_and_shares_give_the_same_images(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path))
    assert np.array_equal(mean_colours(data, workers=1), mean_colours(data))
    for threads in (0, 1, 3):
        batches = batches_of(data, workers=threads, as_arrays=True)
        assert all(isinstance(batch.images, np.ndarray) for batch in batches)
        assert np.array_equal(np.concatenate([batch.images.mean(axis=(2, 3)) for batch in batches]), mean_colours(data))
    shares = [batches_of(data, share=(rank, 2)) for rank in range(2)]
    assert [batch.rows for share in shares for batch in share] == [(0, 1), (2,)]


def test_a_selection_of_rows_keeps_all_columns_parallel(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path), label="label")
    part = data.select([0, 2])
    assert (part.keys, part.labels) == (("0", "0 (2)"), (("red",), ("blue",)))
    assert mean_colours(part).tolist() == [[255, 0, 0], [0, 0, 255]]
    assert part.image_file(1) == png("blue")
    assert part.digest != data.digest
    assert open_evaluation_set(str(tmp_path), limit=2).keys == ("0", "1")
    assert open_evaluation_set(str(tmp_path), limit=9).digest == data.digest


def test_alterations_come_before_the_view_and_change_the_digest(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path))
    seen = []

    def turn_blue(image, key):
        seen.append((key, image.mode, image.size))
        return Image.new("RGB", image.size, COLOURS["blue"])

    blue = data.altered("blue", turn_blue)
    assert mean_colours(blue).tolist() == [[0, 0, 255]] * 3
    assert seen == [("0", "RGB", (10, 10)), ("1", "RGB", (10, 10)), ("0 (2)", "RGB", (10, 10))]
    assert blue.open_image(0).getpixel((0, 0)) == COLOURS["blue"]
    assert blue.digest != data.digest
    # the set it was made from is as it was
    assert mean_colours(data)[0].tolist() == [255, 0, 0]


def test_the_layout_of_clip_benchmark_is_read(tmp_path):
    colour_shards(tmp_path / "test", cls=["0", "[1, 2]", "2"])
    (tmp_path / "classnames.txt").write_text("rose\nleaf\nsky\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    data = open_evaluation_set(str(tmp_path / "test"), label="cls")
    assert data.labels == (("rose",), ("leaf", "sky"), ("sky",))
    assert (data.candidates, data.templates) == (["rose", "leaf", "sky"], ("a {c}.",))


def test_each_line_is_a_caption_also_where_two_are_the_same(tmp_path):
    members = [("0.png", png("red")), ("0.txt", b"a dog\na cat\n\na dog\n")]
    write_tar(tmp_path / "0.tar", members)
    data = open_evaluation_set(str(tmp_path), caption_lines=True)
    assert data.captions[0][""] == ("a dog", "a cat", "a dog")


def test_class_folders_bring_their_labels_also_inside_a_tar(tmp_path):
    members = [(f"{split}/{colour}/1.png", png(colour)) for split in ("train", "test") for colour in COLOURS]
    tar = write_tar(tmp_path / "set.tar", members)
    data = open_evaluation_set(str(tar), options=SourceOptions(folder="test"))
    assert data.labels == (("blue",), ("green",), ("red",))
    assert data.keys == ("blue/1.png", "green/1.png", "red/1.png")
    assert mean_colours(data, workers=1)[0].tolist() == [0, 0, 255]


def test_a_table_gives_labels_from_a_column_also_several(tmp_path):
    rows = [{"file": f"{colour}.png", "title": colour, "kind": {"tags": [colour, "all"]}} for colour in COLOURS]
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_evaluation_set(str(tmp_path), label="kind.tags")
    assert data.labels == (("red", "all"), ("green", "all"), ("blue", "all"))
    assert open_evaluation_set(str(tmp_path), label="title").labels == (("red",), ("green",), ("blue",))
    with pytest.raises(UsageError, match="did you mean 'title'"):
        open_evaluation_set(str(tmp_path), label="titel")


def test_without_labels_their_request_says_what_to_name(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path), name="colours")
    with pytest.raises(UsageError, match="colours have no labels"):
        _ = data.candidates


def test_an_image_that_cannot_be_decoded_is_named_and_left_out(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a.png", b"nothing"), ("b.png", png("red")), ("b.txt", b"")])
    (batch,) = batches_of(open_evaluation_set(str(tar)))
    assert batch.rows == (1,)
    assert list(batch.failures) == [0]


def test_images_of_equal_names_and_sizes_have_another_digest(tmp_path):
    digests = set()
    for colour in COLOURS:
        # uncompressed images of one size differ in their bytes only
        file = io.BytesIO()
        Image.new("RGB", (4, 4), COLOURS[colour]).save(file, "BMP")
        tar = write_tar(tmp_path / colour / "0.tar", [("a.bmp", file.getvalue()), ("a.txt", b"same")])
        digests.add(open_evaluation_set(str(tar)).digest)
    assert len(digests) == 3
