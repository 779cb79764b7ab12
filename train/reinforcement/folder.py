"""The folder of reinforced shards: what each is called, which are done, and the manifest at the end."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.data.journal import read_journal
from vlm.data.shards import shards_fingerprint
from vlm.data.storage.addresses import SHARD_SUFFIXES, base_name
from vlm.files import append_line, write_text
from vlm.manifest import FileRecord, Manifest, record_file, write_manifest
from vlm.train.reinforcement.views import REINFORCEMENT

UNREINFORCED = "unreinforced.jsonl"
"""The samples that were carried over without arrays, and why."""

_JOURNAL = ".shards-done.jsonl"


@dataclass(frozen=True, kw_only=True)
class ReinforcedShard:
    """A finished shard. sizes: columns of each array. left: the samples without arrays."""

    name: str
    samples: int
    bytes: int
    sha256: str
    sizes: dict[str, int]
    left: list[dict[str, Any]]


def names_of(shards: Sequence[str]) -> list[str]:
    """A plain tar's name for each shard: its own, with its number before it where two are called the same.

    >>> names_of(["a/0.tar", "b/1.tar.gz"]), names_of(["a/0.tar", "b/0.tar"])
    (['0.tar', '1.tar'], ['00000-0.tar', '00001-0.tar'])
    """
    names = [base_name(shard) for shard in shards]
    suffixes = [max((end for end in SHARD_SUFFIXES if name.lower().endswith(end)), key=len) for name in names]
    stems = [name[: -len(suffix)] for name, suffix in zip(names, suffixes, strict=True)]
    if len({stem.lower() for stem in stems}) < len(stems) or any(stem.startswith(".") for stem in stems):
        stems = [f"{number:05d}-{stem}" for number, stem in enumerate(stems)]
    return [f"{stem}.tar" for stem in stems]


def note_done(out: Path, shard: ReinforcedShard) -> None:
    """Write into the journal that a shard is whole."""
    append_line(out / _JOURNAL, json.dumps(asdict(shard)))


def read_done(out: Path) -> list[ReinforcedShard]:
    """The shards an earlier run finished.

    Raises:
        VlmError: one of them is no longer there as it was.
    """
    return read_journal(out / _JOURNAL, ReinforcedShard)


def finish_folder(
    out: Path,
    shards: Sequence[ReinforcedShard],
    *,
    reinforcement: dict[str, Any],
    configuration: dict[str, Any],
    inputs: dict[str, str],
    sources: Sequence[str],
) -> Manifest:
    """Write the list of what was left out, and the manifest; the journal goes."""
    left = [sample for shard in shards for sample in shard.left]
    files = {shard.name: FileRecord(bytes=shard.bytes, sha256=shard.sha256) for shard in shards}
    if left:
        write_text(out / UNREINFORCED, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in left))
        files[UNREINFORCED] = record_file(out / UNREINFORCED)
    samples = sum(shard.samples for shard in shards)
    counts = {"samples": samples, "reinforced": samples - len(left), "bad": len(left), "shards": len(shards)}
    manifest = Manifest(
        kind="shards",
        fingerprint=shards_fingerprint([str(out / shard.name) for shard in shards]),
        counts=counts,
        configuration=configuration,
        inputs=inputs,
        files=files,
        details={
            "source": {"kind": "shards", "shards": list(sources)},
            REINFORCEMENT: reinforcement,
            "arrays": next((shard.sizes for shard in shards if shard.sizes), {}),
            "unreinforced": dict(Counter(sample["reason"] for sample in left)),
        },
    )
    write_manifest(out, manifest)
    (out / _JOURNAL).unlink()
    return manifest
