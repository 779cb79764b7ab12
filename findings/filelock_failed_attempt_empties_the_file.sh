#!/usr/bin/env bash
# filelock 3.29.7 (and 3.12.0, 3.16.1, 3.20.0, 3.25.0) against 3.30.0 and 4.2.11, on Linux: FileLock opens its file with truncation
# before it asks for the lock. A second process that tries, waits and gives up with Timeout has by then emptied the file that
# the first process holds locked. From 3.30.0 on the file is left as it is.
# Why it matters: writing one's process number and host into the lock file is the usual way to tell a second user who holds an
# index or a checkpoint folder. Before 3.30 the first refused attempt erases that, so that only it can name the owner, or, where it
# reads after trying, nobody can. Nothing raises; the lock itself works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/seen.py" <<'CODE'
import subprocess
import sys
from pathlib import Path

import filelock

path = Path(sys.argv[1])
if len(sys.argv) > 2:
    try:
        filelock.FileLock(path, timeout=0).acquire()
    except filelock.Timeout:
        sys.exit(0)
    sys.exit("the lock was free")
with filelock.FileLock(path):
    path.write_text("process 1 of host a")
    subprocess.run([sys.executable, __file__, str(path), "second"], check=True)
    print(filelock.__version__, repr(path.read_text()))
CODE
seen=""
for version in 3.29.7 3.30.0 4.2.11; do
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/$version" "filelock==$version" 2>/dev/null
  seen+="$(PYTHONPATH="$work/$version" python3 "$work/seen.py" "$work/$version.lock")"$'\n'
done
printf '%s' "$seen"
grep -qx "3.29.7 ''" <<<"$seen"
grep -qx "3.30.0 'process 1 of host a'" <<<"$seen"
grep -qx "4.2.11 'process 1 of host a'" <<<"$seen"
