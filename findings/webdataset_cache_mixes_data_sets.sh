#!/usr/bin/env bash
# webdataset 1.0.2: with `cache_dir`, a shard is kept by the last part of its address alone. Two data sets whose shards have the
# same names and one cache: the second is not fetched, its reader gives the samples of the first, without a word. 0.2.86
# kept the path (train/00000.tar apart from val/00000.tar), yet not the host or bucket. `url_to_name`, which the
# documentation offers for this, is accepted by WebDataset 1.0.2 and never called.
# Why it matters: img2dataset calls the first shard of every set 00000.tar: captions of CC3M in an epoch of CC12M, or train in
# place of val, a leak that raises the score. A cache that was right becomes wrong by an upgrade. The cure: a cache_dir
# for each data set and split.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/seen.py" <<'CODE'
import functools
import http.server
import io
import sys
import tarfile
import threading
from importlib.metadata import version
from pathlib import Path

import webdataset

folder = Path(sys.argv[1])
release = version("webdataset")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(host, splits):
    """The address of a host whose shards hold one sample: the names of the host and the split."""
    for split in splits:
        (folder / host / split).mkdir(parents=True)
        text = f"{host} {split}".encode()
        with tarfile.open(folder / host / split / "00000.tar", "w") as tar:
            entry = tarfile.TarInfo("0001.txt")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    handler = functools.partial(Quiet, directory=str(folder / host))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def read(cache, urls, **options):
    (folder / cache).mkdir(exist_ok=True)
    options |= {"shardshuffle": False, "cache_dir": str(folder / cache)}
    return [webdataset.WebDataset(url, **options).__iter__().__next__()["txt"].decode() for url in urls]


one, other = serve("one", ["train", "val"]), serve("other", ["train"])
splits = read("a", [f"{one}/train/00000.tar", f"{one}/val/00000.tar"])
hosts = read("b", [f"{one}/train/00000.tar", f"{other}/train/00000.tar"])
called = []
read("c", [f"{one}/train/00000.tar"], url_to_name=lambda url: called.append(url) or "mine.tar")
print(f"webdataset {release}: train and val of one host {splits}; train of two hosts {hosts}; url_to_name called {len(called)} times")
assert hosts == ["one train", "one train"], hosts
assert splits == (["one train", "one val"] if release == "0.2.86" else ["one train", "one train"]), splits
assert bool(called) == (release == "0.2.86"), called
CODE
for version in 0.2.86 1.0.2; do
  python3 -m venv "$work/venv-$version"
  "$work/venv-$version/bin/pip" install --quiet --disable-pip-version-check "webdataset==$version" 2>/dev/null
  "$work/venv-$version/bin/python" "$work/seen.py" "$work/$version"
done
