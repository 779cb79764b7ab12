"""Shard URLs: a path on this machine, or a file behind one of a few protocols."""

import importlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec

from vlm.errors import UsageError

PROTOCOLS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""The protocols that may be read, and the package each needs. Nothing else is opened: no commands, no chained URLs."""

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_COMPRESSED = (".tar.gz", ".tgz")
_LOCAL = frozenset({"file", "local"})
_KNOWN_ELSEWHERE = frozenset({"pipe", "ssh", "sftp", "ftp", "cmd", "exec", "file", "local", "s3a"})
_BETWEEN = re.compile(r"::(?![0-9a-fA-F:.]*\])")  # but not inside the brackets of an IPv6 host
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):(//)?")


def protocol_of(url: str) -> str:
    """The protocol of a URL in lower case; empty for a path on this machine.

    Raises:
        UsageError: it is not one of `PROTOCOLS`, or protocols are chained.
    """
    match = _SCHEME.match(url)
    if match is None or not (match[2] or _is_command(url, match[1])):
        return ""
    protocol = match[1].lower()
    if match[2] and protocol in _LOCAL:
        return ""
    if not match[2] or protocol not in PROTOCOLS:
        raise UsageError(
            f"The protocol {protocol!r} of {url!r} is not supported for shards; "
            f"give a path on this machine, or one of {', '.join(f'{name}://' for name in PROTOCOLS)}."
        )
    return protocol


def split_urls(joined: str) -> list[str]:
    """The URLs joined with `::`.

    Raises:
        UsageError: one of them is the bare name of a protocol, as in the chained URLs of fsspec.
    """
    parts = _BETWEEN.split(joined)
    for part in parts:
        protocol_of(part if ":" in part else f"{part}:")
    return parts


def _is_command(url: str, word: str) -> bool:
    """Whether `word:` at the beginning names something other than a file of that name."""
    is_known = word.lower() in _KNOWN_ELSEWHERE or word.lower() in fsspec.available_protocols()
    return is_known and not Path(url.split("/")[0].rstrip(":")).exists()


def is_remote(url: str) -> bool:
    """Whether a URL is read over a protocol rather than from this machine's own files.

    Raises:
        UsageError: over one that is not allowed.
    """
    return bool(protocol_of(url))


def is_compressed(url: str) -> bool:
    """Whether a shard has to be unpacked before it can be read by position."""
    return url_basename(url).lower().endswith(_COMPRESSED)


def needs_cache(url: str) -> bool:
    """Whether a shard is read from the cache rather than from its own place."""
    return is_remote(url) or is_compressed(url)


def url_basename(url: str) -> str:
    """The last part of a URL, without the query of a web URL.

    >>> url_basename("https://host/a/B.tar?key=1")
    'B.tar'
    """
    return _without_query(url).rpartition("/")[2]


def is_shard(url: str) -> bool:
    """Whether a URL names a tar rather than a folder."""
    return url_basename(url).lower().endswith(SHARD_SUFFIXES)


def local_path(url: str) -> str:
    """A path on this machine, without `file://` before it."""
    match = _SCHEME.match(url)
    if match is None or not match[2] or match[1].lower() not in _LOCAL:
        return url
    return unquote(urlsplit(url).path)


def sibling_url(url: str, name: str) -> str:
    """The URL of the file `name` in the folder of a remote URL; the query of a web URL is left out.

    >>> sibling_url("s3://bucket/a/0.tar", "manifest.json")
    's3://bucket/a/manifest.json'
    """
    return f"{_without_query(url).rpartition('/')[0]}/{name}"


def require_package(protocol: str) -> None:
    """Import what a protocol needs.

    Raises:
        UsageError: it is not installed.
    """
    package = PROTOCOLS[protocol]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{protocol}:// needs {package}; install it with: pip install {package}") from error


def _without_query(url: str) -> str:
    is_web = url.lower().startswith(("http://", "https://"))
    return urlsplit(url)._replace(query="", fragment="").geturl() if is_web else url
