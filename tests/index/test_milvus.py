"""The engine Milvus, on milvus-lite: what FAISS does, done there; what it lacks, refused with the reason."""

import json
import runpy
import socket
import string
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'vlm-pipeline[milvus]'")

import vlm
from tests.index.compare_engines import build_both, compare, write_embeddings
from tests.index.index_fixture import vectors
from tests.index.origin_fixture import make_origin
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_types import TuningParams
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter
from vlm.index.engine_base import FilteredRows, check_index, open_engine_index, open_writer, row_set
from vlm.index.filter_language import parse_filter
from vlm.index.milvus.connection import MilvusAddress, MilvusConnection
from vlm.index.milvus.milvus_writer import MilvusWriter, build_milvus_index
from vlm.manifest import read_manifest
from vlm.server.served_index import ServedIndex

ORACLE = runpy.run_path(str(Path(__file__).with_name("model_based.py")))["Oracle"]
CHANGES = ("add", "update", "delete", "compact", "set", "rollback")
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = [{"colour": COLOURS[row % 3], "width": row, "tags": ["a", "b"][: row % 3]} for row in range(30)]
    return write_embeddings(tmp_path_factory.mktemp("milvus") / "embeddings", metadata, seed=0)


@pytest.fixture(scope="module")
def built(embeddings: Path) -> Path:
    """An index that is only read."""
    out = embeddings.with_name("index")
    build_milvus_index(embeddings, out)
    return out


@pytest.fixture
def index(embeddings: Path, tmp_path: Path) -> Path:
    """An index to change."""
    build_milvus_index(embeddings, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place, because an operation waits for the disk some ten times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("kind", "tuning", "operations", "least"),
    [
        ("flat", TuningParams(), 60, 1.0),
        pytest.param("flat", TuningParams(), 600, 1.0, marks=pytest.mark.slow),
        pytest.param("hnsw", TuningParams(), 300, 0.97, marks=pytest.mark.slow),
        pytest.param("ivf", TuningParams(nlist=12, nprobe=6), 300, 0.8, marks=pytest.mark.slow),
        pytest.param("ivfsq", TuningParams(nlist=12, nprobe=6), 300, 0.8, marks=pytest.mark.slow),
    ],
)
def test_random_changes_searches_and_crashes_leave_what_a_plain_dictionary_has(
    folder: Path, kind: str, tuning: TuningParams, operations: int, least: float
) -> None:
    oracle = ORACLE.begin(folder, 4, kind=kind, rows=120, tuning=tuning, engine="milvus")
    for _ in range(operations):
        oracle.step(crash_share=0.4)
    done = " ".join(oracle.done)
    assert all(name in done for name in (*CHANGES, "before the commit", "search where"))
    assert np.mean(oracle.recalled or [1.0]) >= least
    for opened, _ in oracle.readers:
        opened.close()
    report = check_index(folder / "index")
    assert report.faults == ()


