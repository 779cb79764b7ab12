import json

import numpy as np
import pytest

from vlm.data.curation.caption_filters import read_concepts, spaced
from vlm.errors import UsageError


@pytest.fixture
def concepts(tmp_path):
    def write(*names):
        path = tmp_path / "concepts.txt"
        path.write_text("\n".join(names), encoding="utf-8")
        return path

    return write


def test_counts_and_expected_weights_are_those_computed_by_hand(make_shard, apply, concepts):
    captions = [["A dog, running."], ["dog", "a dog"], ["hot dog"], ["dog and cat"], ["CAT"], ["catalogue"], ["bird"]]
    shard = make_shard([{"captions": texts} for texts in captions])
    curated = apply(shard, f"balance:concepts={concepts('dog', 'cat', 'Hot Dog', 'fish')},cap=1")
    result = curated.steps[0].result
    # dog matches 4 samples (p 1/4), cat 2 (1/2), hot dog 1 (1): 1 - (1 - p)(1 - q)
    assert result.weights.tolist() == pytest.approx([1 / 4, 1 / 4, 1, 1 - 3 / 4 * 1 / 2, 1 / 2, 0, 0], abs=1e-12)
    assert list(result.curve) == [
        {"concept": "dog", "matches": 4, "expected": pytest.approx(1 / 4 + 1 / 4 + 1 + 5 / 8)},
        {"concept": "cat", "matches": 2, "expected": pytest.approx(5 / 8 + 1 / 2)},
        {"concept": "hot dog", "matches": 1, "expected": pytest.approx(1)},
    ]
    record = result.record
    assert (record["concepts_given"], record["concepts_matched"], record["concepts_above_cap"]) == (4, 3, 2)
    assert record["samples_matched"] == 5
    assert result.why(3) == "0.62 · cat (2)"
    assert result.why(6) == "matches no concept"


def test_the_drawn_number_is_within_binomial_bounds(make_shard, make_image, apply, concepts):
    image = make_image(0)
    captions = [["dog"]] * 2000 + [["dog cat"]] * 500 + [["bird"]] * 60
    shard = make_shard([{"captions": texts, "image": image} for texts in captions])
    curated = apply(shard, f"balance:concepts={concepts('dog', 'cat', 'bird')},cap=100")
    times = curated.selection.times[0]
    assert times[2500:].tolist() == [1] * 60
    for part, probability in ((times[:2000], 100 / 2500), (times[2000:2500], 1 - (1 - 100 / 2500) * (1 - 100 / 500))):
        bound = 4 * np.sqrt(len(part) * probability * (1 - probability))
        assert abs(part.sum() - len(part) * probability) < bound
    other = apply(shard, f"balance:concepts={concepts('dog', 'cat', 'bird')},cap=100", seed=1)
    assert other.selection.times[0].tolist() != times.tolist()


def test_only_what_is_left_is_counted(make_shard, make_image, apply, concepts):
    image = make_image(0)
    shard = make_shard([{"captions": ["dog"], "image": image}] * 3 + [{"captions": ["dog"]}])
    curated = apply(shard, "exact-duplicates", f"balance:concepts={concepts('dog')},cap=2")
    assert curated.steps[1].result.curve[0]["matches"] == 2
    assert curated.selection.kept == 2


def test_tags_and_scripts_without_spaces_are_matched(make_shard, apply, concepts):
    shard = make_shard(
        [{"captions": {"zh": ["一只红狗在跑"]}}, {"captions": ["photo"], "tags": ["dog"]}, {"captions": ["dogma"]}]
    )
    path = concepts("狗", "dog")
    assert apply(shard, f"balance:concepts={path},cap=9").selection.times[0].tolist() == [1, 0, 0]
    assert apply(shard, f"balance:concepts={path},cap=9,languages=tags").selection.times[0].tolist() == [0, 1, 0]


def test_case_is_kept_on_request_as_metaclips_code_does(make_shard, apply, concepts):
    shard = make_shard([{"captions": ["A US flag"]}, {"captions": ["show us a flag"]}])
    path = concepts("US")
    assert apply(shard, f"balance:concepts={path},cap=9").selection.times[0].tolist() == [1, 1]
    assert apply(shard, f"balance:concepts={path},cap=9,case=keep").selection.times[0].tolist() == [1, 0]


def test_concepts_are_read_from_lines_or_a_json_list(tmp_path, concepts):
    assert read_concepts(concepts("Dog", "dog", "", "U.S.")) == ["dog", "u . s ."]
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(["A", "b"]))
    assert read_concepts(path) == ["a", "b"]
    with pytest.raises(UsageError, match="names no concept"):
        read_concepts(concepts("", " "))
    with pytest.raises(UsageError, match="cannot be read"):
        read_concepts(tmp_path / "none")
    assert spaced("Hot\tDog!") == "hot dog !"
