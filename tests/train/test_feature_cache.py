"""Training on features of locked towers that are computed once."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.shards import EvalCollator, count_samples
from vlm.errors import UsageError
from vlm.models.load import load_model
from vlm.models.model import normalise
from vlm.train.run import train
from vlm.train.run_setup import open_session


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """The name of an image tower and a text tower with weights in files, and small heads."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), folder / "image.pth")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=400, **sizes)).save_pretrained(folder / "bert")
    head = "residual=16,head_dropout=0.1"
    image = f"timm:test_efficientnet,initial_weights={folder / 'image.pth'},{head}"
    return f"{image}+hf:{folder / 'bert'},{head}@16"


@pytest.fixture
def configure_frozen(configure, towers):
    """A function that configures a run of the heads alone."""

    def make(name, loader=None, model=None, **changes):
        model = {"architecture": towers, "lock": "both", "image_size": 64} | (model or {})
        return configure(name, model=model, loader={"cache_features": True} | (loader or {}), **changes)

    return make


def test_batches_hold_what_the_trunks_make_of_the_samples(configure_frozen):
    session = open_session(configure_frozen("run"), resume=False)
    batch = next(session.open_batches())[0]
    assert batch.images.shape[0] == 0  # nothing was decoded
    network = session.state.model.network.eval()
    shards = list(session.corpus.shards)
    plan = SequentialBatches(counts=count_samples(shards), batch_size=200)
    rows = {}
    for whole in stream_batches(plan, shards, EvalCollator(view=session.state.model.view), numbers=range(len(plan))):
        with torch.inference_mode():
            embedded = network.visual.embed(normalise(whole.images, session.state.model.view))
        rows |= {sample.key: row for sample, row in zip(whole.decoded, embedded, strict=True)}
    expected = torch.stack([rows[key] for key in batch.keys])
    assert torch.allclose(batch.arrays["image_feature"], expected, atol=2e-3)
    tokens = torch.from_numpy(session.state.model.tokenizer.encode(list(batch.captions)))
    with torch.inference_mode():
        assert torch.allclose(batch.arrays["text_feature"], network.text.embed(tokens), atol=2e-3)


def test_a_run_trains_its_heads_and_leaves_an_ordinary_model(configure_frozen, scene_shards, history):
    config = configure_frozen("run", steps=40, val=str(scene_shards / "val"))
    summary = train(config)
    assert summary.steps == 40
    lines = history(config.run)
    assert lines[-1][1] < lines[0][1] - 0.3
    model = load_model(config.run)
    # pixels in, text in
    vectors = model.embed_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert vectors.shape == model.embed_texts(["a red star", "two circles"]).shape == (2, 16)
    assert len(list(Path(config.run, "features").glob("image-*.npy"))) == 3
    assert len(list(Path(config.run, "features").glob("text-*.npy"))) == 3


def test_runs_share_a_folder_of_features(configure_frozen, tmp_path, logged):
    folder = tmp_path / "shared"
    first = configure_frozen("first", loader={"feature_folder": str(folder)}, steps=2)
    open_session(first, resume=False)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    # one that was lost is computed again, and it alone
    lost = sorted(folder.glob("text-*.npy"))[0]
    lost.unlink()
    logged.clear()
    open_session(replace(first, run=str(tmp_path / "second"), seed=1), resume=False)
    assert "Computing the features" in logged.text
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert times.keys() == after.keys()
    logged.clear()
    open_session(replace(first, run=str(tmp_path / "third")), resume=False)
    assert "Computing the features" not in logged.text


def test_a_table_of_words_learns_to_read_features_computed_beside_another_text_tower(
    configure_frozen, towers, tmp_path, history, logged
):
    folder = str(tmp_path / "shared")
    both = configure_frozen("both", loader={"feature_folder": folder})
    untouched = open_session(both, resume=False).state.model.network
    logged.clear()
    image, _, _ = towers.partition("+")
    config = configure_frozen(
        "words",
        loader={"feature_folder": folder},
        # another length of captions, and so another tokenizer
        model={"architecture": f"{image}+bag,width=16@16", "lock": "image", "context_length": 12},
        steps=40,
    )
    train(config)
    assert "Computing the features" not in logged.text
    lines = history(config.run)
    assert lines[-1][1] < lines[0][1] - 0.3
    trained = load_model(config.run).network
    for name, values in untouched.visual.trunk.state_dict().items():
        assert torch.equal(values, trained.visual.trunk.state_dict()[name])


