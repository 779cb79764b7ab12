"""Whatever byte of a manifest is damaged, its reader says which file it is and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.errors import VlmError
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index
from vlm.manifest import MANIFEST, begin_or_resume_folder

Damage = Callable[[bytes], bytes]


def without(*names: str) -> Damage:
    def remove(data: bytes) -> bytes:
        values = json.loads(data)
        inner = values
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        return json.dumps(values).encode()

    return remove


DAMAGES = {
    "one byte flipped": lambda data: data[:30] + bytes([data[30] ^ 0x80]) + data[31:],
    "cut short": lambda data: data[:-9],
    "a list": lambda _: b"[]",
    "a number": lambda _: b"7",
    "no counts": without("counts"),
    "no files": without("files"),
    "no space": without("details", "space"),
    "no dimension": without("details", "space", "dimension"),
    "another key": lambda data: data.replace(b'"fingerprint"', b'"fingerprinu"', 1),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_manifest_of_embeddings_is_named(embeddings: Path, what: str) -> None:
    path = embeddings / MANIFEST
    path.write_bytes(DAMAGES[what](path.read_bytes()))
    with pytest.raises(VlmError, match=r"manifest.json is damaged .*; restore a copy of it, or make the folder again"):
        Embeddings.open(embeddings)


@pytest.mark.parametrize("what", [*DAMAGES, "no rows", "no dead", "no segments", "no source"])
def test_a_damaged_manifest_of_an_index_is_named(index: Path, what: str) -> None:
    path = index / MANIFEST
    more = {
        "no rows": without("counts", "rows"),
        "no dead": without("counts", "dead"),
        "no segments": without("details", "segments"),
        "no source": without("inputs", "embeddings"),
    }
    path.write_bytes((DAMAGES | more)[what](path.read_bytes()))
    with pytest.raises(VlmError, match=r"manifest.json is damaged .*; restore a copy of it, or make the folder again"):
        Index.open(index)


@pytest.mark.parametrize("content", [b"\xff{}", b"[]", b"{"])
def test_a_damaged_marker_of_unfinished_work_is_named(tmp_path: Path, content: bytes) -> None:
    begin_or_resume_folder(tmp_path / "out", kind="shards", configuration={})
    (tmp_path / "out" / "progress.json").write_bytes(content)
    with pytest.raises(VlmError, match=r"progress.json is damaged"):
        begin_or_resume_folder(tmp_path / "out", kind="shards", configuration={})


@pytest.mark.parametrize("line", [b"\xff\n", b"[]\n", b"{}\n", b"{\n"])
def test_a_damaged_list_of_parts_is_named(embeddings: Path, line: bytes) -> None:
    manifest = json.loads((embeddings / MANIFEST).read_text())
    manifest["files"]["parts.jsonl"]["bytes"] = len(line)
    (embeddings / MANIFEST).write_text(json.dumps(manifest))
    (embeddings / "parts.jsonl").write_bytes(line)
    with pytest.raises(VlmError, match=r"parts.jsonl is damaged"):
        Embeddings.open(embeddings)
