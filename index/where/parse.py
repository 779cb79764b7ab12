"""From the text of a filter to its condition, by recursive descent.

some   = every ("or" every)*
every  = denial ("and" denial)*
denial = "not" denial | "(" some ")" | test
test   = name ("=" | "!=" | "<" | "<=" | ">" | ">=") value
       | name ["not"] ("has" value | "like" text | "in" "(" value ("," value)* ")")
       | name "is" ["not"] "missing"
"""

from collections.abc import Sequence
from typing import NoReturn, cast

from vlm.errors import UsageError
from vlm.index.facts import LONGEST_TEXT, Value
from vlm.index.where.conditions import Condition, Every, Like, Missing, Not, OneOf, Order, Ordered, Some
from vlm.index.where.words import Word, split_words

_DEEPEST = 50
_TESTS = "one of = != < <= > >= in has like is"


def parse_where(text: str) -> Condition:
    """The condition a filter says.

    Raises:
        UsageError: it is none; the place, what stands there and what was expected are named.
    """
    return _Parser(split_words(text)).whole()


class _Parser:
    """Reads words one after the other."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words, self._next, self._depth = words, 0, 0

    def whole(self) -> Condition:
        condition = self._some()
        if self._word.text:
            self._refuse("and, or, or the end")
        return condition

    @property
    def _word(self) -> Word:
        return self._words[self._next]

    def _accept(self, *signs: str) -> str:
        """The next word if it is one of these signs or keywords, and pass over it; else nothing."""
        word = self._word
        if word.kind != "sign" or word.text not in signs:
            return ""
        self._next += 1
        return word.text

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            self._refuse(sign)

    def _some(self) -> Condition:
        parts = [self._every()]
        while self._accept("or"):
            parts.append(self._every())
        return Some(tuple(parts)) if len(parts) > 1 else parts[0]

    def _every(self) -> Condition:
        parts = [self._denial()]
        while self._accept("and"):
            parts.append(self._denial())
        return Every(tuple(parts)) if len(parts) > 1 else parts[0]

    def _denial(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UsageError(f"The filter is more than {_DEEPEST} parentheses deep at place {self._word.place}.")
        if self._accept("not"):
            condition = Not(self._denial())
        elif self._accept("("):
            condition = self._some()
            self._expect(")")
        else:
            condition = self._test()
        self._depth -= 1
        return condition

    def _test(self) -> Condition:
        name = self._word
        if name.kind != "name":
            self._refuse("the name of a field")
        self._next += 1
        field, place = str(name.value), name.place
        missing = Missing(field=field, place=place)
        if self._accept("is"):
            present = self._accept("not")
            self._expect("missing")
            return Not(missing) if present else missing
        if order := self._accept("<", "<=", ">", ">="):
            return Ordered(field=field, place=place, order=cast(Order, order), value=self._value())
        if self._accept("="):
            return OneOf(field=field, place=place, values=(self._value(),))
        if self._accept("!="):
            return Every((Not(missing), Not(OneOf(field=field, place=place, values=(self._value(),)))))
        denied = self._accept("not")
        found = self._membership(field, place)
        return Every((Not(missing), Not(found))) if denied else found

    def _membership(self, field: str, place: int) -> Condition:
        match self._accept("has", "like", "in"):
            case "has":
                return OneOf(field=field, place=place, values=(self._value(),))
            case "like":
                if self._word.kind != "text":
                    self._refuse("a text in single quotes")
                return Like(field=field, place=place, pattern=str(self._value()))
            case "in":
                self._expect("(")
                values = [self._value()]
                while self._accept(","):
                    values.append(self._value())
                self._expect(")")
                return OneOf(field=field, place=place, values=tuple(values))
        self._refuse(_TESTS)

    def _value(self) -> Value:
        word = self._word
        if word.kind not in ("text", "number"):
            self._refuse("a number, true, false or a text in single quotes")
        if isinstance(word.value, str) and len(word.value) >= LONGEST_TEXT:
            raise UsageError(
                f"The text at place {word.place} of the filter has {len(word.value):,} characters; the catalogue keeps "
                f"the first {LONGEST_TEXT:,} of a text, so only shorter ones can be compared."
            )
        self._next += 1
        return word.value

    def _refuse(self, expected: str) -> NoReturn:
        found = self._word.text
        shown = (repr(found) if found[0] not in "'\"" else found[:40]) if found else "its end"
        raise UsageError(f"The filter, at place {self._word.place}: {expected} was expected, found {shown}.")
