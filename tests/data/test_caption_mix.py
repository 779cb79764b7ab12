"""Captions of a sidecar mixed in while streaming: as often as asked, for the right samples, changing nothing else."""

import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

import vlm
from tests.data.tar_fixture import write_tar
from vlm.data.caption_sampler import CaptionMix, CaptionSampler
from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.corpus import Corpus, open_corpus, read_sources
from vlm.data.loader import stream_batches
from vlm.data.precomputed_features import PrecomputedFeatures
from vlm.data.sampler import BatchSampler
from vlm.data.shards import expand_shards
from vlm.data.tar import open_index
from vlm.data.tokenizers import ClipTokenizer
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import UsageError, VlmError
from vlm.manifest import Manifest, write_manifest
from vlm.train.run_config import LoaderConfig, TrainConfig

SIZES = (6, 5)


def write_sidecar(folder: Path, shards: list[str]) -> Path:
    """Two new captions for each sample but the second of each shard, as docs/formats.md describes the folder."""
    (folder / "parts").mkdir(parents=True)
    described: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        index = open_index(shard)
        keys = [entry.key for entry in index]
        captions = [[] if place == 1 else [f"{key} new 0", f"{key} new 1"] for place, key in enumerate(keys)]
        path = f"parts/part-{number:05d}.parquet"
        table = pyarrow.table(
            {"key": keys, "captions": captions, "log_likelihoods": [[-1.0] * len(c) for c in captions]}
        )
        parquet.write_table(table, folder / path)
        described.append({"shard": shard, "fingerprint": index.fingerprint, "path": path, "samples": len(keys)})
    manifest = Manifest(kind="captions", fingerprint="0123", counts={}, configuration={}, details={"shards": described})
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    for number, size in enumerate(SIZES):
        write_tar(tmp_path / "shards" / f"{number}.tar", [""] * size, prefix="s")
    return tmp_path / "shards"


@pytest.fixture
def sidecar(shards) -> Path:
    return write_sidecar(shards / "captions", expand_shards(str(shards)))


def open_mixed(shards: Path, sidecar: Path | None, mix: float = 0.5) -> Corpus:
    sources = read_sources(str(shards), captions_from=str(sidecar or ""), caption_mix=mix)
    return open_corpus(sources, window=4)


