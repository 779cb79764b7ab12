"""From pairs to a head, from an old index to a new one: against worlds of which the truth is known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vlm
from tests.index.upgrade_fixture import TRAITS, World, join, space, turn, write, write_world
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError
from vlm.index.backward_compat import (
    basis_change,
    fit_head,
    make_head,
    measure_head,
    pad_to,
    predict_old,
    project_through,
    upgrade_index,
)
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings
from vlm.index.engine_writer import InsertBatch
from vlm.index.filter_language import parse_filter
from vlm.index.reader import Index
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter
from vlm.models.variants import CompatibilityProjection, read_projection, save_projection

EVERYTHING = np.eye(TRAITS)
HALF = EVERYTHING[: TRAITS // 2]


def recall(found, name, at=1):
    return found[name].text_to_image.recall[at], found[name].image_to_text.recall[at]


def head_of(old, new, count=300):
    return fit_head(World(count).pairs(old, new)).head


@pytest.mark.parametrize(("old", "new"), [(4, 9), (9, 4), (6, 6)])
def test_a_change_of_basis_keeps_all_lengths_whatever_the_prediction(old, new):
    prediction = np.random.default_rng(0).standard_normal((old, new))
    matrix = basis_change(prediction)
    assert matrix.shape == (max(old, new), new)
    assert np.abs(matrix.T @ matrix - np.eye(new)).max() < 1e-12
    # the polar factor is nearest to the prediction among all of them
    for seed in range(20):
        other = np.linalg.qr(np.random.default_rng(seed).standard_normal((max(old, new), new)))[0]
        assert np.linalg.norm(matrix[:old] - prediction) < np.linalg.norm(other[:old] - prediction)


def test_ridge_regression_is_the_least_of_its_sum():
    pairs = World(150).pairs(HALF, EVERYTHING @ turn(TRAITS, 1))
    found = predict_old(pairs, 0.1)

    def total(matrix: np.ndarray) -> float:
        errors = [
            np.mean(np.sum((new @ matrix.T - old) ** 2, axis=1))
            for new, old in ((pairs.new_images, pairs.old_images), (pairs.new_texts, pairs.old_texts))
        ]
        return float(sum(errors) + 0.1 * np.sum(matrix**2))

    chance = np.random.default_rng(0)
    assert all(total(found) < total(found + 1e-3 * chance.standard_normal(found.shape)) for _ in range(20))


def test_a_turned_space_is_turned_back():
    world = World(300)
    found = measure_head(world.pairs(EVERYTHING, turn(TRAITS, 3)), head_of(EVERYTHING, turn(TRAITS, 3)), seed=0)
    for name in ("new → old", "new → half new", "new → new"):
        assert recall(found, name) == pytest.approx(recall(found, "old → old"), abs=0.02)


def test_a_model_that_sees_more_asks_old_rows_no_worse_and_its_own_as_it_always_did():
    old, new = turn(6, 5) @ HALF, turn(TRAITS, 4)
    head, unseen = head_of(old, new), World(400, seed=9).pairs(old, new)
    found = measure_head(unseen, head, seed=1)
    assert np.all(np.array(recall(found, "new → old")) >= np.array(recall(found, "old → old")) - 0.02)
    assert recall(found, "new → new") == pytest.approx(recall(found, "new → new, no head"), abs=1e-9)
    assert min(recall(found, "new → half new")) > min(recall(found, "old → old"))
    assert min(recall(found, "new → new")) > 1.5 * max(recall(found, "old → old"))


def test_an_unrelated_old_space_is_met_by_chance_and_costs_the_new_one_nothing():
    world, stranger = World(300), World(300, seed=77)
    pairs, other = world.pairs(EVERYTHING, turn(TRAITS, 1)), stranger.pairs(EVERYTHING, EVERYTHING)
    pairs = replace(pairs, old_images=other.old_images, old_texts=other.old_texts)
    found = measure_head(pairs, fit_head(pairs).head, seed=0)
    assert max(recall(found, "new → old")) < 0.2 < 0.5 < min(recall(found, "new → new"))
    assert recall(found, "new → new") == pytest.approx(recall(found, "new → new, no head"), abs=1e-9)


def test_cosines_are_kept_among_old_and_among_new():
    world = World(200)
    pairs = world.pairs(HALF, EVERYTHING)
    head = fit_head(pairs).head
    old = pad_to(pairs.old_images, head.dimension)
    assert np.abs(old @ old.T - pairs.old_images @ pairs.old_images.T).max() < 1e-6
    new = project_through(head, pairs.new_texts)
    assert np.abs(new @ new.T - pairs.new_texts @ pairs.new_texts.T).max() < 1e-6


def test_the_same_pairs_and_seed_give_the_same_head():
    pairs = World(200).pairs(HALF, EVERYTHING)
    assert fit_head(pairs, seed=3).head.fingerprint == fit_head(pairs, seed=3).head.fingerprint


def test_pairs_are_joined_by_uid_whatever_their_order(tmp_path):
    world = World(150)
    old = write_world(tmp_path, world, HALF, "old")
    images, texts = world.seen_by(EVERYTHING)
    order = np.random.default_rng(0).permutation(140)
    origins = world.image_origins()
    new = (
        write(tmp_path / "n-i", images[order], [origins[n] for n in order], space("new", TRAITS)),
        write(tmp_path / "n-t", texts, list(world.text_origins()), space("new", TRAITS, "text")),
    )
    found, truth = join(old, new), world.pairs(HALF, EVERYTHING).select(np.arange(140))
    assert len(found) == 140
    assert found.captions == truth.captions
    for name in ("old_images", "new_images", "old_texts", "new_texts", "image_of"):
        assert np.allclose(getattr(found, name), getattr(truth, name), atol=1e-3)
    drawn = join(old, new, max_images=30)
    assert (len(drawn), len(drawn.old_texts), drawn.image_of.max()) == (30, 60, 29)


def test_folders_that_do_not_belong_together_are_refused(tmp_path):
    world, other = World(120), World(120, seed=1)
    old, new = write_world(tmp_path, world, HALF, "old"), write_world(tmp_path, world, EVERYTHING, "new")
    other.uids = [f"other{number}" for number in range(120)]
    stranger = write_world(tmp_path / "other", other, EVERYTHING, "stranger")
    renamed = World(120)
    origins = renamed.image_origins()
    origins[7] = replace(origins[7], captions={"": ("something else",)})
    wrong = write(tmp_path / "wrong", renamed.seen_by(EVERYTHING)[0], origins, space("new", TRAITS))
    for given, message in (
        ((old, stranger), "no uid in common"),
        ((old, (new[0], stranger[1])), "must be of one model"),
        ((old, old), "same model"),
        ((old, (new[1], new[0])), "holds text embeddings"),
        ((old, (wrong, new[1])), "'k7' has the captions"),
    ):
        with pytest.raises(UsageError, match=message):
            join(*given)


def test_too_few_pairs_are_refused():
    with pytest.raises(UsageError, match="50 images are in both"):
        fit_head(World(50).pairs(HALF, EVERYTHING))


@pytest.fixture
def world(tmp_path):
    """A world of 320 pictures with embeddings of an old and a new model, an old index, and the head's folder."""
    world = World(320)
    old, new = write_world(tmp_path, world, HALF, "old"), write_world(tmp_path, world, turn(TRAITS, 2), "new")
    build_index(old[0], tmp_path / "index")
    head = fit_head(join(old, new)).head
    save_projection(tmp_path / "head", head, configuration={}, details={})
    return world


