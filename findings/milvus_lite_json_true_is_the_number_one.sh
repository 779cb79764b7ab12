#!/usr/bin/env bash
# milvus-lite 3.2.2 with pymilvus 3.0.2: in a filter on a JSON field, true is the number 1 and false is 0. `j["a"] == 1` gives the
# rows whose value is true, `j["a"] < 1` those with false, `j["a"] + 1 == 2` counts with them, json_contains finds true where
# 1 is asked for and the other way round; `j["a"] != 1` leaves out the rows with true. Texts are kept apart: "1" is not 1.
# Why it matters: a JSON field is where metadata of mixed types goes. `width >= 1` then also gives rows where width is a flag,
# and a filter that shuts out a number shuts out rows that never had one, without a warning. JSON has booleans of their own,
# and a filter written for it expects that.
# The cure: store booleans as texts or under keys of their own; do not count on the types of a JSON field in a filter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "pymilvus==3.0.2" "milvus-lite==3.2.2" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys

from pymilvus import DataType, MilvusClient

VALUES = [1, True, 0, False, 1.0, "1", None, 2, [1], [True]]
EXPECTED = {
    'j["a"] == 1': [1, True, 1.0],
    'j["a"] == true': [1, True, 1.0],
    'j["a"] != 1': [0, False, "1", 2, [1], [True]],
    'j["a"] < 1': [0, False],
    'j["a"] + 1 == 2': [1, True, 1.0],
    'json_contains(j["a"], 1)': [[1], [True]],
    'json_contains(j["a"], true)': [[1], [True]],
    'j["a"] == "1"': ["1"],
}
client = MilvusClient(sys.argv[1])
schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
schema.add_field("j", DataType.JSON)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="COSINE")
client.create_collection("rows", schema=schema, index_params=index)
client.insert("rows", [{"id": row, "v": [1.0, row], "j": {"a": value}} for row, value in enumerate(VALUES)])
client.load_collection("rows")
for words, expected in EXPECTED.items():
    rows = sorted(row["id"] for row in client.query("rows", filter=words, output_fields=["id"]))
    values = [VALUES[row] for row in rows]
    print(f"{words}: {values}")
    # by their texts, since Python itself takes True for 1
    assert repr(values) == repr(expected), words
client.close()
CODE
PYTHON_DOTENV_DISABLED=1 "$work/venv/bin/python" "$work/seen.py" "$work/rows.db"
