import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import preloaded
from tests.data.selection_fixture import select_all
from tests.index.embed_fixture import embed_shards
from vlm.data.selection import Selection
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import Embeddings, Modality
from vlm.index.encoder import Encoder

KILLED_RUN = """
import os, runpy, signal, sys, time
from pathlib import Path
from vlm.index.embed import EmbedOptions, embed_into
Model = runpy.run_path(sys.argv[1])["ColourModel"]
class Killed(Model):
    def embed_images(self, images):
        if self.batches == 3:
            while not Path(sys.argv[2], "parts", "part-00000.json").exists():
                time.sleep(0.01)  # the part before is written meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_images(images)
embed_into(Killed(), sys.argv[3:], {"image": Path(sys.argv[2])}, EmbedOptions(model_spec="colours", batch_size=3))
"""


def embed(model: Encoder, shards: list[str], out: Path, **more: Any) -> Embeddings:
    embed_shards(model, shards, out, **{"model_spec": "colours", "batch_size": 3} | more)
    return Embeddings.open(out, verify=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def vector_of(embeddings: Embeddings) -> dict[str, np.ndarray]:
    rows = np.concatenate(list(embeddings.blocks()))
    return {origin.uid: row for origin, row in zip(embeddings.origins(), rows, strict=True)}


def test_each_row_is_the_vector_of_the_sample_its_key_names(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Encoder]
) -> None:
    embeddings = embed(make_model(), shards, tmp_path / "out")
    texts = {origin.key: next(iter(origin.captions.values()))[0] for origin in embeddings.origins()}
    assert len(texts) == len(embeddings) == 11
    for uid, row in vector_of(embeddings).items():
        assert float(row @ make_model().embed_texts([texts[uid]]).numpy()[0]) == pytest.approx(1, abs=1e-3)


