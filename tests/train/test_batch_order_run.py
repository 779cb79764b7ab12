"""Runs whose batches are arranged: the same samples whatever the workers, and after a resume."""

from pathlib import Path

import numpy as np
import pytest

from tests.train.test_run import interrupt_after
from vlm.data.sample_relations import relate_samples, write_relations
from vlm.data.shard_cache import default_cache
from vlm.data.shards import expand_shards
from vlm.errors import UsageError
from vlm.train.run import train
from vlm.train.run_setup import open_training_corpus


@pytest.fixture
def relations(scene_shards, tmp_path) -> Path:
    """The relations of the training scenes, each sample a neighbour of the ten after it."""
    related = relate_samples(expand_shards(str(scene_shards / "train")), languages=("en",), images=False, workers=0)
    contents, numbers = [], []
    for shard in related.shards:
        contents += [shard.fingerprint] * shard.samples
        numbers += range(shard.samples)
    nearest = (np.arange(len(numbers))[:, None] + np.arange(1, 11)) % len(numbers)
    path = tmp_path / "scenes.relations"
    write_relations(path, related.with_neighbours(contents, numbers, nearest))
    return path


def test_a_resumed_run_sees_the_same_batches_with_another_number_of_workers(configure, history, relations):
    def loader(workers):
        return {"batches": "hard", "relations": str(relations), "hard_cluster": 4, "workers": workers}

    whole = configure("whole", steps=10, loader=loader(0), peak_tflops=1.0)
    train(whole)
    again = configure("again", steps=10, loader=loader(1), peak_tflops=1.0)
    interrupt_after(again, whole.run, 8)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)

    plain = open_training_corpus(configure("plain"), default_cache())
    arranged = open_training_corpus(again, default_cache())
    assert plain.order.locate(range(60)) != arranged.order.locate(range(60))
    assert plain.fingerprint != arranged.fingerprint


def test_options_that_do_not_fit_are_refused(configure, relations, tmp_path):
    with pytest.raises(UsageError, match="distinct and hard batches need --relations"):
        train(configure("a", loader={"batches": "hard"}))
    with pytest.raises(UsageError, match="random ones none"):
        train(configure("b", loader={"relations": str(relations)}))
    without = tmp_path / "plain.relations"
    related = relate_samples(expand_shards(configure("c").data), languages=("en",), images=False, workers=0)
    write_relations(without, related)
    with pytest.raises(UsageError, match="hard needs neighbours"):
        train(configure("c", loader={"batches": "hard", "relations": str(without)}))
    mixture = tmp_path / "mixture.toml"
    mixture.write_text("".join(f"[[source]]\ndata = '{configure('d').data}'\n" for _ in range(2)))
    with pytest.raises(UsageError, match="a mixture has several"):
        train(configure("d", data=str(mixture), loader={"batches": "distinct", "relations": str(without)}))


def test_equal_captions_that_cannot_be_kept_apart_are_told(configure, relations, logged):
    # of the scenes' captions some come more often than an epoch has batches of half its samples
    config = configure("a", batch_size=48, loader={"batches": "distinct", "relations": str(relations)})
    open_training_corpus(config, default_cache())
    assert "share a batch of 48" in logged.text
