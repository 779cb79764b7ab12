"""`vlm.open_index`: searched and changed from Python, with a model that knows colours."""

import io
import json
import re
import runpy
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.index.embed_fixture import embed_shards
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "index" / "conftest.py"))

model = _SHARED["model"]
make_model = _SHARED["make_model"]
paint = _SHARED["paint"]
write_shard = _SHARED["write_shard"]
shards = _SHARED["shards"]
embeddings = _SHARED["embeddings"]

Paint = Callable[..., bytes]


@pytest.fixture
def index(tmp_path: Path, embeddings: Path, model: Any) -> Iterator[vlm.SearchIndex]:
    """Eleven images of two coloured stripes, in three shards: uids 00 to 23 without 12."""
    vlm.build_index(embeddings, tmp_path / "index")
    with vlm.open_index(tmp_path / "index", model=model) as opened:
        yield opened


def uids(result: Any) -> list[str]:
    return [hit.uid for hit in result]


def test_a_text_finds_images_and_a_hit_says_what_and_where_it_is(index: vlm.SearchIndex, shards: list[str]) -> None:
    result = index.search("red and green", top=3)
    hit = result[0]
    assert len(result) == 3
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert hit.caption == "red and green"
    assert hit.captions == {"": ("red and green", "stripes of green")}
    assert hit.metadata["width"] == 16
    assert hit.path == f"{shards[1]}/{hit.uid}"
    image = hit.image()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (16, 16), (255, 0, 0))
    plain = result.to_json()
    assert plain["hits"][0]["path"] == hit.path
    json.dumps(plain)


def test_one_text_is_one_query_and_search_many_answers_several(index: vlm.SearchIndex) -> None:
    assert index.search("red handbag").query.texts == ("red handbag",)
    results = index.search_many(["red", "blue and green"], top=2)
    assert [len(result) for result in results] == [2, 2]
    assert uids(results[1]) == uids(index.search("blue and green", top=2))


def test_a_query_takes_images_in_every_form(index: vlm.SearchIndex, paint: Paint, tmp_path: Path) -> None:
    data = paint("green", "cyan")
    (tmp_path / "query.png").write_bytes(data)
    pil = Image.open(io.BytesIO(data)).convert("RGB")
    expected = uids(index.search(image=data))
    for image in (tmp_path / "query.png", str(tmp_path / "query.png"), pil, np.asarray(pil), [pil]):
        assert uids(index.search(image=image)) == expected
        assert uids(index.search(like=image)) == expected
    combined = index.search("green", image=[data, pil], minus="cyan", weights=[1, 0.5, 0.5, 0.2])
    assert len(combined.query.images) == 2


def test_like_is_a_uid_before_it_is_a_file(
    index: vlm.SearchIndex, tmp_path: Path, paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "00").write_bytes(paint("white"))
    assert index.search(like="00").query.items == ("00",)
    assert index.search(like=["00", "query.png" if (tmp_path / "query.png").exists() else "01"]).query.items[0] == "00"
    with pytest.raises(UsageError, match="no item 'nobody', and there is no file of that name"):
        index.search(like="nobody")


def test_vectors_are_numbers_matrices_or_files(index: vlm.SearchIndex, tmp_path: Path) -> None:
    vector = np.eye(8)[4]
    np.save(tmp_path / "red.npy", vector)
    expected = uids(index.search("red"))
    for given in (vector, vector.tolist(), vector[None], tmp_path / "red.npy"):
        assert uids(index.search(vector=given)) == expected
    with pytest.raises(UsageError, match="vector"):
        index.search(vector=["a"[:0] or 1, "b"])


def test_filters_and_what_they_lack(index: vlm.SearchIndex) -> None:
    assert len(index.search("red", where='width == 16 and caption like "%red%"')) > 0
    result = index.search("red", where="caption = 'Red and green'")
    assert (len(result), result.hint) == (
        0,
        "0 rows match: 'red and green' is a value of caption, 'Red and green' is not.",
    )
    assert result.to_json()["hint"] == result.hint
    assert "hint" not in index.search("red", where="width = 16").to_json()


