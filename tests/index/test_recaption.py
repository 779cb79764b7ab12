"""New captions of whole shards: true, whole whatever kills the work, and refused for other shards."""

import io
import json
import os
import random
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import vlm
from tests import preloaded
from tests.random_model import random_model, write_random_model
from tests.waiting import wait_until
from vlm.cli.main import main
from vlm.data.caption_sampler import CaptionSidecar, read_captions
from vlm.data.shards import expand_shards
from vlm.data.tar import open_index
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError, VlmError
from vlm.index.recaption import RecaptionOptions, RecaptionSummary, recaption
from vlm.models.model import VisionLanguageModel

ROOT = Path(__file__).parents[2]
DECODING = vlm.DecodingOptions(sample=True, captions=2, top_p=0.9, max_length=8)


@pytest.fixture(scope="module")
def model(scene_tokenizer) -> VisionLanguageModel:
    return random_model("tiny-coca", open_tokenizer(str(scene_tokenizer), 24))


@pytest.fixture(scope="module")
def shards(scene_shards, tmp_path_factory) -> list[str]:
    """Three shards of 12 scenes, one of which has a damaged image, and one bytes that are none."""
    folder = tmp_path_factory.mktemp("shards")
    members: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    with tarfile.open(expand_shards(str(scene_shards / "train"))[0]) as source:
        for entry in source:
            file = source.extractfile(entry)
            assert file is not None
            members.setdefault(entry.name.split(".")[0], []).append((entry, file.read()))
    keys = list(members)
    for number in range(3):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key in keys[number * 12 : number * 12 + 12]:
                for entry, content in members[key]:
                    is_broken = key in (keys[5], keys[30]) and not entry.name.endswith(("txt", "json"))
                    kept = (content[:40] if key == keys[5] else b"no image") if is_broken else content
                    entry.size = len(kept)
                    tar.addfile(entry, io.BytesIO(kept))
    return expand_shards(str(folder))


def write(model: VisionLanguageModel, shards: list[str], out: Path, **options: Any) -> RecaptionSummary:
    options = {"model_spec": "random", "decoding": DECODING, "batch_size": 5} | options
    return recaption(model, shards, out, RecaptionOptions(**options))


