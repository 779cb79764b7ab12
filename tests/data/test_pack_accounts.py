"""Whatever lies in a table or a folder: what goes in is packed, or counted by its reason."""

import contextlib
import csv
import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.tar_fixture import tiny_image
from vlm.data.pack import REJECTED, PackConfig, pack
from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import open_source, recognise_source
from vlm.errors import VlmError

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ALL_BAD = PackConfig(max_bad_share=1.0, samples_per_shard=7)

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
QUOTED = st.sampled_from(['"', '"open', 'end"', 'in"side', '"both"', "a, b", "c\td", "e;f", "two\nlines", "", "  "])
CAPTION = st.one_of(TEXT, QUOTED)
IMAGE = st.sampled_from(["0.jpg", "1.jpg", "2.jpg", "gone.jpg", "broken.jpg", "../out.jpg", "/etc/hostname", ""])


def packed(out: Path) -> list[dict]:
    samples = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for entry in tar:
                if entry.name.endswith(".json"):
                    file = tar.extractfile(entry)
                    assert file is not None
                    samples.append(json.load(file))
    return samples


def accounts(source: Path, out: Path, **options) -> tuple[list[dict], list[dict], int]:
    """Samples packed, rejects listed, and pairs of the source; every number adds up."""
    pairs = open_source(str(source), SourceOptions(**options))
    summary = pack(pairs, out, ALL_BAD)
    samples = packed(out)
    rejected = []
    if (out / REJECTED).is_file():
        rejected = [json.loads(line) for line in (out / REJECTED).read_text(encoding="utf-8").split("\n") if line]
    assert summary.samples == len(samples)
    assert summary.bad == len(rejected) == sum(summary.rejected.values())
    assert len(pairs) == len(samples) + len(rejected)
    assert all(bad["reason"] and bad["file"] for bad in rejected)
    return samples, rejected, len(pairs)


def write_images(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(tiny_image(number))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")


def unquoted(text: str) -> str:
    """Quotes around a field written by hand may be text or may not; the words are the same."""
    return text.replace('"', "").strip()


def by_hand(caption: str, delimiter: str) -> str:
    """A caption in one line without the delimiter; a quote that opens it unclosed would reach into the next line."""
    line = " ".join(caption.split()).replace(delimiter, "/")
    return line.lstrip('"') if line.count('"') % 2 else line


@FEW
@given(
    rows=st.lists(st.tuples(IMAGE, CAPTION), min_size=1, max_size=12),
    form=st.sampled_from(["csv", "tsv", "semicolons", "jsonl"]),
    raw=st.booleans(),
)
def test_rows_of_a_table_are_packed_or_counted(rows, form, raw):
    with TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        write_images(source)
        rows = [("0.jpg", "a sound row"), *rows]
        if form == "jsonl":
            lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
            (source / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
        else:
            delimiter = {"csv": ",", "tsv": "\t", "semicolons": ";"}[form]
            ending = "tsv" if form == "tsv" else "csv"
            with (source / f"captions.{ending}").open("w", newline="", encoding="utf-8") as file:
                if raw:  # as people write them by hand: nothing quoted, one row a line
                    rows = [(image, by_hand(caption, delimiter)) for image, caption in rows]
                    file.write(
                        "".join(f"{image}{delimiter}{caption}\n" for image, caption in [("image", "caption"), *rows])
                    )
                else:
                    csv.writer(file, delimiter=delimiter).writerows([("image", "caption"), *rows])
        samples, rejected, _ = accounts(source, Path(name) / "out")

        # every row is in a sample, or its image is among the rejected
        captions = {sample["image"]: {unquoted(text) for text in sample["captions"]} for sample in samples}
        lost = {bad["file"] for bad in rejected}
        for image, caption in rows:
            if image.strip() in captions:
                assert not unquoted(caption) or unquoted(caption) in captions[image.strip()]
            else:
                assert image in lost or not image.strip() or any(file.startswith("row ") for file in lost)


def refusal(source: Path, out: Path, **options) -> str:
    """What packing is refused with; empty where it is not."""
    try:
        accounts(source, out, **options)
    except VlmError as error:
        return str(error)
    return ""


HEADERS = {
    "csv": b"image,caption\n0.jpg,x\n",
    "jsonl": b'{"image": "0.jpg", "caption": "x"}\n',
    "json": b"",
    "parquet": b"",
}


@FEW
@given(content=st.one_of(st.binary(max_size=200), TEXT.map(str.encode)), ending=st.sampled_from(sorted(HEADERS)))
def test_any_content_of_a_table_is_packed_counted_or_refused_in_one_sentence(content, ending):
    with TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        write_images(source)
        (source / f"captions.{ending}").write_bytes(HEADERS[ending] + content)
        assert "\n" not in refusal(source, Path(name) / "out")


NAMES = ["a.jpg", "b.JPG", "c.png", "d", "e.heic", "f.txt", "a.txt", "a.json", "notes.md", "g.csv", "h.tar"]
FOLDERS = ["", "cat", "dog", "train/cat", "Images", "00000"]
CONTENTS = [b"", b"a caption", b"{", b'{"caption": "a jug"}', b"image,caption\na.jpg,x\n", tiny_image(1), b"BM"]


@FEW
@given(
    files=st.dictionaries(
        st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), st.sampled_from(CONTENTS), min_size=1, max_size=10
    ),
    mode=st.sampled_from(["", "none", "optional"]),
)
def test_files_of_a_folder_are_packed_rejected_left_aside_or_refused(files, mode):
    options = SourceOptions(captions=mode)
    with TemporaryDirectory() as name:
        source = Path(name) / "source"
        for (folder, file), content in files.items():
            path = source / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert "\n" not in refusal(source, Path(name) / "out", captions=mode)
        with contextlib.suppress(VlmError):
            pairs, recognition = recognise_source(str(source), options)
            if recognition.kind in ("texts", "classes", "images"):
                # an image is a pair, and every other file is beside one or left aside
                num_left = sum(recognition.left_aside.values())
                num_beside = sum(file.endswith((".txt", ".json")) for _, file in files)
                assert len(pairs) + num_left <= len(files) <= len(pairs) + num_left + num_beside


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_line_that_is_no_utf8_is_one_bad_row(tmp_path, encoding):
    write_images(tmp_path)
    table = io.StringIO()
    csv.writer(table).writerows([("image", "caption"), ("0.jpg", "café"), ("1.jpg", "plain"), ("2.jpg", "naïve")])
    (tmp_path / "captions.csv").write_bytes(table.getvalue().encode(encoding))
    samples, rejected, _ = accounts(tmp_path, tmp_path / "out")
    assert (len(samples), len(rejected)) == ((3, 0) if encoding == "utf-8" else (1, 2))