def test_twenty_images_are_added_in_one_call_whatever_they_are(
    index: vlm.SearchIndex, paint: Paint, tmp_path: Path
) -> None:
    colours = ["black", "blue", "green", "cyan", "red"]
    items: list[Any] = []
    for number, colour in enumerate(colours):
        data = paint(colour, "white")
        (tmp_path / f"{colour}.png").write_bytes(data)
        pil = Image.open(io.BytesIO(paint(colour, colour, "white"))).convert("RGB")
        items += [tmp_path / f"{colour}.png", paint(colour, "white", "white"), pil]
        items.append(np.asarray(pil)[:, ::-1] if number % 2 else np.asarray(pil)[:, ::-1].transpose(2, 0, 1))
    captions = [f"number {number}" for number in range(20)]
    summary = index.add(
        items, uids=[f"new/{number}.x" for number in range(20)], captions=captions, metadata={"batch": 7}
    )
    assert (summary.added, summary.rows, summary.generation, summary.unreadable) == (20, 31, 2, {})
    assert len(index) == 31
    assert len(index.search("red", where="batch = 7", top=50)) == 20
    hits = {hit.uid: hit for hit in index.search("black", where="batch = 7", top=50)}
    assert hits["new/3.x"].caption == "number 3"
    assert hits["new/0.x"].path == str(tmp_path / "black.png")
    for hit in hits.values():
        assert hit.image().size == (16, 16)
    assert index.check().faults == ()
    assert not list(index.folder.glob(".adding/*"))


def test_one_image_is_added_with_what_is_said_of_it(index: vlm.SearchIndex, paint: Paint) -> None:
    summary = index.add(paint("red"), uids="one", captions=["a red thing", "red"], metadata={"price": 1.5})
    assert summary.added == 1
    hit = index.search("red", top=1)[0]
    assert (hit.uid, hit.captions, hit.metadata["price"]) == ("one", {"": ("a red thing", "red")}, 1.5)
    assert "one" in index


def test_an_image_that_is_there_is_known_and_one_under_its_uid_is_refused_or_replaced(
    index: vlm.SearchIndex, paint: Paint
) -> None:
    assert index.add([paint("red"), paint("blue")]).added == 2
    again = index.add([paint("red"), paint("blue"), paint("green")])
    assert (again.added, again.known) == (1, 2)
    nothing = index.add([paint("red")])
    assert (nothing.added, nothing.known, nothing.generation) == (0, 1, again.generation)
    index.add(paint("red", "white"), uids="x")
    with pytest.raises(UsageError, match=r"has 'x' already \(1 of 2 uids"):
        index.add([paint("blue", "white"), paint("cyan")], uids=["x", "y"])
    replaced = index.update(paint("blue", "white"), uids="x")
    assert (replaced.replaced, replaced.added) == (1, 0)
    assert index.search(like="x", top=1)[0].image().getpixel((0, 0)) == (0, 0, 255)


def test_a_folder_is_added_where_it_lies_and_later_only_what_is_new_or_changed(
    index: vlm.SearchIndex, paint: Paint, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("trip/b.png", "blue"), ("trip/c.png", "green")):
        (folder / name).write_bytes(paint(colour))
    (folder / "a.txt").write_text("all red")
    (folder / "broken.jpg").write_bytes(b"no image")
    first = index.add(folder)
    assert (first.added, first.known, list(first.unreadable)) == (3, 0, ["broken.jpg"])
    hit = index.search("red", where="folder = ''", top=1)[0]
    assert (hit.uid, hit.path, hit.caption, hit.metadata["file"]) == (
        "a.png",
        str(folder / "a.png"),
        "all red",
        "a.png",
    )
    again = index.add(str(folder))
    assert (again.added, again.known, list(again.unreadable), again.generation) == (0, 3, ["broken.jpg"], 2)
    (folder / "broken.jpg").unlink()
    (folder / "d.png").write_bytes(paint("cyan"))
    (folder / "a.png").write_bytes(paint("white", "black", "white"))
    second = index.add(folder)
    assert (second.added, second.replaced, second.known) == (1, 1, 2)
    assert index.search(like="a.png", top=1)[0].image().getpixel((0, 0)) == (255, 255, 255)
    assert index.rollback().rows == 14