def stream(
    corpus: Corpus, *, epochs: int = 1, workers: int = 0, batch_size: int = 4, **options: Any
) -> list[TrainingBatch]:
    plan = BatchSampler(order=corpus.order, batch_size=batch_size)
    options = {"tokenizer": ClipTokenizer(), "draw": CaptionSampler(), "caption_mix": corpus.caption_mix} | options
    collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), **options)
    number = -(-sum(SIZES) * epochs // batch_size)
    return list(stream_batches(plan, corpus.shards, collate, numbers=range(number), workers=workers))


def drawn_texts(batches: list[TrainingBatch]) -> dict[tuple[int, str], str]:
    """The caption of each sample of each epoch."""
    texts: dict[tuple[int, str], str] = {}
    for batch in batches:
        for key, caption, index in zip(batch.keys, batch.drawn, batch.sample_indices, strict=True):
            texts[index.epoch, key] = caption.text
    return texts


def test_new_captions_are_shown_as_often_as_asked_and_of_the_sample_itself(shards, sidecar):
    texts = drawn_texts(stream(open_mixed(shards, sidecar, 0.3), epochs=60))
    new = {place: text for place, text in texts.items() if " new " in text}
    assert all(text.startswith(key) for (_, key), text in texts.items())
    # the second sample of each shard has none, as where an image could not be used
    assert not any(key.endswith("-1") for _, key in new)
    with_captions = [place for place in texts if not place[1].endswith("-1")]
    assert len(new) / len(with_captions) == pytest.approx(0.3, abs=0.06)
    assert {text[-5:] for text in new.values()} == {"new 0", "new 1"}


def test_with_probability_one_only_samples_without_new_captions_keep_their_own(shards, sidecar):
    texts = drawn_texts(stream(open_mixed(shards, sidecar, 1.0)))
    assert {key for (_, key), text in texts.items() if " new " not in text} == {"s0-1", "s1-1"}


def test_what_is_drawn_depends_on_the_sample_alone_and_crops_stay(shards, sidecar):
    mixed = stream(open_mixed(shards, sidecar), epochs=4)
    expected = drawn_texts(mixed)
    assert drawn_texts(stream(open_mixed(shards, sidecar), epochs=4, workers=2, batch_size=11)) == expected
    assert drawn_texts(stream(open_mixed(shards, sidecar), epochs=4, seed=1)) != expected
    plain = stream(open_mixed(shards, None), epochs=4)
    assert all(torch.equal(one.images, other.images) for one, other in zip(mixed, plain, strict=True))
    own = drawn_texts(plain)
    # where no new caption is shown, the very one that would have been
    assert all(own[place] == text for place, text in expected.items() if " new " not in text)


def test_a_mixture_names_captions_for_each_source(shards, sidecar, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / "0.tar", [""] * 5, prefix="o")
    text = f"[[source]]\ndata='{shards}'\ncaptions_from='{sidecar}'\ncaption_mix=1.0\n[[source]]\ndata='{other}'\n"
    (tmp_path / "mix.toml").write_text(text)
    corpus = open_corpus(read_sources(str(tmp_path / "mix.toml")), window=4)
    texts = drawn_texts(stream(corpus, batch_size=16, epochs=1))
    assert {key[0] for (_, key), text in texts.items() if " new " in text} == {"s"}
    assert any(key.startswith("o") for _, key in texts)


def test_captions_are_part_of_what_a_run_is_resumed_with(shards, sidecar):
    fingerprints = {
        open_mixed(shards, None).fingerprint,
        open_mixed(shards, sidecar).fingerprint,
        open_mixed(shards, sidecar, 0.6).fingerprint,
    }
    assert len(fingerprints) == 3
    assert open_mixed(shards, None).caption_mix is None
    # old runs keep their identity
    assert open_mixed(shards, None, 0.9).fingerprint == open_mixed(shards, None).fingerprint


def test_a_training_configuration_opens_them(shards, sidecar):
    from vlm.train.run_setup import open_training_corpus, resolve_shard_cache

    loader = LoaderConfig(captions_from=str(sidecar), caption_mix=0.25)
    config = TrainConfig(data=str(shards), run="run", loader=loader)
    mix = open_training_corpus(config, resolve_shard_cache(loader)).caption_mix
    assert mix is not None
    assert [shard and shard.probability for shard in mix.shards] == [0.25, 0.25]
    with pytest.raises(UsageError, match=r"caption_mix = 1\.5 is not a share"):
        TrainConfig(data=str(shards), run="run", loader=LoaderConfig(caption_mix=1.5)).check()


def test_a_stream_in_python_shows_them_too(shards, sidecar):
    options: dict[str, Any] = {"batch_size": sum(SIZES), "image_size": 8, "workers": 0, "captions_from": sidecar}
    [batch] = vlm.stream(shards, **options, caption_mix=1.0)
    assert sum(" new " in text for text in batch.texts) == sum(SIZES) - len(SIZES)
    with pytest.raises(UsageError, match="caption_mix = 2 is a probability"):
        vlm.stream(shards, **options, caption_mix=2)
    with pytest.raises(UsageError, match="captions_from is for training"):
        vlm.stream(shards, **options, transform="evaluation")


def test_other_shards_and_other_keys_are_refused(shards, sidecar, tmp_path):
    write_tar(shards / "2.tar", [""] * 3, prefix="s")
    with pytest.raises(UsageError, match=r"captions of other shards: .*2\.tar is none of the 2"):
        open_mixed(shards, sidecar)
    (shards / "2.tar").unlink()
    table = parquet.read_table(sidecar / "parts" / "part-00000.parquet")
    keys = pyarrow.array([f"x{number}" for number in range(len(table))])
    parquet.write_table(table.set_column(0, "key", keys), sidecar / "parts" / "part-00000.parquet")
    with pytest.raises(VlmError, match="has no captions of sample"):
        stream(open_mixed(shards, sidecar, 1.0))
    (sidecar / "parts" / "part-00000.parquet").unlink()
    with pytest.raises(VlmError, match="is missing"):
        open_mixed(shards, sidecar)


@pytest.mark.parametrize(
    ("source", "message"),
    [("caption_mix=1.5", r"caption_mix = 1\.5 is a probability"), ("caption_mix='half'", "must be a number")],
)
def test_mixtures_with_a_slip_are_refused(shards, tmp_path, source, message):
    (tmp_path / "mix.toml").write_text(f"[[source]]\ndata='{shards}'\n{source}\n")
    with pytest.raises(UsageError, match=message):
        read_sources(str(tmp_path / "mix.toml"))
    with pytest.raises(UsageError, match="leave out --captions-from"):
        read_sources(str(tmp_path / "mix.toml"), captions_from="captions")


def test_features_of_the_shards_own_captions_do_not_go_with_new_ones(shards, sidecar):
    with pytest.raises(UsageError, match="teacher_text have rows for the captions in the shards alone"):
        stream(open_mixed(shards, sidecar), arrays=PrecomputedFeatures(names=("teacher_text",)))


def test_a_mix_can_be_sent_to_another_process():
    mix = CaptionMix(shards=(None,))
    assert pickle.loads(pickle.dumps(mix)) == mix
