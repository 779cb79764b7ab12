#!/usr/bin/env bash
# rensa 0.5.0, RMinHashDeduplicator(threshold, num_perm=128, use_lsh=True), as its documentation shows it: the number of bands is chosen by the
# threshold, and the higher that is, the fewer of the pairs above it are found. Captions of twelve words of which one was replaced
# (similarity 0.85) are duplicates at threshold 0.8 for 94% of them without LSH, by the same sketches, and for 44% with it;
# texts of 100 words with four replaced (0.92) at threshold 0.9 for 86% and 22%. At 0.5 and 0.6 little is lost. num_bands=32 finds nearly
# what is found without LSH, at each threshold. datasketch 2.0.0 finds 68% and 52% of these.
# Also: query() of RMinHashLSH does not look at its threshold: 0.1 and 0.9 give the same candidates, also those that have 0.54.
# Why it matters: a strict threshold is chosen to be on the safe side, and just then most near-duplicates stay in the training set, or one
# stays in both halves of a split. A test with equal texts, or with a low threshold, finds all.
# The cure: num_bands=32, or use_lsh=False where the texts are few.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "rensa==0.5.0" "datasketch==2.0.0" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import random

from datasketch import MinHash, MinHashLSH
from rensa import RMinHash, RMinHashDeduplicator, RMinHashLSH

random.seed(0)
words = [f"word{number}" for number in range(30_000)]
TEXTS = 500


def sketch(text):
    found = RMinHash(num_perm=128, seed=42)
    found.update(text)
    return found


def share_found(threshold, texts, changed, **bands):
    """The share of changed texts that are duplicates of what was added."""
    index = RMinHashDeduplicator(threshold=threshold, num_perm=128, **bands)
    for row, text in enumerate(texts):
        index.add(str(row), sketch(text))
    return round(sum(index.is_duplicate("changed", sketch(text)) for text in changed) / TEXTS, 2)


def share_by_datasketch(threshold, texts, changed):
    index = MinHashLSH(threshold=threshold, num_perm=128)

    def other(text):
        found = MinHash(128)
        found.update_batch([word.encode() for word in text])
        return found

    for row, text in enumerate(texts):
        index.insert(row, other(text))
    return round(sum(row in index.query(other(text)) for row, text in enumerate(changed)) / TEXTS, 2)


seen = {}
for threshold, length, replaced in ((0.8, 12, 1), (0.9, 100, 4), (0.5, 100, 30), (0.6, 100, 21)):
    texts = [random.sample(words, length) for _ in range(TEXTS)]
    changed = [text[: length - replaced] + random.sample(words, replaced) for text in texts]
    similarity = (length - replaced) / (length + replaced)
    without = share_found(threshold, texts, changed, use_lsh=False)
    by_default = share_found(threshold, texts, changed, use_lsh=True)
    more = share_found(threshold, texts, changed, use_lsh=True, num_bands=32)
    same = share_found(threshold, texts, texts, use_lsh=True)
    seen[threshold] = (without, by_default, more)
    print(f"threshold {threshold}, similarity {similarity:.2f}: without LSH {without}, with {by_default}, with 32 bands {more};", end=" ")
    print(f"datasketch {share_by_datasketch(threshold, texts, changed)}; equal texts {same}")
    assert same == 1 and without - more < 0.05
assert seen[0.8][0] > 0.85 and seen[0.8][1] < 0.5 and seen[0.9][0] > 0.8 and seen[0.9][1] < 0.35
assert all(seen[threshold][0] - seen[threshold][1] < 0.1 for threshold in (0.5, 0.6))

one, other = sketch(words[:100]), sketch(words[30:130])
for threshold in (0.1, 0.9):
    index = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=32)
    index.insert(1, one)
    print(f"RMinHashLSH, threshold {threshold}: a text of similarity 0.54 gives {index.query(other)}")
    assert index.query(other) == [1]
CODE
"$work/venv/bin/python" "$work/seen.py"