def test_another_folder_with_the_same_names_is_told_apart_by_a_prefix(
    index: vlm.SearchIndex, paint: Paint, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(paint("red" if folder == "one" else "blue"))
    index.add(tmp_path / "one")
    with pytest.raises(UsageError, match=r"has 'a.png' already, from .*one/a.png; nothing was added.*--uid-prefix"):
        index.add(tmp_path / "two")
    assert index.add(tmp_path / "two", uid_prefix="two/").added == 1
    assert "two/a.png" in index


def test_the_folder_that_was_packed_is_known_by_its_images(
    index: vlm.SearchIndex, paint: Paint, tmp_path: Path
) -> None:
    for folder in ("one", "copy"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(paint("red"))
    index.add(tmp_path / "one")
    assert index.add(tmp_path / "copy").known == 1
    # as many bytes, but another image
    data = bytearray(paint("red"))
    data[-1] ^= 1
    (tmp_path / "copy" / "a.png").write_bytes(data)
    with pytest.raises(UsageError, match=r"has 'a.png' already"):
        index.add(tmp_path / "copy")


def test_shards_are_added_once_and_their_new_samples_later(
    index: vlm.SearchIndex, shards: list[str], write_shard: Callable[..., str], paint: Paint, tmp_path: Path
) -> None:
    more = [("x1", paint("red"), ["x"]), ("x2", paint("blue"), ["y"])]
    path = write_shard(tmp_path / "shards" / "00003.tar", more)
    summary = index.add(tmp_path / "shards")
    # of shard 00001 one image cannot be read: it alone is tried again
    assert (summary.added, summary.known, list(summary.unreadable)) == (2, 11, ["12"])
    assert (index.add(tmp_path / "shards").known, index.info().generation) == (13, 2)
    assert index.search("red", where="key = 'x1'")[0].path == f"{path}/x1"
    write_shard(tmp_path / "other" / "00000.tar", [("00", paint("white"), ["z"])])
    with pytest.raises(UsageError, match=r"has '00' already, from .*00000.tar/00; nothing was added"):
        index.add(str(tmp_path / "other"))


def test_a_table_is_packed_into_the_index_folder(index: vlm.SearchIndex, paint: Paint, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        (folder / f"{number}.png").write_bytes(paint(colour))
    (folder / "captions.csv").write_text("image,caption,price\n0.png,a red one,5\n1.png,a blue one,7\n")
    assert index.add(folder).added == 2
    hit = index.search("red", where="price = 5", top=1)[0]
    assert (hit.caption, hit.image().getpixel((0, 0))) == ("a red one", (255, 0, 0))
    assert hit.path.startswith(str(index.folder))
    assert index.add(folder).known == 2


def test_rows_of_a_table_without_a_usable_image_are_named(index: vlm.SearchIndex, paint: Paint, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(paint("red"))
    (tmp_path / "1.png").write_bytes(b"no image")
    table = tmp_path / "catalogue.csv"
    table.write_text("image,caption\n0.png,a\n1.png,b\nnowhere.png,c\n")
    summary = index.add(table)
    assert summary.added == 1
    assert list(summary.unreadable) == ["1.png", "nowhere.png"]
    assert summary.unreadable["nowhere.png"].startswith("missing file")


def test_a_table_of_known_rows_leaves_no_second_copy_of_its_images(
    index: vlm.SearchIndex, paint: Paint, tmp_path: Path
) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "0.png").write_bytes(paint("red"))
    (folder / "catalogue.csv").write_text("image,caption\n0.png,a red one\n")
    assert index.add(folder / "catalogue.csv").added == 1
    copies = sorted((index.folder / "images").iterdir())
    # another file of the folder makes it another source
    (folder / "notes.txt").write_text("of no interest")
    assert index.add(folder / "catalogue.csv").known == 1
    assert sorted((index.folder / "images").iterdir()) == copies
    assert index.search("red", top=1)[0].image().size
    assert index.check().faults == ()


def test_a_killed_addition_resumes_with_the_parts_it_has(
    tmp_path: Path, embeddings: Path, make_model: Callable[..., Any], paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.service.additions.PART_IMAGES", 2)
    vlm.build_index(embeddings, tmp_path / "index")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "green", "cyan", "white")):
        (folder / f"{number}.png").write_bytes(paint(colour))
    with pytest.raises(VlmError, match="killed"):
        vlm.open_index(tmp_path / "index", model=make_model(fail_on_batch=2)).add(folder)
    resumed = make_model()
    index = vlm.open_index(tmp_path / "index", model=resumed)
    assert len(index) == 11
    assert index.add(folder).added == 5
    assert resumed.batches == 1
    assert len(index.search("red", where="folder = ''", top=50)) == 5


def test_metadata_is_set_by_uid_by_a_table_and_by_records(index: vlm.SearchIndex, tmp_path: Path) -> None:
    by_uid = index.set_metadata({"00": {"sku": "s1", "price": 2**53 + 1}, "01": {"sku": "s2"}, "02": {"sku": "s2"}})
    assert (by_uid.edited, by_uid.keys, by_uid.unknown, by_uid.columns) == (3, 3, 0, ("sku", "price"))
    (tmp_path / "prices.csv").write_text(f"sku,price,note\ns1,{2**53 + 3},\ns2,7,two\ns9,1,\n")
    table = index.set_metadata(tmp_path / "prices.csv", key="sku")
    assert (table.edited, table.keys, table.unknown, table.unknown_keys) == (3, 3, 1, ("s9",))
    assert uids(index.search("red", where=f"price = {2**53 + 3}")) == ["00"]
    assert set(uids(index.search("red", where="price = 7 and note = 'two'"))) == {"01", "02"}
    removed = index.set_metadata([{"uid": "00", "price": None}])
    assert (removed.edited, len(index.search("red", where="price is not missing"))) == (1, 2)
    assert index.rollback().rows == 11
    assert len(index.search("red", where="price is not missing")) == 3


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sku,price\nnobody,1\n", {"key": "uid"}, "no column 'uid'; known: sku, price"),
        ("uid,price\nnobody,1\n", {}, "No row has one of the 1 keys.*first is 'nobody', and a row has '00'"),
        ("widht,price\n16,1\n", {"key": "widht"}, "No row has the field 'widht'.*did you mean 'width'"),
        ("uid,caption\n00,x\n", {}, "'caption' is not metadata that can be set"),
        ("uid\n00\n", {}, "no column besides its key 'uid'"),
        ("uid,price\n00,1\n00,2\n", {}, "key '00' occurs twice, and row 2 sets it otherwise"),
        ("uid,price\n00,1\n", {"columns": "prize"}, "no column 'prize'; did you mean 'price'"),
    ],
)
def test_a_table_that_does_not_fit_sets_nothing(
    index: vlm.SearchIndex, tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        index.set_metadata(tmp_path / "table.csv", **options)
    assert index.info().generation == 1


def test_a_table_that_is_none_is_named(index: vlm.SearchIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv cannot be read: No such file"):
        index.set_metadata(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="is not a table: its name must end in one of csv"):
        index.set_metadata(tmp_path / "prices.xlsx")


def test_a_deletion_can_be_looked_at_and_undone(index: vlm.SearchIndex) -> None:
    preview = index.delete(where="key < '02'", dry_run=True)
    assert (preview.rows, preview.remaining, preview.examples, preview.is_majority) == (2, 9, ("00", "01"), False)
    assert index.delete(where="width = 16", dry_run=True).is_majority
    assert len(index) == 11
    assert index.delete("00").removed == 1
    assert index.delete(["01", "02"]).removed == 2
    assert index.rollback().rows == 10
    assert index.delete(where="width = 17", dry_run=True).hint.startswith("0 rows match: 17 is not a value of width")
    for arguments in ({}, {"uids": "00", "where": "width = 16"}):
        with pytest.raises(UsageError, match="either uids or a filter"):
            index.delete(**arguments)
    with pytest.raises(UsageError, match="has no '00'"):
        index.delete(["00", "03"], dry_run=True) if "00" not in index else index.delete("nobody00", dry_run=True)


def test_a_deletion_of_another_number_than_expected_deletes_nothing(index: vlm.SearchIndex) -> None:
    with pytest.raises(UsageError, match="2 rows would be deleted, not 3 as expected; nothing was deleted"):
        index.delete(where="key < '02'", expect=3)
    with pytest.raises(UsageError, match="1 rows would be deleted, not 0"):
        index.delete("00", dry_run=True, expect=0)
    assert index.info().generation == 1
    assert index.delete(where="key < '02'", expect=2).removed == 2


@pytest.mark.parametrize("folder", [3, None, b"index"])
def test_what_is_no_folder_is_refused_by_name(folder: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"folder = {folder!r}: give the folder of an index.")):
        vlm.open_index(folder)


def test_info_says_what_a_rollback_costs_and_results_are_what_the_verbs_print(
    index: vlm.SearchIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index.info().kept_bytes == 0
    index.delete("00")
    index.compact()
    kept = index.info().kept_bytes
    assert kept > 0

    def printed(verb: str) -> dict[str, Any]:
        assert main(["index", verb, str(index.folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert printed("info") == index.info().to_json()
    assert printed("check") == index.check().to_json() == vlm.check_index(index.folder).to_json()
    assert set(printed("rollback")) == set(index.rollback().to_json())
    index.compact(keep_previous=False)
    assert index.info().kept_bytes == 0


def test_moved_shards_are_found_again(index: vlm.SearchIndex, shards: list[str], tmp_path: Path) -> None:
    old, new = tmp_path / "shards", tmp_path / "moved" / "here"
    new.parent.mkdir()
    shutil.move(old, new)
    with pytest.raises(VlmError, match="no longer exists"):
        index.search("red")[0].image()
    assert index.relocate(old, new).edited == 11
    assert index.search("red")[0].image().size == (16, 16)
    shutil.move(new, old)
    assert index.relocate(shards=str(old)).edited == 11
    assert index.search("red")[0].path.startswith(str(old))
    assert index.check().faults == ()


def test_where_shards_are_not_they_are_not_looked_for(index: vlm.SearchIndex, tmp_path: Path) -> None:
    old, empty = tmp_path / "shards", tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ((str(old), str(empty)), "00000.tar does not exist, where .* should be now"),
        (("/nowhere", str(empty)), "No image of the index lies at /nowhere; they lie in"),
        ((str(old),), "either OLD and NEW, or the shards"),
        ((), "either OLD and NEW, or the shards"),
    ):
        with pytest.raises(UsageError, match=message):
            index.relocate(*arguments)
    for number in range(3):
        (empty / f"{number:05d}.tar").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"has 5 bytes, and the images of .* end at"):
        index.relocate(old, empty)
    (empty / "00002.tar").unlink()
    with pytest.raises(UsageError, match=r"1 of 3 shards of the index are not among the 2 given"):
        index.relocate(shards=str(empty))
    assert index.info().generation == 1


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "nothing to add"),
        (b"no image", {}, "Not one of 1 images can be decoded"),
        ("/nowhere/at/all", {}, "There is nothing at /nowhere/at/all"),
        ("/nowhere/a.png", {}, "/nowhere/a.png cannot be read: No such file"),
        (3, {}, "int is not an image"),
        (["a.png", "/nowhere"], {}, "/nowhere is not an image file; add folders, shards and tables one by one"),
        ([np.zeros((4, 4, 3), np.uint8)] * 2, {}, "2 of the images have the uid"),
        ([np.zeros((4, 4, 3), np.uint8)], {"uids": ["a", "b"]}, "2 uids for 1 images"),
        ([np.zeros((4, 4, 3), np.uint8)] * 2, {"uids": ["a", "b"], "captions": "x"}, "One caption for 2 images"),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    index: vlm.SearchIndex, items: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        index.add(items, **options)
    assert index.info().generation == 1
    assert not list(index.folder.glob("images/*.tar"))


def test_an_empty_folder_and_one_of_words_are_refused(index: vlm.SearchIndex, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images, no shards"):
        index.add(tmp_path / "empty")
    with pytest.raises(UsageError, match="said of images, not of a folder"):
        index.add(tmp_path / "empty", captions=["x"])


def test_uids_are_of_the_column_of_the_users_choice(tmp_path: Path, paint: Paint, model: Any) -> None:
    path = tmp_path / "packed.tar"
    with tarfile.open(path, "w") as tar:
        for key, fields in (("a-1", {"file": "a/1.png", "sku": 7}), ("b-1", {"file": "b/1.png", "sku": 8})):
            for member, data in ((f"{key}.png", paint("red")), (f"{key}.json", json.dumps(fields).encode())):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    embed_shards(model, [str(path)], tmp_path / "embeddings", model_spec="colours", batch_size=3)
    found = {}
    for column in (None, "sku", "key", ""):
        out = tmp_path / f"index-{column}"
        vlm.build_index(tmp_path / "embeddings", out, uid_column=column)
        found[column] = sorted(uids(vlm.open_index(out, model=model).search("red")))
    assert found == {
        None: ["a/1.png", "b/1.png"],
        "sku": ["7", "8"],
        "key": ["a-1", "b-1"],
        "": ["a-1", "b-1"],
    }
    with vlm.open_index(tmp_path / "index-sku", model=model) as index:
        assert index.update(tmp_path / "embeddings").replaced == 2
        assert index.add(str(path)).known == 2
    for column, message in (("nmae", "has no 'nmae' to be its uid"), ("skku", "did you mean 'sku'")):
        with pytest.raises(UsageError, match=message):
            vlm.build_index(tmp_path / "embeddings", tmp_path / "none", uid_column=column)
    assert not (tmp_path / "none").exists()


def test_a_table_that_is_set_twice_leaves_the_first_change_to_undo(index: vlm.SearchIndex, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text("uid,price\n00,3\n01,4\n")
    first = index.set_metadata(tmp_path / "prices.csv")
    again = index.set_metadata(tmp_path / "prices.csv")
    assert (first.edited, again.edited, again.generation) == (2, 0, first.generation)
    index.rollback()
    assert "price" not in index.search(like="00", top=1)[0].metadata


@pytest.mark.parametrize(
    "ask",
    [
        lambda index: index.search("red"),
        lambda index: index.search(like="00"),
        lambda index: index.search_many(["red"]),
        lambda index: index.delete("00"),
        lambda index: index.delete(where="width = 16", dry_run=True),
        lambda index: index.set_metadata({"00": {"price": 1}}),
        lambda index: index.info(),
        lambda index: index.check(),
        len,
        lambda index: "00" in index,
    ],
)
def test_a_closed_index_says_that_it_is_closed(index: vlm.SearchIndex, ask: Callable[[Any], Any]) -> None:
    index.close()
    with pytest.raises(UsageError, match="is closed; open it again"):
        ask(index)
    assert "11 rows" in repr(index)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_missing_uid_is_said_alike_by_a_deletion_and_its_dry_run(index: vlm.SearchIndex, dry_run: bool) -> None:
    with pytest.raises(UsageError, match=r"has no 'NOPE' \(1 of 2 uids are missing\); nothing was deleted: leave them"):
        index.delete(["00", "NOPE"], dry_run=dry_run)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.search(3), "texts = 3 is not a text"),
        (lambda index: index.search("red", top="5"), "top = '5' is not a whole number"),
        (lambda index: index.search("red", top=True), "top = True is not a whole number"),
        (lambda index: index.search("red", at_least="0.2"), "at_least = '0.2' is not a number"),
        (lambda index: index.search("red", where=3), "where = 3 is not a text"),
        (lambda index: index.search("red", weights=2), "weights = 2 is not a list of numbers"),
        (lambda index: index.search("red", weights=["a"]), "weights holds 'a'"),
        (lambda index: index.search(vector=3), "vector: numbers"),
        (lambda index: index.search(vector={"a": 1}), "vector: numbers"),
        (lambda index: index.search_many([{"texts": "red"}]), "queries holds {'texts': 'red'}"),
        (lambda index: index.search_many("red"), "search takes a single one"),
        (lambda index: index.search_many(["red"], tops=3), "no option 'tops'"),
        (lambda index: index.delete(3), "uids = 3 is not a text"),
        (lambda index: index.set_metadata({}), "There is nothing to set"),
        (lambda index: index.set_metadata([]), "There is nothing to set"),
        (lambda index: index.set_metadata(3), "values = 3"),
        (lambda index: index.set_metadata({"00": 3}), "metadata of '00' is 3, not a mapping"),
        (lambda index: index.set_metadata({"00": {"g": b"x"}}), "has 'g' = b'x', which is no JSON"),
        (lambda index: index.set_metadata({"00": {"g": 1}}, columns=3), "columns = 3"),
    ],
)
def test_an_argument_of_another_kind_is_named(index: vlm.SearchIndex, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"g": object()}}, "metadata of image 1 has 'g' = <object"),
        ({"metadata": {3: "x"}}, "metadata of image 1 has 3 = 'x'"),
        ({"metadata": 3}, "metadata = 3"),
        ({"metadata": ["x"]}, "metadata of image 1 is 'x', not a mapping"),
        ({"uids": 3}, "uids = 3"),
        ({"captions": 3}, "captions = 3"),
        ({"captions": {"en": 3}}, "captions in 'en' = 3"),
    ],
)
def test_what_is_said_of_an_image_in_another_form_is_named_and_adds_nothing(
    index: vlm.SearchIndex, paint: Paint, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        index.add(paint("red"), **options)
    assert len(index) == 11


def test_images_without_a_file_have_the_metadata_of_files(index: vlm.SearchIndex, paint: Paint, tmp_path: Path) -> None:
    data = paint("red", "white")
    (tmp_path / "a.png").write_bytes(data)
    index.add([tmp_path / "a.png", data, Image.open(io.BytesIO(data))], uids=["file", "bytes", "pil"])
    metadata = {hit.uid: hit.metadata for hit in index.search(like=["file", "bytes", "pil"], top=14)}
    assert metadata["file"] == {"file": "a.png", "width": 16, "height": 16}
    assert metadata["bytes"] == metadata["pil"] == {"width": 16, "height": 16}
    assert {"file", "bytes", "pil"} <= set(uids(index.search("red", where="width = 16", top=20)))


def test_a_folder_that_holds_an_index_names_it(index: vlm.SearchIndex) -> None:
    with pytest.raises(UsageError, match=f"There is one in it: {index.folder}"):
        vlm.open_index(index.folder.parent)