def test_a_run_killed_inside_a_part_and_repeated_leaves_the_files_of_an_uninterrupted_one(
    tmp_path: Path, shards: list[str], model: Encoder
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = embed(model, shards, whole).manifest
    arguments = [str(Path(__file__).with_name("conftest.py")), str(killed), *shards]
    root = Path(__file__).parents[2]
    ended = preloaded.run([sys.executable, "-c", KILLED_RUN, *arguments], cwd=root, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert [path.name for path in killed.glob("parts/part-*.json")] == ["part-00000.json"]
    with pytest.raises(UsageError, match="unfinished"):
        Embeddings.open(killed)
    assert embed(model, shards, killed).manifest.fingerprint == expected.fingerprint
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize("failing_batch", [0, 1, 3, 5])
def test_a_run_stopped_at_any_batch_goes_on_after_the_last_whole_part(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any], failing_batch: int
) -> None:
    embed(make_model(), shards, tmp_path / "whole")
    stopped, resumed = make_model(fail_on_batch=failing_batch), make_model()
    with pytest.raises(InterruptedError):
        embed(stopped, shards, tmp_path / "out")
    embed(resumed, shards, tmp_path / "out")
    assert resumed.batches == 6 - failing_batch // 2 * 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("suffix", ["npy", "parquet", "json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_part_lost_or_damaged_before_the_end_is_embedded_again_and_no_other(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any], suffix: str, damage: str
) -> None:
    embed(make_model(), shards, tmp_path / "whole")
    out, resumed = tmp_path / "out", make_model()
    with pytest.raises(InterruptedError):
        embed(make_model(fail_on_batch=5), shards, out)
    path = out / "parts" / f"part-00000.{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + b"?" + data[-8:])
    if damage == "missing":
        path.unlink()
    embed(resumed, shards, out)
    assert resumed.batches == 4
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [".progress.json.1.part", "parts/.part-00001.npy.1.part", ".manifest.json.1.part"])
def test_what_a_killed_process_left_half_written_is_gone_in_the_end(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any], left: str
) -> None:
    embed(make_model(), shards, tmp_path / "whole")
    path = tmp_path / "out" / left
    if "progress" not in left:
        with pytest.raises(InterruptedError):
            embed(make_model(fail_on_batch=3), shards, tmp_path / "out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{")
    embed(make_model(), shards, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_killed_just_after_the_manifest_is_tidied_by_the_next(
    tmp_path: Path, shards: list[str], model: Encoder
) -> None:
    embed(model, shards, tmp_path / "out")
    before = contents(tmp_path / "out")
    for name in ("progress.json", ".lock", ".batch-size", "parts/.part-00000.npy.7.part"):
        (tmp_path / "out" / name).write_text("1")
    embed(model, shards, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_elsewhere_the_files_are_the_same(
    tmp_path: Path, shards: list[str], model: Encoder, workers: int
) -> None:
    embed(model, shards, tmp_path / "a")
    embed(model, shards, tmp_path / "b", workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_complete_folder_is_left_as_it_is_and_said_to_be_complete(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any], logged: pytest.LogCaptureFixture
) -> None:
    embed(make_model(), shards, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    again = make_model()
    summary = embed_shards(again, shards, tmp_path / "out", model_spec="colours")
    assert (summary.was_complete, summary.new_rows, summary.rows, again.batches) == (True, 0, 11, 0)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert "complete already" in logged.text


@pytest.mark.parametrize(
    ("fingerprint", "modality", "count", "named"),
    [("other", "image", 3, "model"), ("colours", "text", 3, "modality"), ("colours", "image", 2, "shards")],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_the_folder_of_other_work_is_refused(
    tmp_path: Path,
    shards: list[str],
    make_model: Callable[..., Any],
    *,
    fingerprint: str,
    modality: Modality,
    count: int,
    named: str,
    is_finished: bool,
) -> None:
    out = tmp_path / "out"
    if is_finished:
        embed(make_model(), shards, out)
    else:
        with pytest.raises(InterruptedError):
            embed(make_model(fail_on_batch=2), shards, out)
    before = contents(out)
    with pytest.raises(UsageError, match=f"another {named}" if is_finished else "unfinished work"):
        embed(make_model(fingerprint=fingerprint), shards[:count], out, modality=modality)
    assert contents(out) == before


def test_a_bad_image_is_counted_and_named_with_its_shard_and_reason(
    tmp_path: Path, shards: list[str], model: Encoder
) -> None:
    embeddings = embed(model, shards, tmp_path / "out")
    (line,) = (tmp_path / "out" / "incidents.jsonl").read_text().splitlines()
    incident = json.loads(line)
    assert embeddings.manifest.counts == {"rows": 11, "bad": 1, "parts": 3}
    assert "12" not in vector_of(embeddings)
    assert {name: incident[name] for name in ("part", "shard", "number", "key", "reason")} == {
        "part": "part-00001", "shard": shards[1], "number": 2, "key": "12", "reason": "unreadable image",
    }  # fmt: skip


def test_shards_without_one_usable_sample_fail_and_stay_unfinished(
    tmp_path: Path, write_shard: Callable[..., str], model: Encoder
) -> None:
    shard = write_shard(tmp_path / "0.tar", [("a", b"x", ["red"]), ("b", b"y", ["red"])])
    with pytest.raises(VlmError, match=r"Not one of 2 samples.*a unreadable image.*incidents.jsonl"):
        embed(model, [shard], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "incidents.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf"), 2.0])
def test_a_vector_that_is_not_of_unit_length_stops_the_work_and_names_its_sample(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    model = make_model()
    right = model.embed_images

    def spoil(images: Any) -> Any:
        vectors = right(images)
        if model.batches == 2:
            vectors[0] = value
        return vectors

    monkeypatch.setattr(model, "embed_images", spoil)
    with pytest.raises(VlmError, match=r"length (nan|0|inf|5.657) for '03 of .*00000.tar'"):
        embed(model, shards, tmp_path / "out")


def test_texts_have_one_row_a_caption_numbered_and_with_that_caption_alone(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Encoder]
) -> None:
    embeddings = embed(make_model(), shards, tmp_path / "out", modality="text")
    rows = vector_of(embeddings)
    assert len(embeddings) == 24
    for origin in embeddings.origins():
        ((text,),) = origin.captions.values()
        assert origin.uid == f"{origin.key}#{origin.caption_number}"
        assert np.allclose(rows[origin.uid], make_model().embed_texts([text]).numpy()[0], atol=1e-3)


def test_a_sample_without_caption_is_left_out_of_the_texts_and_counted(
    tmp_path: Path, write_shard: Callable[..., str], paint: Callable[..., bytes], model: Encoder
) -> None:
    shard = write_shard(tmp_path / "0.tar", [("a", paint("red"), []), ("b", paint("red"), ["red"])])
    embeddings = embed(model, [shard], tmp_path / "out", modality="text")
    assert embeddings.manifest.counts == {"rows": 1, "bad": 1, "parts": 1}
    assert json.loads((tmp_path / "out" / "incidents.jsonl").read_text())["reason"] == "no caption"


def test_the_byte_range_of_a_row_is_its_image(
    tmp_path: Path, write_shard: Callable[..., str], paint: Callable[..., bytes], model: Encoder
) -> None:
    shard = write_shard(tmp_path / "0.tar", [("a", paint("red"), ["x"]), ("b", paint("blue", "red"), ["x"])])
    for origin in embed(model, [shard], tmp_path / "out").origins():
        data = Path(shard).read_bytes()[origin.image_offset : origin.image_offset + origin.image_size]
        assert data == paint(*{"a": ["red"], "b": ["blue", "red"]}[origin.key])


def test_samples_with_one_key_in_two_shards_keep_their_own_rows(
    tmp_path: Path, write_shard: Callable[..., str], paint: Callable[..., bytes], model: Encoder
) -> None:
    shards = [write_shard(tmp_path / f"{c}.tar", [("a", paint(c), [c])]) for c in ("red", "blue")]
    rows = vector_of(embed(model, shards, tmp_path / "out"))
    assert sorted(rows) == ["a@blue", "a@red"]
    assert float(rows["a@blue"] @ rows["a@red"]) == 0


def test_a_shard_cut_short_is_refused_unless_damage_is_allowed(
    tmp_path: Path, shards: list[str], model: Encoder
) -> None:
    os.truncate(shards[2], 2_600)
    with pytest.raises(VlmError, match="is damaged"):
        embed(model, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert embed(model, shards, tmp_path / "out", allow_damage=True).manifest.counts["parts"] == 3


def test_the_model_is_named_so_that_it_is_found_from_anywhere(
    tmp_path: Path, shards: list[str], model: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert embed(model, shards, tmp_path / "a", model_spec="runs").space.model == str(tmp_path / "runs")
    assert embed(model, shards, tmp_path / "b", model_spec="ViT-B-32:x").space.model == "ViT-B-32:x"


def test_the_shards_are_the_same_wherever_they_lie(tmp_path: Path, shards: list[str], model: Encoder) -> None:
    (tmp_path / "moved").mkdir()
    moved = [str(Path(shard).rename(tmp_path / "moved" / Path(shard).name)) for shard in shards]
    first = embed(model, moved, tmp_path / "out").manifest
    back = [str(Path(shard).rename(tmp_path / "shards" / Path(shard).name)) for shard in moved]
    assert embed(model, back, tmp_path / "again").manifest.inputs == first.inputs


def test_a_selection_embeds_only_what_it_names_and_is_part_of_what_the_folder_is(tmp_path, shards, model):
    whole = select_all(shards)
    times = (np.array([1, 0, 3, 0], np.uint16), np.zeros(4, np.uint16), np.ones(4, np.uint16))
    some = Selection(shards=whole.shards, times=times)
    summary = embed_shards(model, shards, tmp_path / "some", model_spec="colours", batch_size=3, selection=some)
    assert summary.rows == 6
    keys = [origin.key for origin in Embeddings.open(tmp_path / "some").origins()]
    assert keys == ["00", "02", "20", "21", "22", "23"]
    with pytest.raises(UsageError, match="another selection"):
        embed_shards(model, shards, tmp_path / "some", model_spec="colours", batch_size=3)
