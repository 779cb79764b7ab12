"""The Python API: what the verbs of the command line do, as calls with typed results (docs/api.md)."""