def files_of(folder: Path) -> dict[str, bytes]:
    """All files, the manifest without its time and command."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "manifest.json":
                values = json.loads(content)
                del values["made_at"], values["command"]
                content = json.dumps(values).encode()
            files[str(path.relative_to(folder))] = content
    return files


@pytest.fixture(scope="module")
def whole(model, shards, tmp_path_factory) -> Path:
    """The captions, written at one go."""
    out = tmp_path_factory.mktemp("captions") / "whole"
    write(model, shards, out)
    return out


def test_each_sample_has_its_own_captions_and_bad_ones_are_listed(model, shards, whole):
    sidecar = CaptionSidecar.open(whole)
    assert sidecar.manifest.counts == {"samples": 36, "bad": 2, "shards": 3}
    assert sidecar.manifest.configuration["decoding"] == DECODING.to_values()
    assert sidecar.manifest.inputs["model"] == model.fingerprint
    skipped = [json.loads(line) for line in (whole / "incidents.jsonl").read_text().splitlines()]
    bad = {record["key"] for record in skipped}
    assert len(bad) == 2
    for shard, path in zip(shards, sidecar.tables_of(shards), strict=True):
        index = open_index(shard)
        rows = parquet.read_table(path).to_pylist()
        assert [row["key"] for row in rows] == [entry.key for entry in index]
        with tarfile.open(shard) as tar:
            for row in rows:
                assert len(row["captions"]) == len(row["log_likelihoods"]) == (0 if row["key"] in bad else 2)
                if row["captions"]:
                    images = [name for name in tar.getnames() if Path(name).stem == row["key"]]
                    (name,) = (name for name in images if not name.endswith((".json", ".txt")))
                    file = tar.extractfile(name)
                    assert file is not None
                    pixels = torch.from_numpy(model.view(file.read()))[None]
                    captions = model.decode_captions(pixels, DECODING).captions[0]
                    assert row["captions"] == [caption.text for caption in captions]
                    likelihoods = [caption.log_likelihood for caption in captions]
                    assert row["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-4)


def test_the_summary_counts_what_is_there(model, shards, tmp_path):
    first = write(model, shards, tmp_path / "out")
    assert (first.samples, first.captioned, first.captions, first.bad) == (36, 34, 68, 2)
    assert first.different > 30
    assert first.new_samples == 36
    assert sum(first.incidents.values()) == 2
    assert first.mean_log_likelihood < 0
    again = write(model, shards, tmp_path / "out")
    assert again.was_complete
    assert again.new_samples == 0
    assert again.different == first.different


class Interrupted(VisionLanguageModel):
    """Ends the work at its third batch, as a signal would."""

    batches = 0

    def decode_captions(self, *arguments: Any, **options: Any) -> Any:
        Interrupted.batches += 1
        if Interrupted.batches % 4 == 0:
            raise KeyboardInterrupt
        return super().decode_captions(*arguments, **options)


def test_interrupted_at_any_moment_and_repeated_it_ends_with_the_same_files(model, shards, whole, tmp_path):
    out = tmp_path / "out"
    interrupted = Interrupted(
        **{name: getattr(model, name) for name in ("name", "network", "config", "view", "tokenizer")}
    )
    num_interrupts = 0
    while num_interrupts < 100:
        try:
            write(interrupted, shards, out)
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            with pytest.raises(UsageError, match="unfinished"):
                CaptionSidecar.open(out)
            # what a killed process leaves behind
            (out / "parts" / ".part-00001.parquet.0123.part").write_bytes(b"half")
    assert 2 <= num_interrupts < 100
    assert files_of(out) == files_of(whole)


def test_processes_share_the_shards_and_damaged_tables_are_made_again(model, shards, whole, tmp_path):
    from vlm.index.embed import ProcessRank

    out = tmp_path / "out"
    first = write(model, shards, out, share=ProcessRank(0, 2))
    assert (first.missing_parts, first.ended_here) == (1, False)
    second = write(model, shards, out, share=ProcessRank(1, 2))
    assert (second.missing_parts, second.ended_here) == (0, True)
    assert files_of(out) == files_of(whole)
    (out / "parts" / "part-00002.parquet").write_bytes(b"damaged")
    assert write(model, shards, out).new_samples == 12
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoding": vlm.DecodingOptions()}, "made with another decoding"),
        ({"shards": slice(0, 2)}, "made with another shards"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_other_work_in_the_folder_is_refused(model, shards, whole, change, message):
    shards = shards[change.pop("shards", slice(None))]
    with pytest.raises(UsageError, match=message):
        write(model, shards, whole, **change)


def test_a_model_without_a_decoder_and_images_without_a_usable_one_are_named(model, shards, scene_tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no caption decoder"):
        write(random_model("tiny", open_tokenizer(str(scene_tokenizer), 24)), shards, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in {"a.jpg": b"none", "a.txt": b"text"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(VlmError, match="Not one of 1 samples could be captioned"):
        write(model, [str(tmp_path / "bad.tar")], tmp_path / "bad")


def test_captions_of_other_shards_are_refused_by_name(whole, shards, scene_shards, tmp_path):
    sidecar = CaptionSidecar.open(whole)
    # moved and in another order, they are the same shards
    moved = tmp_path / "moved.tar"
    moved.write_bytes(Path(shards[1]).read_bytes())
    assert [path.name for path in sidecar.tables_of([str(moved), shards[0]])] == [
        "part-00001.parquet",
        "part-00000.parquet",
    ]
    other = expand_shards(str(scene_shards / "val"))[0]
    with pytest.raises(UsageError, match=f"captions of other shards: {other} is none of the 3"):
        sidecar.tables_of([shards[0], other])
    with pytest.raises(UsageError, match="There are no captions at"):
        CaptionSidecar.open(tmp_path / "nowhere")
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(VlmError, match="cannot be read"):
        read_captions(tmp_path / "broken.parquet")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, scene_tokenizer) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model", "tiny-coca", scene_tokenizer)


def test_the_verb_writes_beside_the_shards_what_the_call_returns(model_folder, shards, capsys, tmp_path):
    folder = str(Path(shards[0]).parent)
    words = ["caption", str(model_folder), folder, "--device", "cpu", "--workers", "0", "--max-length", "8", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert Path(printed["folder"]) == Path(folder) / "captions"
    # the shards are still shards
    assert expand_shards(folder) == shards
    decoding = vlm.DecodingOptions(max_length=8)
    result = vlm.caption_shards(model_folder, folder, decoding=decoding, workers=0, device="cpu").to_json()
    ignored = ("seconds", "new_samples", "was_complete", "ended_here")
    assert {name: printed[name] for name in printed if name not in ignored} == {
        name: result[name] for name in result if name not in ignored
    }
    assert main(["caption", str(model_folder), folder, *shards]) == 2
    assert "Shards are one argument" in capsys.readouterr().err
    assert main(["caption", str(model_folder), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--out and --processes are for shards" in capsys.readouterr().err


def kill_during(command: list[str], out: Path, wait_seconds: float) -> int:
    """Start the command and kill it a while after it has written one more table; its exit status."""
    process = preloaded.Popen(command, cwd=ROOT)
    before = len(list(out.glob("parts/*.json")))
    wait_until(lambda: process.poll() is not None or len(list(out.glob("parts/*.json"))) > before)
    time.sleep(wait_seconds)
    process.kill()
    return process.wait()


@pytest.mark.slow
def test_killed_ten_times_over_a_thousand_shards_it_equals_an_uninterrupted_one(model_folder, shards, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(1000):
        os.symlink(shards[number % 3], folder / f"{number:05d}.tar")
    flags = ["--device", "cpu", "--workers", "1", "--sample", "--max-length", "6", "--batch-size", "12"]

    def command(out: str) -> list[str]:
        words = ["caption", str(model_folder), str(folder), "--out", str(tmp_path / out), *flags]
        return [sys.executable, "-m", "vlm", *words]

    chance = random.Random(0)
    for _ in range(10):
        assert kill_during(command("killed"), tmp_path / "killed", chance.random() / 2) == -signal.SIGKILL
    assert preloaded.Popen(command("killed"), cwd=ROOT).wait() == 0
    assert preloaded.Popen(command("whole"), cwd=ROOT).wait() == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
