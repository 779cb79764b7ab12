"""The shards, the model and the index of the index tests."""

import runpy
from pathlib import Path

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "index" / "conftest.py"))

model = _SHARED["model"]
make_model = _SHARED["make_model"]
paint = _SHARED["paint"]
write_shard = _SHARED["write_shard"]
shards = _SHARED["shards"]
embeddings = _SHARED["embeddings"]
index = _SHARED["index"]
