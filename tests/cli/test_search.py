"""`vlm search` over an index of points on a circle, asked by stored items, so that no model is needed."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.service.circle_fixture import CircleModel
from vlm.cli.main import main
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Origin, normalize_rows


def origin(number: int) -> Origin:
    return Origin(
        uid=f"u{number}",
        key=f"u{number}",
        shard="/nowhere/0.tar",
        number=number,
        image_offset=0,
        image_size=0,
        caption_number=None,
        captions={"en": (f"caption {number}",)},
        metadata={"n": number},
    )


@pytest.fixture
def index(tmp_path: Path) -> Path:
    angles = np.radians(np.arange(0, 90, 10))
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    space = EmbeddingSpace(model="nowhere", fingerprint="none", dimension=2, modality="image")
    writer = EmbeddingsWriter(tmp_path / "vectors", space=space, identity={})
    writer.add("/nowhere/0.tar", vectors, [origin(number) for number in range(len(vectors))])
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(tmp_path / "vectors", tmp_path / "index", kind="flat")
    return tmp_path / "index"


@pytest.fixture
def search(index: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of `vlm search INDEX …`."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["search", str(index), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


Search = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("words", [("search", "INDEX", "--like", "u0"), ("index", "info", "INDEX")])
def test_an_answer_without_a_model_loads_no_heavy_library(index: Path, words: tuple[str, ...]) -> None:
    code = (
        "import sys; from vlm.cli.main import main\n"
        f"code = main({[str(index) if word == 'INDEX' else word for word in words]})\n"
        "print(*sorted(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "open_clip", "transformers", "pyarrow", "pydantic", "matplotlib"} & set(done.stdout.split())


def test_a_filter_narrows_and_the_cursor_goes_on(search: Search) -> None:
    words = ["--like", "u0", "--where", "n >= 2 and n != 3", "--top", "2"]
    code, out, err = search(*words)
    assert code == 0
    assert "caption 2" in out
    assert "caption 4" in out
    after = err.split("--after ")[1].split()[0]
    code, out, _ = search(*words, "--after", after, "--json")
    assert [hit["uid"] for hit in json.loads(out)["hits"]] == ["u5", "u6"]


def test_words_duplicates_diversity_and_the_lowest_cosine_reach_the_question(search: Search) -> None:
    code, out, _ = search(
        *("--like", "u0", "--words", "caption 3", "--group-duplicates", "0.99", "--diversity", "0.1"),
        *("--at-least", "0.2", "--json"),
    )
    assert code == 0
    result = json.loads(out)
    asked = {name: result["question"][name] for name in ("words", "duplicates", "diversity", "at_least")}
    assert asked == {"words": "caption 3", "duplicates": 0.99, "diversity": 0.1, "at_least": 0.2}
    assert {"fused", "similar", "score"} <= set(result["hits"][0])
    assert "u3" in {hit["uid"] for hit in result["hits"]}


def test_what_is_likely_relevant_is_shown_with_its_probability(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    space = EmbeddingSpace(model="nowhere", fingerprint="none", dimension=16, modality="image")
    writer = EmbeddingsWriter(tmp_path / "vectors", space=space, identity={})
    writer.add("/nowhere/0.tar", normalize_rows(vectors), [origin(number) for number in range(60)])
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(tmp_path / "vectors", tmp_path / "index", kind="flat")
    words = ["search", str(tmp_path / "index"), "--like", "u3"]
    assert main([*words, "--relevant", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [hit["uid"] for hit in result["hits"]] == ["u3"]
    assert result["question"]["relevant"] == 0.9
    assert result["relevance"]["kind"] == "rows"
    assert result["hits"][0]["probability"] > 0.99
    # a probability asks for relevance by itself
    assert main([*words, "--min-probability", "0.25"]) == 0
    table = capsys.readouterr().out
    assert "probability" in table
    assert "u3" in table


def test_grouped_answers_show_their_number(search: Search) -> None:
    _, out, _ = search("--like", "u0", "--group-duplicates", "0.9")
    assert "duplicates" in out


@pytest.mark.parametrize("is_piped", [False, True])
def test_questions_of_a_file_are_answered_in_lines(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_piped: bool
) -> None:
    text = '{"items": ["u8"]}\n\n{"items": ["u0"], "minus": [], "top": 1}\n'
    (tmp_path / "questions").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code, out, _ = search("--queries", "-" if is_piped else str(tmp_path / "questions"), "--top", "2")
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    assert [[hit["uid"] for hit in result["hits"]] for result in results] == [["u8", "u7"], ["u0"]]


def test_a_vector_asks_alone_or_a_row_after_the_other(search: Search, tmp_path: Path) -> None:
    rows = np.array([[0, 2], [3, 0]], np.float32)
    np.save(tmp_path / "one.npy", rows[0])
    np.save(tmp_path / "all.npy", rows)
    code, out, _ = search("--vector", str(tmp_path / "one.npy"), "--top", "1", "--json")
    assert (code, [hit["uid"] for hit in json.loads(out)["hits"]]) == (0, ["u8"])
    code, out, _ = search("--queries", str(tmp_path / "all.npy"), "--top", "1")
    assert code == 0
    assert [json.loads(line)["hits"][0]["uid"] for line in out.splitlines()] == ["u8", "u0"]
    code, _, err = search("--vector", str(tmp_path / "all.npy"))
    assert (code, "holds 2 vectors" in err) == (2, True)


@pytest.mark.parametrize("is_piped", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_first_question(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_piped: bool
) -> None:
    (tmp_path / "questions").write_text('{"items": ["u8"], "top": 1}\r\n', encoding="utf-8-sig", newline="")
    monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "questions").read_text(encoding="utf-8")))
    code, out, _ = search("--queries", "-" if is_piped else str(tmp_path / "questions"))
    assert (code, [hit["uid"] for hit in json.loads(out)["hits"]]) == (0, ["u8"])


@pytest.mark.parametrize("is_piped", [False, True])
def test_questions_that_are_not_utf_8_are_refused(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_piped: bool
) -> None:
    (tmp_path / "questions").write_bytes("ein Café\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ein Café\n".encode("latin-1")), "utf-8"))
    code, out, err = search("--queries", "-" if is_piped else str(tmp_path / "questions"))
    assert (code, out) == (2, "")
    assert "is not UTF-8 text: byte 7 is 0xe9; save it as UTF-8" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"items": ["nope"]}', "no item 'nope'"),
        ('{"items": ["u1"], "where": "m = 1"}', "No row has the field 'm'"),
        ('{"items": ["u1"], "where": "n >"}', "column 4"),
        ('{"items": ["u1"], "after": "x"}', "'x' is not a cursor"),
        ('{"items": [], "vectors": [[1, 2, 3]]}', "3 numbers; the rows of this index have 2"),
        ('{"items": [], "vectors": [[0, 0]]}', "has length 0.0"),
        ('{"images": ["/nowhere.png"]}', "/nowhere.png cannot be read"),
    ],
)
def test_the_line_of_a_question_that_cannot_be_answered_is_named(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr("vlm.models.load.load_model", lambda _, **__: CircleModel(fingerprint="none"))
    (tmp_path / "questions").write_text('{"items": ["u1"]}\n\n' * 140 + line + '\n{"items": ["u1"]}\n')
    code, _, err = search("--queries", str(tmp_path / "questions"), "--top", "1")
    assert code == 2
    assert "Line 281 of the queries: " in err
    assert message in err


@dataclass
class ReadingModel(CircleModel):
    """A model of whose texts the first eight pieces are seen, each of which is a character."""

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(encode=self._encode, context_length=8, pad_token=0, end_token=1)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 8), np.int64)
        for row, text in zip(rows, texts, strict=True):
            pieces = [ord(character) for character in text][:7]
            row[: len(pieces) + 1] = [*pieces, 1]
        return rows

    def embed_texts(self, texts: Sequence[str]) -> Any:
        return super().embed_texts(["0"] * len(texts))


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ("a jug on a table", True),
        ("a jugs on", True),
        ("a juggernaut", True),
        ("桌上有一个水壶和杯子", True),
        ("a jug", False),
        ("seven 7", False),
        ("水壶", False),
    ],
)
@pytest.mark.parametrize("is_minus", [False, True])
def test_a_query_cut_at_the_context_length_is_told(
    search: Search, monkeypatch: pytest.MonkeyPatch, text: str, is_cut: bool, is_minus: bool
) -> None:
    monkeypatch.setattr("vlm.models.load.load_model", lambda _, **__: ReadingModel(fingerprint="none"))
    words = ["--like", "u8", "--minus", text] if is_minus else [text]
    code, _, err = search(*words)
    assert code == 0
    assert ("longer than the model's context and was truncated" in err) == is_cut
    if is_cut:
        assert f"{text[:60]!r} … ({len(text)} characters)" in err
    code, out, _ = search(*words, "--json")
    assert json.loads(out).get("cut") == ([text] if is_cut else None)


def test_the_row_of_a_vector_that_cannot_be_asked_is_named(search: Search, tmp_path: Path) -> None:
    rows = np.ones((300, 2), np.float32)
    rows[290, 1] = np.nan
    np.save(tmp_path / "all.npy", rows)
    code, _, err = search("--queries", str(tmp_path / "all.npy"), "--top", "1")
    assert (code, "Row 290 (from 0) of" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--like", "u0", "--where", "n >"), "column 4"),
        (("--like", "u0", "--where", "m = 1"), "known: caption, key, language, n"),
        (("--like", "nobody"), "no item 'nobody'"),
        (("--like", "u0", "--after", "x"), "'x' is not a cursor"),
        (("--queries", "/nowhere/q"), "/nowhere/q cannot be read"),
        (("--queries", "/nowhere/q.npy"), "/nowhere/q.npy cannot be read as .npy"),
        (("--like", "u0", "--rerank", "nowhere"), "this query has no text"),
        (("a dog", "--rerank", "nowhere"), "There is no model 'nowhere'"),
        (("a text", "--queries", "-"), "omit TEXT and --html"),
        ((), "needs a text, image, item or vector"),
    ],
)
def test_misuse_is_said_in_a_line(search: Search, words: tuple[str, ...], message: str) -> None:
    code, out, err = search(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
