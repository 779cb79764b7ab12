"""The list of concepts is what its definition says, from each of its sources."""

import json
import math
import random
import re

import pytest

from vlm.api.curation import build_concepts
from vlm.cli.main import main
from vlm.data.curation.caption_filters import (
    ConceptLimits,
    count_unigrams,
    informative_bigrams,
    read_concepts,
    read_synsets,
)
from vlm.errors import UsageError


def slow_information(texts):
    """log2 p(ab) / (p(a) p(b)) of each pair of neighbouring words."""
    runs = [run.split() for text in texts for run in re.split(r"[,.;:?!`]", text.lower())]
    words = [word for run in runs for word in run]
    pairs = [(run[place], run[place + 1]) for run in runs for place in range(len(run) - 1)]
    information = {}
    for first, second in set(pairs):
        together = pairs.count((first, second)) / len(pairs)
        apart = words.count(first) / len(words) * words.count(second) / len(words)
        information[f"{first} {second}"] = (math.log2(together / apart), pairs.count((first, second)))
    return information


def test_pairs_are_those_of_high_information():
    draw = random.Random(0)
    texts = []
    for _ in range(60):
        words = draw.choices(["hot", "dog", "a", "Red", "sky", "over"], weights=[1, 2, 6, 2, 1, 1], k=7)
        texts.append(" ".join(words[:4]) + draw.choice([". ", " ", ", "]) + " ".join(words[4:]))
    counts, number = count_unigrams(texts)
    assert number == 60
    wanted = slow_information(texts)
    for min_pmi, min_count in ((-9.0, 1), (0.1, 1), (0.1, 8), (9.0, 1)):
        found = informative_bigrams(texts, counts, ConceptLimits(min_count=min_count, min_pmi=min_pmi))
        kept = {pair for pair, (bits, count) in wanted.items() if bits >= min_pmi and count >= min_count}
        assert set(found) == kept
        assert found == sorted(found, key=lambda pair: (-round(wanted[pair][0], 9), pair))
    limits = ConceptLimits(min_count=1, min_pmi=-9.0, max_bigrams=3)
    assert (
        informative_bigrams(texts, counts, limits)
        == informative_bigrams(texts, counts, ConceptLimits(min_count=1, min_pmi=-9.0))[:3]
    )


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    licence = "  1 This software and database is being provided to you\n"
    noun = "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is\n00002 05 n 02 Hot_dog 0 frank 1 000 | x\n"
    (folder / "data.noun").write_text(licence + noun, encoding="utf-8")
    (folder / "data.adj").write_text("00003 00 s 01 galore(ip) 0 000 | in great numbers\n", encoding="utf-8")
    return folder


def test_synsets_are_first_lemmas(wordnet, tmp_path):
    assert read_synsets(wordnet) == ["entity", "hot dog", "galore"]
    assert read_synsets(wordnet, folds_case=False) == ["entity", "Hot dog", "galore"]
    with pytest.raises(UsageError, match=r"data\.noun"):
        read_synsets(tmp_path)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A hot dog.\n\nthe Hot dog\na sky\n" * 3, encoding="utf-8")
    return path


def test_every_source_has_its_part_and_each_concept_is_once(tmp_path, wordnet, text_file, capsys):
    titles = tmp_path / "titles"
    titles.write_text("New_York\nhot dog\n\n", encoding="utf-8")
    out = tmp_path / "concepts.json"
    words = ["--min-count", "5", "--min-pmi", "0.5", "--titles", str(titles), "--wordnet", str(wordnet), "--json"]
    assert main(["concepts", str(text_file), str(out), *words]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == ["entity", "hot dog", "galore", "a", "hot", "dog", "new york"]
    assert (summary["texts"], summary["unigrams"], summary["bigrams"]) == (9, 3, 1)
    assert (summary["titles"], summary["synsets"], summary["concepts"]) == (2, 3, 7)
    assert read_concepts(out) == json.loads(out.read_text())


def test_case_is_kept_on_request(tmp_path, text_file):
    summary = build_concepts(text_file, tmp_path / "out.json", min_count=3, min_pmi=99, case="keep")
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"A", "a", "hot", "Hot", "dog", "the", "sky"}
    assert summary.concepts == 7


def test_captions_of_shards_are_read(scene_shards, tmp_path):
    summary = build_concepts(scene_shards / "train", tmp_path / "out.json", min_count=20, languages=["en"])
    assert summary.texts >= 96
    assert "circle" in json.loads((tmp_path / "out.json").read_text())


def test_what_cannot_be_built_is_refused_and_leaves_nothing(tmp_path, text_file, wordnet):
    out = tmp_path / "out.json"
    with pytest.raises(UsageError, match="--min-count"):
        build_concepts(text_file, out, min_count=100)
    with pytest.raises(UsageError, match="min_count = 0"):
        build_concepts(text_file, out, min_count=0)
    with pytest.raises(UsageError, match="no text file"):
        build_concepts(tmp_path / "none.txt", out)
    with pytest.raises(UsageError, match="titles"):
        build_concepts(text_file, out, titles=tmp_path / "none")
    (wordnet / "data.verb").write_text("no synset\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"data\.verb"):
        build_concepts(text_file, out, min_count=1, wordnet=wordnet)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        build_concepts(text_file, out, min_count=1)
    assert out.read_text() == "mine"
