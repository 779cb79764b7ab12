"""Metadata values as texts of plain letters and digits that sort and compare as the values do.

Milvus compares JSON numbers as doubles, so that whole numbers beyond 2^53 meet; it has wildcards that cannot be escaped
everywhere, and string literals whose escapes differ between milvus-lite and a server. A key needs no quotes, no escapes
and no arithmetic, so that a filter means the same there as in SQLite, and no text of a user is ever part of it.
"""

from math import inf

from vlm.index.metadata import FieldValue

_HIGH = "abcdefghijklmnop"
_LOW = "ABCDEFGHIJKLMNOP"
# by byte: two letters that ascend with it; small and capital ones, so that a match cannot begin within a byte
_LETTERS = tuple(high + low for high in _HIGH for low in _LOW)
_FOLDED = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")

# of doubles, from the smallest subnormal on; with infinity as one more than the largest
_LOWEST_EXPONENT = -1074
_INFINITE = 1024 - _LOWEST_EXPONENT
_EXPONENT_DIGITS = 3
_FRACTION_BITS = 64
_ALL_DIGITS = 16 ** (_EXPONENT_DIGITS + _FRACTION_BITS // 4) - 1
_NEGATIVE = "a"
_ZERO = "b"
_POSITIVE = "c"


def number_key(value: int | float) -> str:
    """A key that ascends with the number; whole numbers of 64 bits and doubles are compared exactly.

    >>> number_key(0), number_key(1) == number_key(1.0), number_key(-2) < number_key(-0.5) < number_key(2**62)
    ('b', True, True)
    >>> number_key(2**62) < number_key(2**62 + 1), number_key(1e300) < number_key(float("inf"))
    (True, True)
    """
    if value == 0:
        return _ZERO
    size = abs(value)
    if size == inf:
        exponent = _INFINITE
        fraction = 0
    else:
        # a power of two below the line; above it at most 64 bits, or those of a double with zeros behind them
        numerator, denominator = size.as_integer_ratio()
        bits = numerator.bit_length()
        exponent = bits - denominator.bit_length() - _LOWEST_EXPONENT
        fraction = numerator << _FRACTION_BITS >> bits
    digits = exponent << _FRACTION_BITS | fraction
    # the further below zero, the earlier
    sign, ordered = (_POSITIVE, digits) if value > 0 else (_NEGATIVE, _ALL_DIGITS - digits)
    return f"{sign}{ordered:0{_EXPONENT_DIGITS + _FRACTION_BITS // 4}x}"


def number_of(key: str) -> int | float:
    """The inverse of `number_key`; whole numbers of 64 bits come back as such.

    >>> [number_of(number_key(value)) for value in (0, -7, 2**62 + 1, 0.1, float("-inf"))]
    [0, -7, 4611686018427387905, 0.1, -inf]
    """
    if key == _ZERO:
        return 0
    digits = int(key[1:], 16)
    if key[0] == _NEGATIVE:
        digits = _ALL_DIGITS - digits
    sign = 1 if key[0] == _POSITIVE else -1
    exponent = digits >> _FRACTION_BITS
    fraction = digits & (1 << _FRACTION_BITS) - 1
    if exponent == _INFINITE:
        return sign * inf
    shift = _FRACTION_BITS - 1 - (exponent + _LOWEST_EXPONENT)
    if shift <= 0:
        whole = fraction << -shift
        return sign * whole if -(2**63) <= sign * whole < 2**63 else sign * float(whole)
    if shift < _FRACTION_BITS and not fraction & (1 << shift) - 1:
        return sign * (fraction >> shift)
    # exact: Python divides whole numbers with one rounding, and the quotient is a double
    return sign * (fraction / (1 << shift))


def text_key(text: str) -> str:
    """Letters that ascend as the text's characters do, two for each byte of UTF-8.

    >>> text_key("a"), text_key("ab") > text_key("a"), text_key("a") < text_key("狗")
    ('gB', True, True)
    """
    return "".join(map(_LETTERS.__getitem__, text.encode()))


def text_of(key: str) -> str:
    """The inverse of `text_key`.

    >>> text_of(text_key("a dog's 狗"))
    "a dog's 狗"
    """
    pairs = zip(key[::2], key[1::2], strict=True)
    return bytes(_HIGH.index(high) << 4 | _LOW.index(low) for high, low in pairs).decode()


def value_of(kind: str, key: str) -> FieldValue:
    """The value of a key. kind: n for a number, t for a text."""
    return number_of(key) if kind == "n" else text_of(key)


def fold_ascii(text: str) -> str:
    """The text with A to Z as small letters, which is how `like` and hints compare."""
    return text.translate(_FOLDED)


def folded_key(text: str) -> str:
    """The key of a text whose A to Z are small letters, for `like`."""
    return text_key(fold_ascii(text))


def pattern_key(pattern: str) -> str:
    """The pattern for `folded_key`s of a pattern of the filter language, in which % is any run of characters.

    Two letters that stand for one byte are never taken apart, and UTF-8 characters begin with bytes of their own, so
    that a match of letters is a match of characters.

    >>> pattern_key("A%%b"), pattern_key("%")
    ('gB%gC', '%')
    """
    parts = [folded_key(part) for part in pattern.split("%")]
    # runs of %, which a server may read as an escape
    return "%".join([parts[0], *filter(None, parts[1:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
