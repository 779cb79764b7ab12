"""A folder of images as an index: what an update embeds, what it takes over, and what it survives."""

import io
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data import photo_formats
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter
from vlm.service.folder import folder_scan
from vlm.service.folder.folder_index import FolderBusyError, FolderIndex, FolderUpdate
from vlm.service.folder.folder_state import FolderState


@dataclass
class CountingModel:
    """Knows colours, counts the images it sees, and fails as a killed process would after so many batches."""

    inner: Any
    fail_after: int | None = None
    seen: int = 0
    batches: int = 0
    decoded: list[int] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def embedding_size(self) -> int:
        return self.inner.embedding_size

    @property
    def view(self) -> Any:
        view = EvalTransform(size=8)

        def counted(data: bytes) -> np.ndarray:
            self.decoded.append(len(data))
            return view(data)

        return counted

    def embed_images(self, images: Any) -> Any:
        if self.batches == self.fail_after:
            raise InterruptedError("killed")
        self.batches += 1
        self.seen += len(images)
        return self.inner.embed_images(images)

    def embed_texts(self, texts: Any) -> Any:
        return self.inner.embed_texts(texts)


@dataclass
class Place:
    """A folder of images, the home of its index, and a model that counts."""

    root: Path
    home: Path
    model: CountingModel

    def open(self, model: Any = None, **options: Any) -> FolderIndex:
        used = model or self.model
        return FolderIndex(self.root, self.home, model_spec="colours", load=lambda _: used, **options)

    def update(self, **options: Any) -> FolderUpdate:
        """As a process of its own: nothing is kept in memory."""
        self.model.seen = 0
        self.model.decoded.clear()
        update = self.open().update(**options)
        assert update.embedded == self.model.seen
        return update

    def put(self, name: str, number: int) -> None:
        """An image of its own; changed long ago, as a photo of a folder usually was."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))

    def rows(self) -> dict[str, tuple[bytes, dict[str, Any], Any]]:
        """Stored vector, metadata and captions by uid."""
        index = Index.open(self.home / "index")
        found: dict[str, Any] = {}
        for row, origin in index.snapshot.entries():
            vector = index.snapshot.vectors(np.array([row]))
            found[origin.uid] = (vector.tobytes(), origin.metadata, origin.captions)
        index.close()
        return found


def picture(number: int) -> bytes:
    """A picture for each number below 256."""
    rows, columns = np.mgrid[0:12, 0:16]
    pixels = np.stack([number * 37 + columns * 16, number * 91 + rows * 21, np.full_like(rows, number)], axis=-1)
    file = io.BytesIO()
    Image.fromarray((pixels % 256).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def place(tmp_path: Path, make_model: Callable[..., Any]) -> Place:
    """A folder of 150 images, three batches."""
    made = Place(tmp_path / "photos", tmp_path / "home", CountingModel(make_model()))
    for number in range(150):
        made.put(f"{number % 3}/{number:03d}.png", number)
    return made


def test_updates_embed_what_is_new_and_nothing_else(place: Place) -> None:
    first = place.update()
    assert (first.images, first.new, first.embedded) == (150, 150, 150)
    before = place.rows()
    second = place.update()
    assert (second.images, second.has_changes, second.embedded, place.model.decoded) == (150, False, 0, [])

    for number in range(200, 210):
        place.put(f"new/{number}.png", number)
    (place.root / "moved").mkdir()
    for number in range(0, 15, 3):
        (place.root / f"0/{number:03d}.png").rename(place.root / f"moved/{number}.png")
    for number in range(1, 13, 3):
        (place.root / f"1/{number:03d}.png").unlink()
    for number in (2, 5):
        place.put(f"2/{number:03d}.png", number + 220)
    third = place.update()
    assert (third.new, third.moved, third.gone, third.changed, third.embedded) == (10, 5, 4, 2, 12)
    assert len(place.model.decoded) == 12
    after = place.rows()
    assert third.images == len(after) == 150 + 10 - 4
    assert after["moved/3.png"][0] == before["0/003.png"][0]
    assert after["moved/3.png"][1] == {"file": "moved/3.png", "folder": "moved", "width": 16, "height": 12}
    assert set(before) - set(after) == {f"0/{n:03d}.png" for n in range(0, 15, 3)} | {
        f"1/{n:03d}.png" for n in range(1, 13, 3)
    }
    # the same as an index made at once of the folder as it is now
    fresh = Place(place.root, place.home.with_name("fresh"), place.model)
    fresh.update()
    assert fresh.rows() == after


def test_the_same_bytes_are_embedded_once_wherever_and_whenever_they_lie(place: Place) -> None:
    place.update()
    shutil.copyfile(place.root / "0/000.png", place.root / "copy.png")
    os.utime(place.root / "1/001.png")
    copied = place.update()
    assert (copied.new, copied.changed, copied.embedded) == (1, 0, 0)
    # taken out and put back, as a file moved in two steps
    (place.root / "1/001.png").rename(place.home / "aside.png")
    assert place.update().gone == 1
    (place.home / "aside.png").rename(place.root / "back.png")
    back = place.update()
    assert (back.new, back.embedded) == (1, 0)
    # a whole folder renamed is not even read
    (place.root / "2").rename(place.root / "two")
    renamed = place.update()
    assert (renamed.moved, renamed.gone, renamed.embedded, place.model.decoded) == (50, 0, 0, [])
    assert set(place.rows()) == {path.relative_to(place.root).as_posix() for path in place.root.rglob("*.png")}


def test_what_no_file_holds_any_more_is_forgotten_once_it_is_the_greater_part(place: Place) -> None:
    place.update()
    shutil.rmtree(place.root / "1")
    shutil.rmtree(place.root / "2")
    place.update()
    for number in range(50):
        place.put(f"1/{number}.png", 3 * number + 1)
    assert place.update().embedded == 50


def test_images_that_cannot_be_read_are_named_and_not_tried_again_until_they_change(place: Place) -> None:
    (place.root / "text.jpg").write_bytes(b"no image at all")
    (place.root / "cut.png").write_bytes(picture(7)[:60])
    for name in ("text.jpg", "cut.png"):
        os.utime(place.root / name, (1_500_000_000, 1_500_000_000))
    (place.root / "dead.jpg").symlink_to("nowhere.jpg")
    first = place.update()
    assert (first.images, first.new) == (150, 150)
    assert set(first.unreadable) == {"text.jpg", "cut.png", "dead.jpg"}
    assert "unreadable image" in first.unreadable["text.jpg"]
    again = place.update()
    assert (again.unreadable, again.has_changes, place.model.decoded) == (first.unreadable, False, [])
    shutil.copy2(place.root / "text.jpg", place.root / "text again.jpg")
    assert (place.update().has_changes, place.model.decoded) == (False, [])
    (place.root / "text again.jpg").unlink()
    place.put("cut.png", 7)
    mended = place.update()
    assert (mended.changed, mended.images, set(mended.unreadable)) == (1, 151, {"text.jpg", "dead.jpg"})


def test_images_are_tried_again_where_what_reads_them_has_changed(place: Place) -> None:
    (place.root / "bad.jpg").write_bytes(b"nothing")
    os.utime(place.root / "bad.jpg", (1_500_000_000, 1_500_000_000))
    place.update()
    assert place.update().unreadable.keys() == {"bad.jpg"}
    assert place.model.decoded == []
    state = FolderState(place.home / "files.sqlite")
    assert state.space is not None
    state.begin(state.root, state.space, "another version of Pillow")
    assert {path for path, file in state.files().items() if file.digest is None} == {"bad.jpg"}
    state.close()


def test_files_that_an_extra_would_read_are_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_formats, "HAS_RAW", False)
    monkeypatch.setattr(folder_scan, "PHOTO_ENDINGS", frozenset({".png", ".jpg"}))
    for name in ("a.CR3", "b.nef", "c.mov"):
        (place.root / name).write_bytes(b"")
    update = place.update()
    assert (update.images, update.missing, update.unreadable) == (150, {"raw": 2}, {})


def test_a_file_without_permission_is_tried_again_since_a_mended_one_shows_no_change(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "000.png":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert place.update().unreadable == {"0/000.png": "Permission denied"}
    monkeypatch.undo()
    mended = place.update()
    assert (mended.unreadable, mended.embedded, mended.images) == ({}, 1, 150)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_killed_in_the_first_update_the_next_one_ends_as_an_uninterrupted_one(
    place: Place, make_model: Callable[..., Any], batches: int
) -> None:
    with pytest.raises(InterruptedError):
        place.open(CountingModel(make_model(), fail_after=batches)).update()
    resumed = place.update()
    assert resumed.embedded == 150 - 64 * batches
    whole = Place(place.root, place.home.with_name("whole"), place.model)
    assert whole.update().embedded == 150
    assert whole.rows() == place.rows()
    segment = "index/segments/segment-00000.npy"
    assert (whole.home / segment).read_bytes() == (place.home / segment).read_bytes()


def test_a_process_that_ends_between_the_index_and_the_note_of_it_leaves_nothing_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.update()
    (place.root / "0/000.png").unlink()
    place.put("new.png", 230)

    def killed(state: FolderState, fingerprint: str) -> None:
        raise InterruptedError("killed")

    monkeypatch.setattr(FolderState, "set_indexed", killed)
    with pytest.raises(InterruptedError):
        place.open().update()
    monkeypatch.undo()
    assert place.update().embedded == 0
    assert set(place.rows()) == {path.relative_to(place.root).as_posix() for path in place.root.rglob("*.png")}


def test_an_index_that_somebody_changed_or_removed_is_made_again_without_the_model(place: Place) -> None:
    place.update()
    before = place.rows()
    with IndexWriter(place.home / "index") as writer:
        writer.delete(["0/000.png"])
    assert place.update().embedded == 0
    assert place.rows() == before
    shutil.rmtree(place.home / "index")
    assert place.update().embedded == 0
    assert place.rows() == before


def test_words_next_to_an_image_are_its_captions_and_fields_and_change_without_embedding(place: Place) -> None:
    (place.root / "0/000.txt").write_text("a dog in the snow")
    (place.root / "0/003.json").write_text('{"caption": "two cats", "rating": 5, "year": 1999}')
    (place.root / "0/006.json").write_text("{broken")
    (place.root / "0/009.txt").write_text("0 0.5 0.5 0.1 0.1")
    first = place.update()
    assert (first.images, first.unreadable) == (150, {})
    rows = place.rows()
    assert rows["0/000.png"][2] == {"": ("a dog in the snow",)}
    assert rows["0/003.png"][2] == {"": ("two cats",)}
    assert rows["0/003.png"][1] == {
        "file": "0/003.png", "folder": "0", "width": 16, "height": 12, "rating": 5, "year": 1999
    }  # fmt: skip
    assert "unreadable json" in rows["0/006.png"][1]["unreadable_words"]
    assert rows["0/009.png"][2] == {}
    (place.root / "0/000.txt").write_text("a dog in the rain")
    (place.root / "0/003.json").unlink()
    second = place.update()
    assert (second.changed, second.embedded) == (2, 0)
    assert place.rows()["0/000.png"][2] == {"": ("a dog in the rain",)}
    assert place.rows()["0/003.png"][2] == {}


def test_a_file_changed_twice_within_a_tick_of_the_clock_is_seen(place: Place) -> None:
    place.update()
    path = place.root / "now.png"
    path.write_bytes(picture(240).ljust(1000, b"\0"))
    status = path.stat()
    place.update()
    # the same size and time, as two writes within one tick give
    path.write_bytes(picture(241).ljust(1000, b"\0"))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert (place.update().changed, place.model.seen) == (1, 1)


def test_nothing_is_written_into_the_folder(place: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
    place.update()
    place.update()
    assert {path: path.stat().st_mtime_ns for path in place.root.rglob("*")} == before


def test_another_model_is_refused_until_everything_is_embedded_again(
    place: Place, make_model: Callable[..., Any]
) -> None:
    place.update()
    place.put("new.png", 230)
    place.model = CountingModel(make_model("other"))
    with pytest.raises(UsageError, match=r"not the model that embedded this folder.*--rebuild"):
        place.open().update()
    assert place.update(rebuild=True).embedded == 151
    index = Index.open(place.home / "index")
    assert index.details.space.fingerprint == "other"
    index.close()


def test_no_model_no_image_and_none_readable_are_told_apart(place: Place, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model is named.*VLM_MODEL"):
        FolderIndex(place.root, place.home, load=lambda _: place.model).update()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("a")
    empty = Place(tmp_path / "empty", tmp_path / "home of empty", place.model)
    with pytest.raises(UsageError, match="holds no image"):
        empty.update()
    (tmp_path / "empty/a.jpg").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"None of the 1 image .*a\.jpg: unreadable image"):
        empty.open().update()
    with pytest.raises(UsageError, match="no folder"):
        Place(tmp_path / "nowhere", tmp_path / "h", place.model).open().update()


def test_a_folder_that_is_suddenly_empty_keeps_its_index(place: Place) -> None:
    place.update()
    place.root.rename(place.root.with_name("elsewhere"))
    place.root.mkdir()
    with pytest.raises(UsageError, match=r"holds no image now.*its index has 150.*not mounted"):
        place.open().update()
    assert len(place.rows()) == 150


def test_a_home_belongs_to_one_folder_which_may_be_moved(place: Place, tmp_path: Path) -> None:
    place.update()
    other = Place(tmp_path / "other", place.home, place.model)
    other.put("a.png", 1)
    with pytest.raises(UsageError, match=r"holds the index of .*photos, not of .*other"):
        other.open().update()
    place.root.rename(tmp_path / "archive")
    place.root = tmp_path / "archive"
    moved = place.update()
    assert (moved.has_changes, moved.embedded) == (False, 0)
    index = Index.open(place.home / "index")
    assert {Path(origin.shard).parent.parent for _, origin in index.snapshot.entries()} == {tmp_path / "archive"}
    index.close()


def test_one_process_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.service.folder.folder_index.LOCK_SECONDS", 0.05)
    one = place.open()
    read = CountingModel.embed_images

    def while_reading(model: CountingModel, images: Any) -> Any:
        with pytest.raises(FolderBusyError, match="updated by another process"):
            place.open().update()
        return read(model, images)

    monkeypatch.setattr(CountingModel, "embed_images", while_reading)
    assert one.update().embedded == 150


def test_damage_of_what_is_known_is_one_sentence(place: Place) -> None:
    place.update()
    (place.home / "files.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(Exception, match=r"files\.sqlite cannot be read.*--rebuild"):
        place.open().update()
    assert place.update(rebuild=True).images == 150
    with sqlite3.connect(place.home / "files.sqlite") as database:
        database.execute("UPDATE facts SET value = '99' WHERE name = 'format'")
    with pytest.raises(UsageError, match="has format 99"):
        place.open().update()


def test_a_folder_whose_first_update_was_killed_while_the_model_loads_keeps_the_model(place: Place) -> None:
    class Killed(BaseException):
        """As the end of the process, which no code of the library sees."""

    asked: list[str] = []

    def killed(spec: str) -> Any:
        asked.append(spec)
        raise Killed

    def load(spec: str) -> Any:
        asked.append(spec)
        return place.model

    with pytest.raises(Killed):
        FolderIndex(place.root, place.home, model_spec="colours", load=killed).update()
    # the environment may name another one meanwhile
    FolderIndex(place.root, place.home, default_spec="shapes", load=load).update()
    # nor does embedding again without a word of another model
    FolderIndex(place.root, place.home, default_spec="shapes", load=load).update(rebuild=True)
    assert [Path(spec).name for spec in asked] == ["colours"] * 3


def test_a_model_that_cannot_be_loaded_is_not_kept(place: Place) -> None:
    def missing(spec: str) -> Any:
        raise UsageError(f"There is no model {spec}.")

    with pytest.raises(UsageError, match="no model nowhere"):
        FolderIndex(place.root, place.home, model_spec="nowhere", load=missing).update()
    with pytest.raises(UsageError, match="no model is named"):
        FolderIndex(place.root, place.home, load=missing).update()
