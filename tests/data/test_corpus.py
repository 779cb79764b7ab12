import re

import numpy as np
import pytest

from tests.data.selection_fixture import select_all
from tests.data.tar_fixture import write_tar
from vlm.data.corpus import open_corpus, read_sources
from vlm.data.sampler import Mixture
from vlm.data.selection import Selection, write_selection
from vlm.data.shards import expand_shards
from vlm.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    """Two sources: `a` with shards of 6 and 4, `b` with one of 5; and a selection of `a` that doubles one sample."""
    for name, sizes in {"a": (6, 4), "b": (5,)}.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            write_tar(tmp_path / name / f"{number}.tar", [""] * size, prefix=name)
    whole = select_all(expand_shards(str(tmp_path / "a")))
    times = (np.array([2, 0, 1, 1, 1, 1], np.uint16), np.array([0, 0, 0, 1], np.uint16))
    write_selection(tmp_path / "a.selection", Selection(shards=whole.shards, times=times))
    return tmp_path


def mixture_file(folder, text):
    (folder / "mix.toml").write_text(text.replace("FOLDER", str(folder)))
    return str(folder / "mix.toml")


def test_an_address_is_one_source(folder):
    corpus = open_corpus(read_sources(str(folder / "a")), seed=3)
    assert (corpus.samples, corpus.filtered, corpus.order.num_samples) == ((6, 4), (0, 0), 10)
    assert corpus.shards_of(0) == range(2)


def test_a_selection_says_what_an_epoch_is(folder):
    corpus = open_corpus(read_sources(str(folder / "a"), str(folder / "a.selection")))
    assert (corpus.filtered, corpus.order.num_samples) == ((1, 3), 7)
    other = open_corpus(read_sources(str(folder / "a")))
    assert other.fingerprint != corpus.fingerprint


def test_a_mixture_names_weights_and_numbers_its_shards_through(folder):
    text = "[[source]]\ndata='FOLDER/a'\nweight=0.5\nselection='FOLDER/a.selection'\n"
    text += "[[source]]\nname='letters'\ndata='FOLDER/b'\nweight=1.25\n"
    corpus = open_corpus(read_sources(mixture_file(folder, text)))
    assert isinstance(corpus.order, Mixture)
    assert corpus.order.shares == (2, 5)
    assert [source.name for source in corpus.sources] == ["source-1", "letters"]
    assert (corpus.shards_of(0), corpus.shards_of(1)) == (range(2), range(2, 3))
    assert corpus.samples == (6, 4, 5)


def test_repeats_weigh_sources_by_their_visits(folder):
    text = "[[source]]\ndata='FOLDER/a'\n[[source]]\ndata='FOLDER/b'\nrepeats=3\n"
    corpus = open_corpus(read_sources(mixture_file(folder, text)))
    assert isinstance(corpus.order, Mixture)
    assert (corpus.order.shares, corpus.order.num_samples) == ((2, 3), 25)
    assert corpus.order.finished_epochs(25) == (1, 3)


def test_the_fingerprint_changes_with_what_changes_the_sequence(folder):
    sources = read_sources(str(folder / "a"))
    assert open_corpus(sources).fingerprint == open_corpus(sources).fingerprint
    assert len({open_corpus(sources, seed=seed, window=w).fingerprint for seed in (0, 1) for w in (4, 8)}) == 4


