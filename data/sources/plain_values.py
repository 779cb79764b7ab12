"""Values of a table as JSON can hold them, exactly: no whole number, time or decimal is rounded."""

import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_SIMPLE = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)


def plain_value(value: Any) -> Any:
    """A value as JSON can hold it: times as ISO text, decimals as numbers where exact, bytes and NaN as nothing."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        # total_seconds() is a float, and loses microseconds of long durations
        return iso_duration((value.days * 86_400 + value.seconds) * 10**9 + value.microseconds * 1000)
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, UUID):
        return str(value)
    item = getattr(value, "item", None)  # numpy's numbers
    return plain_value(item()) if callable(item) and not isinstance(value, bytes) else None


def plain_decimal(value: Decimal) -> int | float | str | None:
    """A decimal as a whole number, as a float where that is the same number, else as text.

    >>> plain_decimal(Decimal("7")), plain_decimal(Decimal("1.10")), plain_decimal(Decimal("0.12345678901234567890"))
    (7.0, 1.1, '0.12345678901234567890')
    """
    if not value.is_finite():
        return None
    # repr is the shortest text of a float, so that 1.10 counts as exact although its binary value is not
    number = float(value)
    return number if math.isfinite(number) and Decimal(repr(number)) == value else str(value)


def exact_value(scalar: pa.Scalar) -> Any:
    """A cell of an Arrow table as a plain value; nanoseconds, which Python's times do not have, are kept."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if any(is_simple(kind) for is_simple in _SIMPLE):
        return scalar.as_py()
    if isinstance(scalar, pa.ExtensionScalar):
        as_python = scalar.as_py()
        return str(as_python) if isinstance(as_python, UUID) else exact_value(scalar.value)
    if pa.types.is_dictionary(kind):
        return exact_value(scalar.dictionary[scalar.index.as_py()])
    if pa.types.is_map(kind):
        return {str(entry["key"].as_py()): exact_value(entry["value"]) for entry in scalar.values}
    if pa.types.is_struct(kind):
        # by position, since a struct may have two fields of one name
        return {field.name: exact_value(scalar[position]) for position, field in enumerate(kind)}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar | pa.ListViewScalar):
        return [exact_value(item) for item in scalar.values]
    if pa.types.is_duration(kind):
        return iso_duration(scalar.value * _NANOSECONDS[kind.unit])
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return _with_nanoseconds(scalar.value, pa.scalar(scalar.value // 1000, pa.timestamp("us", kind.tz)))
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return _with_nanoseconds(scalar.value, pa.scalar(scalar.value // 1000, pa.time64("us")))
    return plain_value(scalar.as_py())


def _with_nanoseconds(nanoseconds: int, rounded: pa.Scalar) -> str:
    """The ISO text of a time that was cut to microseconds, with the three digits that were cut off."""
    # isoformat leaves out a fraction of zero, and puts the offset of the time zone behind it
    text = rounded.as_py().isoformat()
    rest = nanoseconds % 1000
    if not rest:
        return text
    micro = nanoseconds // 1000 % 10**6
    whole, _, fraction = text.partition(".")
    zone_at = 6 if fraction else 0
    zone = fraction[zone_at:] if fraction else ""
    if not fraction:
        whole, zone = _split_zone(whole)
    return f"{whole}.{micro:06d}{rest:03d}{zone}"


def _split_zone(text: str) -> tuple[str, str]:
    """The text before and the offset after the time of an ISO text without a fraction."""
    # the minus signs of the date come before the T
    begin = text.find("T") + 1
    offset = max(text.rfind("+"), text.rfind("-", begin))
    return (text[:offset], text[offset:]) if offset > begin else (text, "")


def iso_duration(nanoseconds: int) -> str:
    """A duration in ISO 8601, in seconds.

    >>> iso_duration(1_500_000_000), iso_duration(-7), iso_duration(3600 * 10**9)
    ('PT1.5S', '-PT0.000000007S', 'PT3600S')
    """
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    digits = f"{fraction:09d}".rstrip("0")
    sign = "-" if nanoseconds < 0 else ""
    return f"{sign}PT{seconds}{'.' if digits else ''}{digits}S"
