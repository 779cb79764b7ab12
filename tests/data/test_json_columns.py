import random

import pytest

from vlm.data.json_columns import MAX_KEYS, JsonColumns
from vlm.data.samples import DroppedValue, DroppedValues, Words


def _drawn_value(rng: random.Random, depth: int = 0):
    kinds = [None, True, 3, -(2**60), 2.5, "text", [], {}]
    if depth < 3:
        kinds.append([_drawn_value(rng, depth + 1) for _ in range(rng.randrange(3))])
        kinds.append({rng.choice("abcdefg"): _drawn_value(rng, depth + 1) for _ in range(rng.randrange(4))})
    return rng.choice(kinds)


def _drawn_words(rng: random.Random, number: int) -> Words:
    languages = rng.sample(["", "de", "zh", "fr"], rng.randrange(3))
    metadata = {name: _drawn_value(rng) for name in rng.sample("uvwxyz", rng.randrange(6))}
    value = DroppedValue(f"{number}.jpg", f"row {number}", "price", number, 1)
    dropped = DroppedValues(rng.choices(["price", "name", "size"], k=2), 1, value) if rng.random() < 0.2 else None
    return Words({language: ("a",) for language in languages}, metadata, dropped)


@pytest.mark.parametrize("seed", range(30))
def test_columns_of_parts_that_are_merged_are_those_of_the_whole(seed):
    rng = random.Random(seed)
    words = [_drawn_words(rng, number) for number in range(40)]
    whole, merged = JsonColumns(), JsonColumns()
    for first in range(0, len(words), 7):
        part = JsonColumns()
        for said in words[first : first + 7]:
            whole.add(said)
            part.add(said)
        merged.merge(part)
    # the text, for equal dicts may differ in their order
    assert repr(merged) == repr(whole)
    assert not merged.is_capped


@pytest.mark.parametrize("is_list", [False, True])
def test_columns_say_when_not_all_keys_were_looked_at(is_list):
    columns = JsonColumns()
    scores = {f"k{number}": number for number in range(MAX_KEYS + 1)}
    columns.add(Words({}, {"inner": {"scores": [scores] if is_list else scores}}))
    assert columns.is_capped
