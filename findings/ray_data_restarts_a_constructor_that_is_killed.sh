#!/usr/bin/env bash
# ray 2.60.0, Ray Data: an actor class (map with a class) whose constructor raises ends the work once
# DataContext.max_consecutive_actor_init_deaths is spent. One whose process is killed in the constructor, as the system does
# when a model does not fit into memory, is never counted: Ray restarts it again and again without end, and the call never
# returns. Here the limit is 2: the constructor that raises is tried three times, the one that is killed ten times and on.
# Why it matters: the usual advice is to load the model in the constructor; a model too large for the machine then makes a
# job that hangs and burns processors instead of one that fails.
# The cure: open the model with the first row, not in the constructor, and count the attempts of each row in an actor of its
# own, which outlives the process.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray[data]==2.60.0" "pyarrow==26.0.1" "pandas==3.1.1"
cat >"$work/actors.py" <<'CODE'
import os
import signal


class Model:
    def __init__(self, how, log):
        with open(log, "a") as file:
            file.write("tried\n")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no room")

    def __call__(self, row):
        return row
CODE
cat >"$work/seen.py" <<'CODE'
import sys
import threading
import time
from pathlib import Path

import actors
import ray

how, log = sys.argv[1:]
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="error")
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
context.max_consecutive_actor_init_deaths = 2
rows = ray.data.from_items([{"row": 0}]).map(
    actors.Model, fn_constructor_args=(how, log), compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
)
ended = []


def work():
    try:
        rows.take_all()
    except Exception as error:
        ended.append(type(error).__name__)


thread = threading.Thread(target=work, daemon=True)
thread.start()
deadline = time.monotonic() + 300
while thread.is_alive() and time.monotonic() < deadline:
    if Path(log).exists() and len(Path(log).read_text().split()) >= 10:
        break
    time.sleep(0.1)
tried = len(Path(log).read_text().split())
print(f"{how}: tried {tried} times, {'ended with ' + ended[0] if ended else 'still trying'}", flush=True)
CODE
cd "$work"
export PYTHONPATH="$work" RAY_USAGE_STATS_ENABLED=0
seen=$(for how in raises killed; do "$work/venv/bin/python" seen.py "$how" "$work/$how.log" 2>/dev/null; done | grep "tried")
echo "$seen"
grep -Eq "raises: tried 3 times, ended with" <<<"$seen"
grep -Eq "killed: tried 1[0-9] times, still trying" <<<"$seen"
