"""Run `vlm` of a checkout once and print what it cost, as JSON: measure_command.py CHECKOUT WORD …

A process of its own, and a small one: the system counts the memory of whoever starts a process as the peak of that one.
"""

import json
import os
import sys
import time

checkout, *words = sys.argv[1:]
environment = os.environ | {"PYTHONPATH": checkout}
# otherwise each process would compile the checkout's modules anew
environment.pop("PYTHONDONTWRITEBYTECODE", None)
silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
started = time.perf_counter()
# -P: the folder it is started in is not searched for modules
process = os.posix_spawn(sys.executable, [sys.executable, "-P", "-m", "vlm", *words], environment, file_actions=silent)
_, status, usage = os.wait4(process, 0)
cost = {
    "wall": time.perf_counter() - started,
    "cpu": usage.ru_utime + usage.ru_stime,
    "megabytes": usage.ru_maxrss / 1024,
}
print(json.dumps(cost))
sys.exit(bool(status))
