"""The engine Milvus: rows, metadata and search of an index in a collection of a Milvus server or of milvus-lite."""
