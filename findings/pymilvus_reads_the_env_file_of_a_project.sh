#!/usr/bin/env bash
# pymilvus 3.0.2 (python-dotenv 1.2.4): `import pymilvus` reads the nearest .env file above site-packages into os.environ. Where the
# virtual environment lies in the project's folder, as .venv does, that is the project's own .env: its passwords and keys are in
# the environment of the process, and of every process it starts, although nothing but the import was asked for. The folder one
# works in plays no part. Variables that are set already stay.
# Why it matters: a script that imports a vector database's client runs with other settings than before (HTTPS_PROXY, CUDA devices,
# OMP_NUM_THREADS, tokens), on the developer's machine alone; and secrets meant for one program reach the logs and crash reports of
# others. The cure: PYTHON_DOTENV_DISABLED=1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/project" "$work/elsewhere"
python3 -m venv "$work/project/.venv"
"$work/project/.venv/bin/pip" install --quiet --disable-pip-version-check "pymilvus==3.0.2" "python-dotenv==1.2.4" 2>/dev/null
printf 'PAYMENT_API_KEY=from-the-file\nOMP_NUM_THREADS=7\nALREADY=from-the-file\n' >"$work/project/.env"
cat >"$work/seen.py" <<'CODE'
import os
import subprocess
import sys

names = ("PAYMENT_API_KEY", "OMP_NUM_THREADS", "ALREADY")
before = {name: os.environ.get(name) for name in names}
import pymilvus

after = {name: os.environ.get(name) for name in names}
print("before the import:", before)
print("after it:         ", after)
child = "import os; print(os.environ.get('PAYMENT_API_KEY'))"
inherited = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip()
print("in a child that imports nothing:", inherited)
if os.environ.get("PYTHON_DOTENV_DISABLED"):
    assert after == before and inherited == "None"
else:
    assert before["PAYMENT_API_KEY"] is None and after["PAYMENT_API_KEY"] == inherited == "from-the-file"
    assert after["OMP_NUM_THREADS"] == "7" and after["ALREADY"] == "set by hand"
CODE
cd "$work/elsewhere"
unset OMP_NUM_THREADS PAYMENT_API_KEY
ALREADY="set by hand" "$work/project/.venv/bin/python" "$work/seen.py"
echo "with PYTHON_DOTENV_DISABLED=1:"
ALREADY="set by hand" PYTHON_DOTENV_DISABLED=1 "$work/project/.venv/bin/python" "$work/seen.py"
