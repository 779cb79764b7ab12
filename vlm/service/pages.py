"""Where a page of answers ended, as a word that a later question hands back."""

import base64
import binascii
import struct
from dataclasses import dataclass

from vlm.errors import UsageError

_LAYOUT = struct.Struct(">IIIIfq")


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The last answer shown.

    generation, first: of the index, and answers asked for, when the first page was shown.
    question: digest of what was asked. seen: answers shown so far. score, row: of the last of them.
    """

    generation: int
    question: int
    first: int
    seen: int
    score: float
    row: int

    def to_word(self) -> str:
        """As letters, digits, - and _.

        >>> cursor = Cursor(generation=1, question=2, first=10, seen=10, score=0.5, row=7)
        >>> Cursor.from_word(cursor.to_word()) == cursor
        True
        """
        packed = _LAYOUT.pack(self.generation, self.question, self.first, self.seen, self.score, self.row)
        return base64.urlsafe_b64encode(packed).decode()

    @classmethod
    def from_word(cls, word: str) -> "Cursor":
        """The inverse of `to_word`.

        Raises:
            UsageError: the word is none.
        """
        try:
            generation, question, first, seen, score, row = _LAYOUT.unpack(base64.b64decode(word, b"-_", validate=True))
        except (binascii.Error, struct.error, ValueError) as error:
            raise UsageError(f"{word!r} is no cursor; take it from the answer before, or leave it out.") from error
        return cls(generation=generation, question=question, first=first, seen=seen, score=score, row=row)
