#!/usr/bin/env bash
# milvus-lite 3.2.2 with pymilvus 3.0.2: MilvusClient.search without output_fields, or with an empty list, gives every field of each
# hit, vectors included; the client's documentation says that only primary keys and distances come back. Of rows with 512 dimensions
# a hit is about 10 kB of text instead of 60 bytes. output_fields=["id"] gives just that. Beside it: a collection that was searched is
# "released" once the file has been closed and opened again, and a search is refused until load_collection is called.
# Why it matters: a search that "returns ids only" is timed, logged and cached with all the vectors in it, and a test of the payload on
# milvus-lite says nothing about a server. Name a field that you want, always; and load a collection when you open a file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "pymilvus==3.0.2" "milvus-lite==3.2.2" "faiss-cpu==1.15.1" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import logging
import sys

import numpy as np
from milvus_lite.server_manager import server_manager_instance
from pymilvus import DataType, MilvusClient, MilvusException

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
path = sys.argv[1]
client = MilvusClient(path)
schema = MilvusClient.create_schema(auto_id=False)
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("vector", DataType.FLOAT_VECTOR, dim=512)
indexes = client.prepare_index_params()
indexes.add_index("vector", index_type="FLAT", metric_type="COSINE")
client.create_collection("rows", schema=schema, index_params=indexes)
rows = np.random.default_rng(0).standard_normal((10, 512)).astype(np.float32)
client.insert("rows", [{"id": number, "vector": row} for number, row in enumerate(rows)])
sizes = {}
for fields in (None, [], ["id"]):
    hit = client.search("rows", data=[rows[0]], limit=1, output_fields=fields)[0][0]
    sizes[str(fields)] = len(str(hit))
    print(f"output_fields={fields}: a hit of {len(str(hit)):,} characters, fields {sorted(hit['entity'])}")
assert sizes["None"] > 5000 and sizes["[]"] > 5000 and sizes["['id']"] < 200
client.close()
server_manager_instance.release_server(path)

client = MilvusClient(path)
try:
    client.search("rows", data=[rows[0]], limit=1, output_fields=["id"])
    raise AssertionError("it was searched")
except MilvusException as error:
    print(f"opened again: {error.message}")
    assert "released" in error.message
client.load_collection("rows")
assert client.search("rows", data=[rows[0]], limit=1, output_fields=["id"])[0][0]["id"] == 0
CODE
"$work/venv/bin/python" "$work/seen.py" "$work/rows.db"
