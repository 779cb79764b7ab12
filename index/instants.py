"""Times with a time zone, as instants: 08:30+09:00 and 23:30Z of the day before are one."""

import re
from datetime import UTC, datetime

_ISO_TIME = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<clock>\d\d:\d\d(?::\d\d)?)(?:\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d:?\d\d)?)?"
)


def has_zone(text: str) -> bool:
    """Whether a text is an ISO 8601 time with a zone or Z."""
    match = _ISO_TIME.fullmatch(text)
    return bool(match and match["zone"]) and instant_of(text) is not None


def instant_of(value: object) -> str | None:
    """An ISO 8601 date or time in UTC with nine decimals, so that texts sort as times; None: it is neither.

    What has no zone is taken as UTC.

    >>> instant_of("2025-12-01T08:30:00.5+09:00"), instant_of("2025-11-30T23:30Z"), instant_of("noon")
    ('2025-11-30T23:30:00.500000000', '2025-11-30T23:30:00.000000000', None)
    """
    match = _ISO_TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    zone = (match["zone"] or "Z").replace("Z", "+00:00")
    try:
        time = datetime.fromisoformat(f"{match['date']}T{match['clock'] or '00:00'}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):  # the 30th of February, or year 0 after the shift
        return None
    return f"{time:%Y-%m-%dT%H:%M:%S}.{(match['fraction'] or '').ljust(9, '0')}"