def test_another_length_of_an_epoch_is_another_sequence(folder):
    once, thrice = (
        open_corpus(read_sources(mixture_file(folder, f"[[source]]\ndata='FOLDER/a'\nrepeats={times}\n")))
        for times in (2, 3)
    )
    assert once.fingerprint != thrice.fingerprint


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no [[source]]"),
        ("[[source]]\n", "data is required"),
        ("[[source]]\ndata='FOLDER/a'\nwieght=2\n", "weight"),
        ("[[source]]\ndata=3\n", "must be a string"),
        ("[[source]]\ndata='FOLDER/a'\nweight='much'\n", "must be a number"),
        ("[[source]]\ndata='FOLDER/a'\nweight=-1\n", "above 0"),
        ("[[source]]\ndata='FOLDER/a'\nrepeats=0\n", "above 0"),
        ("[[source]]\ndata='FOLDER/a'\nweight=1\n[[source]]\ndata='FOLDER/b'\n", "weight to some"),
        ("[[source]", "not TOML"),
        ("source = 3\n", "no [[source]]"),
        ("source = [1, 2]\n", "no [[source]]"),
        ("[source]\ndata='FOLDER/a'\n", "no [[source]]"),
        ("seed = 1\n[[source]]\ndata='FOLDER/a'\n", "unknown key 'seed'"),
        ("[[source]]\ndata='FOLDER/a'\nweight=nan\n", "above 0"),
        ("[[source]]\ndata='FOLDER/a'\nrepeats=1e300\n", "repeats make an epoch"),
        ("[[source]]\ndata='FOLDER/a'\nname='../../evil'\n", "names files"),
        ("[[source]]\ndata='FOLDER/a'\nname='x'\n[[source]]\ndata='FOLDER/b'\nname='x'\n", "one name"),
        ("[[source]]\ndata='FOLDER/a'\n[[source]]\ndata='FOLDER/b'\nname='source-1'\n", "one name"),
        ("[[source]]\ndata='FOLDER/a'\nselection='FOLDER/none.selection'\n", "no selection"),
        ("[[source]]\ndata='FOLDER/b'\nselection='FOLDER/a.selection'\n", "does not know"),
        ("[[source]]\ndata='FOLDER/other.toml'\n", "is a mixture itself; write its sources here"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused(folder, text, told):
    with pytest.raises(UsageError) as caught:
        open_corpus(read_sources(mixture_file(folder, text)))
    assert told in str(caught.value)


def test_a_mixture_file_takes_no_selection_beside(folder):
    with pytest.raises(UsageError, match="leave out --selection"):
        read_sources(mixture_file(folder, "[[source]]\ndata='FOLDER/a'\n"), "a.selection")
    with pytest.raises(UsageError, match="no mixture file"):
        read_sources("none.toml")


def test_a_selection_that_leaves_nothing_is_refused(folder):
    whole = select_all(expand_shards(str(folder / "b")))
    write_selection(folder / "b.selection", Selection(shards=whole.shards, times=(np.zeros(5, np.uint16),)))
    with pytest.raises(UsageError, match="leaves nothing"):
        open_corpus(read_sources(str(folder / "b"), str(folder / "b.selection")))


def test_data_named_twice_is_warned_of_and_comes_in_an_order_of_its_own(folder, caplog):
    twice = mixture_file(folder, "[[source]]\ndata='FOLDER/a'\nweight=1\n[[source]]\ndata='FOLDER/*'\nweight=1\n")
    with caplog.at_level("WARNING", logger="vlm"):
        corpus = open_corpus(read_sources(twice))
    (told,) = caplog.messages
    assert re.search(r"2 shards named more than once, such as .*0\.tar \(by source-1, source-2\)", told)
    places = corpus.order.locate(range(20))
    assert [place.number for place in places[0::2]] != [place.number for place in places[1::2]]
    caplog.clear()
    with caplog.at_level("WARNING", logger="vlm"):
        open_corpus(read_sources(f"{folder}/a::{folder}/a"))
    assert "(by data, data)" in caplog.text


def test_selections_that_divide_a_shard_between_sources_are_no_repetition(folder, caplog):
    whole = select_all(expand_shards(str(folder / "b")))
    for name, is_kept in (("one", [1, 1, 0, 0, 0]), ("other", [0, 0, 1, 2, 1])):
        selection = Selection(shards=whole.shards, times=(np.array(is_kept, np.uint16),))
        write_selection(folder / f"{name}.selection", selection)
    tables = [f"[[source]]\ndata='FOLDER/b'\nselection='FOLDER/{name}.selection'\n" for name in ("one", "other")]
    with caplog.at_level("WARNING", logger="vlm"):
        open_corpus(read_sources(mixture_file(folder, "".join(tables))))
    assert not caplog.messages


def test_a_mixture_is_not_taken_for_shards(folder):
    with pytest.raises(UsageError, match=r"mix.*\.toml' is not shards: a mixture file is read by vlm train alone"):
        expand_shards(mixture_file(folder, "[[source]]\ndata='FOLDER/a'\n"))