def headed(folder: Path, source: Path, head: CompatibilityProjection, rows: Sequence[int]) -> Path:
    """Some rows of an embeddings folder as `vlm embed HEAD` writes them."""
    embeddings = Embeddings.open(source)
    origins, vectors = list(embeddings.origins()), np.concatenate(list(embeddings.blocks()))
    described = replace(embeddings.space, model="head", fingerprint=head.fingerprint, dimension=head.dimension)
    return write(folder, project_through(head, vectors[list(rows)]), [origins[row] for row in rows], described)


def test_old_rows_are_carried_over_as_they_are_stored(world, tmp_path):
    with IndexWriter(tmp_path / "index") as writer:
        writer.delete(["k3", "k250"])
    before = Index.open(tmp_path / "index")
    head = read_projection(tmp_path / "head")
    carried = upgrade_index(tmp_path / "index", tmp_path / "out", head, head_spec=str(tmp_path / "head"))
    assert (carried.rows, carried.old_dimension, carried.dimension) == (318, 6, 12)
    after = Index.open(tmp_path / "out")
    assert not check_index(tmp_path / "out").faults
    assert np.array_equal(after.snapshot.rows, before.snapshot.rows)
    assert [e for _, e in after.snapshot.entries()] == [e for _, e in before.snapshot.entries()]
    rows = before.snapshot.rows
    stored = after.snapshot.views[0].segment.vectors.stored
    assert np.array_equal(stored[:, :6], np.delete(before.snapshot.views[0].segment.vectors.stored, [3, 250], 0))
    assert not stored[:, 6:].any()
    queries = before.snapshot.vectors(rows[:20])
    old, new = before.search(queries, 5), after.search(pad_to(queries, 12), 5)
    assert [[hit.entry.uid for hit in line] for line in old] == [[hit.entry.uid for hit in line] for line in new]
    assert after.details.space.model == str(tmp_path / "head")
    assert [len(i.catalogue.search_text("k5", 9)) for i in (before, after)] == [1, 1]
    assert [e.uid for e in after.catalogue.entries(list(after.catalogue.where(parse_filter("number = 7"))))] == ["k7"]


