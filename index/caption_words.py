"""Words of captions as full-text search compares them, so that lodz finds Łódź, strasse finds straße and 狗 finds 小狗.

SQLite's tokenizer ignores case, and accents that Unicode writes as marks. Letters such as ł, ø and ß are letters of
their own to it; they are spelled out here (anyascii), as are compatibility forms (full-width, ligatures). In scripts
that are written without spaces, or that attach particles to a word (Hangul), each character counts as a word, and the
characters of a search word as a phrase.
"""

import re
import unicodedata

from anyascii import anyascii

WORDS_VERSION = 1
"""Kept in the catalogue as SQLite's user_version. In one of version 0 only `split_ideographs` was applied."""

# with 々 and 〇, which count as letters of Chinese and Japanese, and ー, which lengthens a vowel
_UNSPACED = re.compile(
    r"([\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u1100-\u11ff\uac00-\ud7af"  # Hangul
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"  # Thai, Lao, Burmese, Khmer
)
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


class _Spelling(dict[int, str]):
    """For `str.translate`: Latin letters in ASCII, all else as it is; each character is looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_latin = code > 127 and unicodedata.name(character, "").startswith("LATIN ")
        self[code] = anyascii(character) if is_latin else character
        return self[code]


_SPELLING = _Spelling()


def fold(text: str) -> str:
    """The text as it is indexed and searched.

    >>> fold("Łódź, Straße"), fold("小狗"), fold("ﬁsh in ＡＢＣ")
    ('Lodz, Strasse', ' 小  狗 ', 'fish in ABC')
    """
    if text.isascii():
        return text
    folded = unicodedata.normalize("NFKC", text).translate(_SPELLING)
    return folded if folded.isascii() else _UNSPACED.sub(r" \1 ", folded)


def split_ideographs(text: str) -> str:
    """The text with each Chinese or Japanese character as a word, as catalogues of version 0 have it."""
    return _IDEOGRAPH.sub(r" \1 ", text)