def test_resuming_continues_the_same_sequence(configure_frozen, history):
    config = configure_frozen("whole", steps=8)
    train(config)
    half = replace(config, run=config.run.replace("whole", "half"))
    shutil.copytree(Path(config.run), half.run)
    for path in Path(half.run).iterdir():
        if path.name in ("model", "manifest.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(Path(half.run) / "checkpoints" / "step-00000008", ignore_errors=True)
    train(half, resume=True)
    assert history(half.run)[4:] == history(config.run)[4:]


def test_captions_are_blended_within_their_language(configure_frozen):
    plain = open_session(configure_frozen("plain"), resume=False)
    blended = open_session(configure_frozen("blended", loader={"caption_blend": 0.5}), resume=False)
    one = next(plain.open_batches())[0]
    other = next(blended.open_batches())[0]
    assert one.keys == other.keys
    # the drawn caption is the same, and its feature an average
    assert one.captions == other.captions
    assert torch.equal(one.arrays["image_feature"], other.arrays["image_feature"])
    assert not torch.allclose(one.arrays["text_feature"], other.arrays["text_feature"], atol=1e-3)
    again = next(open_session(configure_frozen("again", loader={"caption_blend": 0.5}), resume=False).open_batches())[0]
    assert torch.equal(other.arrays["text_feature"], again.arrays["text_feature"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"lock": ""}}, "no tower is locked"),
        ({"model": {"unlocked_groups": 1}}, "--unlocked-groups 1 trains"),
        ({"loader": {"sentences": True}}, "--sentences"),
        ({"loader": {"languages": ("en", "tags")}}, "--languages with tags"),
        ({"model": {"lock": "image"}, "loader": {"caption_blend": 1.0}}, "--caption-blend averages"),
        ({"model": {"drop_path": 0.1, "lock": "image"}}, "drops nothing"),
    ],
)
def test_what_needs_more_than_features_is_refused_before_anything_is_computed(configure_frozen, changes, message):
    config = configure_frozen("run", **changes)
    with pytest.raises(UsageError, match=message):
        open_session(config, resume=False)
    assert not Path(config.run, "features").exists()


def test_a_tower_that_pools_by_learned_weights_is_refused(configure_frozen, towers):
    pooled = towers.replace("residual=16", "pooling=simpool,residual=16", 1)
    with pytest.raises(UsageError, match="this image tower gives no features of its trunk alone"):
        open_session(configure_frozen("run", model={"architecture": pooled}), resume=False)


def test_a_sample_whose_image_was_damaged_is_replaced(configure_frozen, scene_shards, tmp_path):
    (tmp_path / "shards").mkdir()
    for number, shard in enumerate(sorted((scene_shards / "train").glob("*.tar"))):
        with tarfile.open(shard) as source, tarfile.open(tmp_path / "shards" / shard.name, "w") as out:
            for entry in source:
                data = source.extractfile(entry).read()
                # its header is whole, so that only decoding finds it
                if number == 0 and entry.name.endswith(".jpg") and entry.name.startswith(source.getnames()[0][:-4]):
                    data = data[: len(data) // 2]
                    entry.size = len(data)
                out.addfile(entry, io.BytesIO(data))
    config = configure_frozen("run", data=str(tmp_path / "shards"), steps=6)
    train(config)
    assert "no features" in (Path(config.run) / "ledger.json").read_text()
    features = np.concatenate([np.load(path) for path in Path(config.run, "features").glob("image-*.npy")])
    assert np.isnan(features).all(axis=(1, 2)).sum() == 1


def test_evaluations_run_a_frozen_trunk_once_for_all_runs_of_a_folder(configure_frozen, scene_shards, tmp_path, logged):
    def measure(name: str) -> tuple[dict[str, float], int]:
        changes = {"val": str(scene_shards / "val"), "val_limit": 12}
        session = open_session(
            configure_frozen(name, loader={"feature_folder": str(tmp_path / "features")}, **changes), resume=False
        )
        runs: list[int] = []
        network = session.state.model.network.eval()
        for tower in (network.visual, network.text):
            tower.trunk.register_forward_pre_hook(lambda *_, **__: runs.append(1), with_kwargs=True)
        assert session.validation is not None
        return session.validation.measure(session.state.model, 0), len(runs)

    first, num_runs = measure("first")
    assert num_runs
    assert measure("second") == (first, 0)
    kept = sorted((tmp_path / "features").glob("evaluated-*.npz"))
    assert [path.name.split("-")[1] for path in kept] == ["text", "visual"]
    # damage costs a pass, and is told
    kept[0].write_bytes(kept[0].read_bytes()[:-200])
    again, num_runs = measure("third")
    assert again == first
    assert num_runs
    assert f"{kept[0]} is damaged" in logged.text
    assert measure("fourth") == (first, 0)
