"""CLIP's byte-pair encoding (Radford et al. 2021, after GPT-2's) with open_clip's cleaning of texts, and without torch.

The vocabulary is the file that open_clip ships; importing open_clip itself would load torch, which takes seconds.
"""

import gzip
import html
import importlib.util
import io
import re
import string
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm.errors import VlmError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 49152 - 256 - 2
START = "<start_of_text>"
END = "<end_of_text>"
_END_OF_WORD = "</w>"
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MAX_CACHED_WORDS = 1 << 17
# the merges that are used take 525 KB
_USED_BYTES = 600_000

# the expressions of open_clip's SimpleTokenizer: for any text, and for lower-case ASCII, where `re` says the same
_ANY_PART = rf"""{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"""
_ASCII_PART = re.compile(rf"""{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+""")


def shipped_vocabulary() -> bytes:
    """The compressed file of merges that is part of open_clip.

    Raises:
        VlmError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise VlmError("CLIP's vocabulary comes with open_clip, which is not installed: pip install open_clip_torch.")
    return (Path(folders[0]) / VOCABULARY).read_bytes()


class ClipBpe:
    """From text to ids and back; ids are those of open_clip's SimpleTokenizer.

    No piece reaches over a space, so the pieces of words are kept: most words of a caption have been met before.
    """

    def __init__(self, vocabulary: bytes) -> None:
        # the file goes on with merges that CLIP does not use, more than four times as many
        with gzip.open(io.BytesIO(vocabulary)) as file:
            whole_lines = file.read(_USED_BYTES).rpartition(b"\n")[0].decode()
        merges = whole_lines.split("\n", NUM_MERGES + 1)[1 : NUM_MERGES + 1]
        # bytes as visible characters, the printable ones first, as GPT-2 orders them
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = sorted(set(range(256)).difference(printable))
        self._character_of_byte = dict(zip(printable, map(chr, printable), strict=True))
        self._character_of_byte |= {byte: chr(256 + number) for number, byte in enumerate(others)}
        characters = [*self._character_of_byte.values()]
        ends = [f"{character}{_END_OF_WORD}" for character in characters]
        self.pieces = [*characters, *ends, *(merge.replace(" ", "") for merge in merges), START, END]
        self.ids = dict(zip(self.pieces, range(len(self.pieces)), strict=True))
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those of start and end."""
        ids: list[int] = []
        # plain text needs no cleaning; ftfy and html may join, part or change words of anything else
        if text.isascii() and text.isprintable() and "&" not in text:
            for word in text.lower().split():
                ids += self._words.get(word) or self._ids_of_word(word)
            return ids
        for part in self._any_part.findall(clean_text(text, "lower")):
            ids += self._ids_of_part(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, with a space after each word."""
        characters = "".join(self.pieces[token] for token in ids)
        byte_of_character = {character: byte for byte, character in self._character_of_byte.items()}
        return bytes(map(byte_of_character.__getitem__, characters)).decode(errors="replace").replace("</w>", " ")

    @cached_property
    def _any_part(self) -> Any:
        import regex  # only here, since most queries are plain, and it has classes of Unicode, which `re` lacks

        return regex.compile(_ANY_PART, regex.IGNORECASE)

    def _ids_of_word(self, word: str) -> tuple[int, ...]:
        # emptied rather than trimmed: the frequent words are back within a few batches
        if len(self._words) >= _MAX_CACHED_WORDS:
            self._words.clear()
        ids: list[int] = []
        for part in _ASCII_PART.findall(word):
            ids += self._ids_of_part(part)
        self._words[word] = tuple(ids)
        return self._words[word]

    def _ids_of_part(self, part: str) -> list[int]:
        """The ids of what holds neither spaces nor both letters and signs."""
        if part in (START, END):
            return [self.ids[part]]
        shown = "".join(map(self._character_of_byte.__getitem__, part.encode()))
        # what the vocabulary has whole is left whole by its merges (there is a test), which take ten times as long
        whole = self.ids.get(f"{shown}{_END_OF_WORD}")
        return [whole] if whole is not None else [self.ids[piece] for piece in self._merge(shown)]

    def _merge(self, shown: str) -> list[str]:
        """The pieces of a word: the pair of neighbours with the lowest rank is joined until none has one."""
        pieces = [*shown[:-1], f"{shown[-1]}{_END_OF_WORD}"]
        while len(pieces) > 1:
            pairs = [f"{first} {second}" for first, second in pairwise(pieces)]
            best = min(pairs, key=lambda pair: self._ranks.get(pair, NUM_MERGES))
            if best not in self._ranks:
                break
            joined: list[str] = []
            position = 0
            while position < len(pieces):
                # from left to right, so that of three equal pieces the first two are joined
                is_pair = position < len(pairs) and pairs[position] == best
                joined.append(best.replace(" ", "") if is_pair else pieces[position])
                position += 2 if is_pair else 1
            pieces = joined
        return pieces


def clean_text(text: str, how: str) -> str:
    """A text as open_clip's tokenizers clean it: `lower`, `whitespace` (case is kept) or `canonicalize` (SigLIP's).

    Broken encodings and HTML entities are mended, white space becomes single; `canonicalize` also removes punctuation.
    """
    # of plain text all that would be left as it is
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    if how != "whitespace":
        text = text.lower()
    return " ".join(text.split())
