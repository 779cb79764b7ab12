#!/usr/bin/env bash
# ray 2.60.0: ray.init(address="HOST:PORT") at an address where nobody listens goes on for more than ten minutes, although the system
# refuses each connection at once. Its 20 attempts are meant for about a second each, as the source says; one takes 40 s. 127.0.0.1 is
# replaced by the machine's own address first. RAY_gcs_server_port_wait_time_s, in words a number of seconds, is the number of attempts.
# Why it matters: a mistyped port, or a job that starts before its cluster, does not fail but seems to hang, on rented machines; with
# log_to_driver=False and a logging_level above warnings little is seen of why.
# The cure: connect a socket to the address before ray.init and say what is wrong, or RAY_gcs_server_port_wait_time_s=1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray==2.60.0" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import socket
import time

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
began = time.monotonic()
try:
    socket.create_connection(tuple(address.split(":")), timeout=10)
except ConnectionRefusedError:
    print(f"a socket is refused after {time.monotonic() - began:.3f} s", flush=True)

import ray

began = time.monotonic()
try:
    ray.init(address=address)
except ConnectionError as error:
    print(f"ray.init: ConnectionError after {time.monotonic() - began:.0f} s")
CODE
export RAY_USAGE_STATS_ENABLED=0
once=$(RAY_gcs_server_port_wait_time_s=1 "$work/venv/bin/python" "$work/seen.py" 2>/dev/null)
printf 'one attempt:\n%s\n' "$once"
seconds=$(sed -n 's/.*ConnectionError after \([0-9]*\) s/\1/p' <<<"$once")
[ "$seconds" -ge 30 ]
code=0
# it does not end at SIGTERM within seconds either
{ timeout --signal=KILL 180 "$work/venv/bin/python" "$work/seen.py" || code=$?; } 2>/dev/null
[ "$code" = 137 ]
echo "as it is: still trying after 180 s"