def test_rows_embedded_again_take_their_places_bit_by_bit(world, tmp_path):
    head = read_projection(tmp_path / "head")
    upgrade_index(tmp_path / "index", tmp_path / "out", head, head_spec="head")
    with IndexWriter(tmp_path / "out") as writer:
        again = headed(tmp_path / "again", tmp_path / "new-images", head, range(0, 320, 2))
        assert writer.update(InsertBatch.from_folder(again)).replaced == 160
        with pytest.raises(UsageError, match="cannot be compared"):
            writer.add(InsertBatch.from_folder(tmp_path / "new-images"))
    index, pairs = Index.open(tmp_path / "out"), world.pairs(HALF, turn(TRAITS, 2))
    found = index.search(project_through(head, pairs.new_texts), 1)
    right = [hit[0].entry.uid == f"k{number // 2}" for number, hit in enumerate(found)]
    assert np.mean(right) > 0.5
    rows = project_through(head, pairs.new_images)
    rows[1::2] = pad_to(pairs.old_images, head.dimension)[1::2]
    truth = np.argmax(project_through(head, pairs.new_texts) @ rows.T, axis=1)
    assert np.mean([int(hit[0].entry.uid[1:]) == best for hit, best in zip(found, truth, strict=True)]) > 0.99


def test_two_upgrades_in_a_row(world, tmp_path):
    first = read_projection(tmp_path / "head")
    upgrade_index(tmp_path / "index", tmp_path / "second", first, head_spec="head")
    middle = (
        headed(tmp_path / "m-i", tmp_path / "new-images", first, range(320)),
        headed(tmp_path / "m-t", tmp_path / "new-texts", first, range(640)),
    )
    newer_eyes = np.concatenate([turn(TRAITS, 8), turn(TRAITS, 9)[:3]])
    newer = write_world(tmp_path, world, newer_eyes, "newer")
    second = fit_head(join(middle, newer)).head
    with IndexWriter(tmp_path / "second") as writer:
        writer.update(InsertBatch.from_folder(headed(tmp_path / "again", tmp_path / "new-images", first, range(100))))
    upgrade_index(tmp_path / "second", tmp_path / "third", second, head_spec="second")
    pairs = world.pairs(HALF, newer_eyes)
    index = Index.open(tmp_path / "third")
    hits = index.search(project_through(second, pairs.new_texts), 1)
    right = np.array([hit[0].entry.uid == f"k{number // 2}" for number, hit in enumerate(hits)])
    old_hits = np.argmax(pairs.old_texts @ pairs.old_images.T, axis=1) == pairs.image_of
    assert right[:200].mean() > old_hits[:200].mean() - 0.05
    assert right[200:].mean() > 0.5 * old_hits[200:].mean()
    with pytest.raises(UsageError, match="fitted to rows of a model"):
        upgrade_index(tmp_path / "index", tmp_path / "fourth", second, head_spec="second")