@pytest.mark.parametrize("filters", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_filters_and_filtered_searches_have_equal_answers_on_both_engines(tmp_path: Path, filters: int) -> None:
    indexes = build_both(tmp_path, rows=150, seed=2)
    comparison = compare(indexes, filters=filters, seed=2)
    for opened in indexes:
        opened.close()
    assert comparison.differences == ()
    assert comparison.answered > 0.8 * filters
    assert comparison.matched > filters


def test_the_commands_take_an_index_of_milvus(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    def values(*words: object) -> dict:
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    index = tmp_path / "index"
    assert values("index", "build", embeddings, index, "--engine", "milvus")["kind"] == "flat"
    info = values("index", "info", index)
    assert [info[name] for name in ("engine", "rows", "address", "dimension")] == ["milvus", 30, "milvus.db", 8]
    hits = values("search", index, "--like", "u4", "--where", "colour = 'green' and width < 9")["hits"]
    assert hits[0]["uid"] == "u4"
    assert {hit["uid"] for hit in hits} == {"u1", "u4", "u7"}
    assert values("index", "delete", index, "--where", "colour = 'red'")["removed"] == 10
    assert values("index", "check", index)["rows"] == 20
    assert values("index", "rollback", index)["rows"] == 30
    for words, reason in (
        (("search", index, "--like", "u4", "--words", "dog"), "no full-text search"),
        (("index", "export", index, tmp_path / "rows", "--to", "npy"), "are kept by the engine milvus"),
        (("index", "build", embeddings, tmp_path / "b", "--engine", "milvus", "--recall", "0.9"), "--index-type"),
        (("index", "build", embeddings, tmp_path / "b", "--address", "http://here:1"), "add --engine milvus"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert reason in err
    with pytest.raises(UsageError, match="engine = 'Milvus'; give faiss or milvus"):
        vlm.build_index(embeddings, tmp_path / "b", engine="Milvus")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "b").exists()


def test_python_calls_search_group_and_count_as_with_faiss(built: Path, embeddings: Path, tmp_path: Path) -> None:
    vlm.build_index(embeddings, tmp_path / "faiss", index_type="flat")
    answers = []
    for folder in (built, tmp_path / "faiss"):
        with vlm.open_index(folder) as opened:
            hits = [
                [(hit.uid, round(hit.score, 5), hit.metadata) for hit in result]
                for result in (
                    opened.search(vector=vectors(1, 3)[0][:8], top=5),
                    opened.search(like="u3", minus=(), where="tags has 'a' and not width in (4, 7)", diversity=0.5),
                    opened.search(like=["u3", "u4"], at_least=0.2, group_duplicates=0.999),
                    opened.search(like="u3", where="colour = 'rde'"),
                )
            ]
            assert "u3" in opened
            assert "nobody" not in opened
            hint = opened.search(like="u3", where="colour = 'rde'").hint
        reader = open_engine_index(folder)
        rows = reader.catalogue.where(parse_filter("width > 10"))
        counts = [reader.catalogue.count_values(name, top=3, rows=rows) for name in ("colour", "tags")]
        # a set of rows is another form of the same selection
        same_rows = row_set(rows)
        assert [reader.catalogue.count_values(name, top=3, rows=same_rows) for name in ("colour", "tags")] == counts
        query = reader.snapshot.vectors(np.array([3]))
        for found, again in zip(
            reader.snapshot.nearest(query, 4, rows), reader.snapshot.nearest(query, 4, same_rows), strict=True
        ):
            np.testing.assert_allclose(again, found, atol=1e-6)
        answers.append((hits, hint, counts, reader.catalogue.field_summaries()))
        reader.close()
    assert answers[0] == answers[1]
    assert "'red' is a value of colour" in answers[0][1]


def test_pages_of_a_search_show_every_row_once(built: Path) -> None:
    with vlm.open_index(built) as opened:
        after, uids = "", []
        for _ in range(10):
            page = opened.search(like="u3", top=7, after=after)
            uids += [hit.uid for hit in page]
            after = page.next
            if not after:
                break
    assert sorted(uids) == sorted(f"u{row}" for row in range(30))


def test_texts_of_a_filter_never_reach_milvus_as_they_are(built: Path) -> None:
    reader = open_engine_index(built)
    plain = set(string.ascii_letters + string.digits + " _()[],\"'<>=%")
    for text in ('" or row >= 0 or "', "\\", "') or true --", "\n", "%_", "狗", "\\%'"):
        quoted = "'" + text.replace("'", "''") + "'"
        for operator in ("=", "!=", "<", "like", "not like", "in"):
            literal = f"({quoted})" if operator == "in" else quoted
            selection = reader.catalogue.where(parse_filter(f"colour {operator} {literal}"))
            assert isinstance(selection, FilteredRows)
            assert set(selection.expression) <= plain
        assert len(reader.catalogue.where(parse_filter(f"colour = {quoted}"))) == 0
    reader.close()


def test_a_second_reader_goes_on_seeing_its_version_until_it_refreshes(index: Path) -> None:
    reader = open_engine_index(index)
    with open_writer(index) as writer:
        info = writer.delete_rows(writer.snapshot.catalogue.where(parse_filter("colour = 'red'")))
        assert (info.removed, info.rows, info.dead, info.generation) == (10, 20, 10, 2)
        assert len(reader.search(vectors(1, 1)[:, :8], 100)[0]) == 30
        writer.compact()
    with pytest.raises(VlmError, match=r"Version 1 .* was compacted away"):
        reader.search(vectors(1, 1)[:, :8], 100)
    assert reader.refresh()
    assert len(reader.search(vectors(1, 1)[:, :8], 100)[0]) == 20
    reader.close()


def test_a_build_that_fails_leaves_neither_folder_nor_collection(tmp_path: Path) -> None:
    space = EmbeddingSpace(model="given", fingerprint="given", dimension=8, modality="image")
    writer = EmbeddingsWriter(tmp_path / "embeddings", space=space, identity={})
    long = {f"column{number}": "x" * 900 for number in range(60)}
    writer.add(
        "/nowhere/0.tar", vectors(2, 0)[:, :8] * 0 + np.eye(2, 8), [make_origin("a", {}), make_origin("b", long)]
    )
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    address = tmp_path / "shared.db"
    with pytest.raises(UsageError, match=r"The metadata of 'b' take .* bytes; Milvus takes 65,535 of a row"):
        build_milvus_index(tmp_path / "embeddings", tmp_path / "index", address=str(address))
    assert not (tmp_path / "index").exists()
    connection = MilvusConnection(MilvusAddress(str(address)), tmp_path)
    assert connection.client.list_collections() == []
    connection.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ivfpq"}, "has no product quantization"),
        ({"kind": "sq8"}, "ivfsq"),
        ({"tuning": TuningParams(rerank=4)}, "--refine-factor"),
        ({"address": "milvus"}, "a local file that ends in .db"),
        ({"address": "ftp://host:1"}, "is not an address of a Milvus server"),
        ({"address": "http://me:secret@host:19530"}, "VLM_MILVUS_TOKEN"),
        ({"address": "/nowhere/at/all.db"}, "there is no folder /nowhere/at"),
    ],
)
def test_what_milvus_lacks_is_refused_with_the_reason(
    embeddings: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UsageError) as error_info:
        build_milvus_index(embeddings, tmp_path / "index", **options)
    assert message in str(error_info.value)
    assert "secret" not in str(error_info.value)
    assert not (tmp_path / "index").exists()


def test_a_search_by_words_and_a_map_are_refused(built: Path) -> None:
    with vlm.open_index(built) as opened:
        with pytest.raises(UsageError, match="no full-text search of captions: leave --words out"):
            opened.search(like="u3", words="dog")
        with pytest.raises(UsageError, match="A map needs the rows of a FAISS index"):
            opened.make_map()


def test_a_server_that_is_not_there_is_named(embeddings: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.perf_counter()
    with pytest.raises(VlmError, match=f"Milvus at {address} cannot be reached"):
        build_milvus_index(embeddings, tmp_path / "index", address=address)
    assert time.perf_counter() - started < 60
    assert not (tmp_path / "index").exists()


def test_no_token_is_ever_written(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_MILVUS_TOKEN", "root:very-secret")
    with open_writer(index) as writer:
        writer.delete(["u1"])
    assert read_manifest(index, "index").generation == 2
    for path in index.rglob("*.json"):
        assert "very-secret" not in path.read_text()


def test_an_interrupted_change_is_rolled_back_at_once_or_else_before_the_next(
    index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures: dict[str, BaseException] = {"manifest": KeyboardInterrupt()}

    def fail(point: str) -> None:
        if point in failures:
            raise failures[point]

    with MilvusWriter(index, failpoint=fail) as writer:
        # by then the deleted row is marked
        with pytest.raises(KeyboardInterrupt):
            writer.delete(["u1"])
        assert check_index(index).strays == ()
        failures["bringing deleted rows back"] = VlmError("no server")
        with pytest.raises(KeyboardInterrupt):
            writer.delete(["u1"])
        assert "stays until the next one rolls it back (no server)" in caplog.text
        assert len(check_index(index).strays) == 1
        failures.clear()
        assert writer.delete(["u2"]).rows == 29
        assert check_index(index).strays == ()
    reader = open_engine_index(index)
    assert reader.catalogue.find("u1") is not None
    reader.close()


def test_damage_of_the_collection_is_found(index: Path) -> None:
    reader = open_engine_index(index)
    collection = reader.info().collection
    reader.close()
    connection = MilvusConnection(MilvusAddress("milvus.db"), index)
    connection.load(collection)
    connection.delete(collection, "row == 3")
    connection.client.upsert(collection, [{"row": 4, "terms": ["f0"]}], partial_update=True)
    connection.close()
    whats = [fault.what for fault in check_index(index).faults]
    assert "the collection has 29 live rows, 30 were written" in whats
    assert any("the facts of row 4 (u4)" in what for what in whats)


def test_shards_that_moved_are_said_to_lie_elsewhere(index: Path) -> None:
    with open_writer(index) as writer:
        assert writer.relocate({"/nowhere/0.tar": "/elsewhere/0.tar", "/unknown.tar": "/known.tar"}).edited == 30
        assert writer.relocate({"/nowhere/0.tar": "/elsewhere/0.tar"}).edited == 0
        catalogue = writer.snapshot.catalogue
        assert catalogue.image_ends() == {"/elsewhere/0.tar": 0}
        assert catalogue.sample_numbers("/elsewhere/0.tar") == [0] * 30
        assert catalogue.sample_numbers("/nowhere/0.tar") == []
        assert writer.snapshot.details.shards == ("/elsewhere/0.tar",)
        assert writer.rollback().rows == 30
        assert writer.snapshot.catalogue.image_ends() == {"/nowhere/0.tar": 0}
    assert check_index(index).faults == ()


def test_the_service_counts_facets_of_milvus(built: Path) -> None:
    served = ServedIndex.open(name="here", folder=built)
    counts = served.facets(["colour", "tags"], where="width < 10", top=5)
    assert [(count.value, count.rows) for count in counts["colour"]] == [("red", 4), ("blue", 3), ("green", 3)]
    assert [(count.value, count.rows) for count in counts["tags"]] == [("a", 6), ("b", 3)]
    assert served.live_entries([3])[0].uid == "u3"
    served.close()
