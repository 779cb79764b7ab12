"""To and from other tools: clip-retrieval and autofaiss folders, npy, Parquet and FAISS files."""

from vlm.index.exchange.bring import UNKNOWN, ImportSummary, import_embeddings
from vlm.index.exchange.columns import Wishes
from vlm.index.exchange.export import ExportSummary, Target, export_index

__all__ = ["UNKNOWN", "ExportSummary", "ImportSummary", "Target", "Wishes", "export_index", "import_embeddings"]