def test_an_index_of_nothing_and_one_whose_kind_no_longer_fits_are_carried_over(world, tmp_path):
    head = read_projection(tmp_path / "head")
    build_index(tmp_path / "old-images", tmp_path / "ivf", kind="ivf")
    with IndexWriter(tmp_path / "ivf") as writer:
        writer.delete([f"k{number}" for number in range(319)])
    assert upgrade_index(tmp_path / "ivf", tmp_path / "one", head, head_spec="head").rows == 1
    with IndexWriter(tmp_path / "ivf") as writer:
        writer.delete(["k319"])
    assert upgrade_index(tmp_path / "ivf", tmp_path / "none", head, head_spec="head").rows == 0
    assert [len(Index.open(tmp_path / name)) for name in ("one", "none")] == [1, 0]


def test_another_index_and_a_folder_in_use_are_refused(world, tmp_path):
    head = read_projection(tmp_path / "head")
    build_index(tmp_path / "new-images", tmp_path / "stranger")
    with pytest.raises(UsageError, match="fitted to rows of a model with fingerprint old"):
        upgrade_index(tmp_path / "stranger", tmp_path / "out", head, head_spec="head")
    with pytest.raises(UsageError, match="exists already"):
        upgrade_index(tmp_path / "index", tmp_path / "stranger", head, head_spec="head")
    longer = make_head(world.pairs(EVERYTHING, EVERYTHING), basis_change(EVERYTHING))
    with pytest.raises(UsageError, match="6 dimensions, the head was fitted to 12"):
        upgrade_index(tmp_path / "index", tmp_path / "out", longer, head_spec="head")
    assert not (tmp_path / "out").exists()


def test_a_changed_head_is_refused(world, tmp_path):
    file = tmp_path / "head" / "head.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(VlmError, match="weights were changed"):
        read_projection(tmp_path / "head")
    file.write_bytes(data[:-9])
    with pytest.raises(VlmError, match="cannot be read"):
        read_projection(tmp_path / "head")


def test_the_commands(world, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("old-images", "new-images", "head2")]
    texts = ["--old-texts", str(tmp_path / "old-texts"), "--new-texts", str(tmp_path / "new-texts")]
    assert main(["index", "fit-head", *folders, *texts, "--held-out", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["recall"]) == {"old → old", "new → old", "new → half new", "new → new", "new → new, no head"}
    assert read_projection(tmp_path / "head2").fingerprint == found["fingerprint"]
    assert main(["index", "fit-head", *folders, *texts]) == 2
    assert "exists already" in capsys.readouterr().err
    words = [str(tmp_path / "index"), str(tmp_path / "out"), "--head", str(tmp_path / "head2")]
    assert main(["index", "upgrade", *words, "--json"]) == 0
    upgraded = json.loads(capsys.readouterr().out)
    assert upgraded["dimension"] == 12
    # the calls do the same
    head = vlm.fit_head(
        folders[0], folders[1], tmp_path / "head3", old_texts=texts[1], new_texts=texts[3], held_out=0.2
    )
    assert head.to_json() == found | {"head": str(tmp_path / "head3")}
    called = vlm.upgrade_index(tmp_path / "index", tmp_path / "out2", head=tmp_path / "head3").to_json()
    differing = {"folder", "seconds"}
    assert called.keys() == upgraded.keys()
    assert {name for name in called if called[name] != upgraded[name]} <= differing
    assert main(["index", "check", str(tmp_path / "out")]) == 0
