"""Image-text pairs to shards, shards to an encoder, its embeddings to an index that answers queries.

The names of `__all__` are the Python API (docs/api.md). They are imported when they are first used, so that
`import vlm` takes no time and loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING

from vlm.errors import UsageError, VlmError

if TYPE_CHECKING:
    from vlm.api.curation import build_concepts as build_concepts
    from vlm.api.curation import curate as curate
    from vlm.api.curation import inspect as inspect
    from vlm.api.data import doctor as doctor
    from vlm.api.data import relate as relate
    from vlm.api.data import stream as stream
    from vlm.api.data import train_tokenizer as train_tokenizer
    from vlm.api.embedding import caption_shards as caption_shards
    from vlm.api.embedding import embed as embed
    from vlm.api.evaluation import caption_metrics as caption_metrics
    from vlm.api.evaluation import evaluate as evaluate
    from vlm.api.explanation import explain as explain
    from vlm.api.find import find as find
    from vlm.api.find import watch as watch
    from vlm.api.index import Hit as Hit
    from vlm.api.index import SearchIndex as SearchIndex
    from vlm.api.index import open_index as open_index
    from vlm.api.index_building import build_index as build_index
    from vlm.api.index_building import check_index as check_index
    from vlm.api.index_building import export_index as export_index
    from vlm.api.index_building import fit_head as fit_head
    from vlm.api.index_building import fit_reranker as fit_reranker
    from vlm.api.index_building import import_embeddings as import_embeddings
    from vlm.api.index_building import score as score
    from vlm.api.index_building import upgrade_index as upgrade_index
    from vlm.api.inference import DecodingOptions as DecodingOptions
    from vlm.api.inference import Model as Model
    from vlm.api.inference import load as load
    from vlm.api.local_models import fetch_model as fetch_model
    from vlm.api.local_models import list_models as list_models
    from vlm.api.model_export import export as export
    from vlm.api.packing import pack as pack
    from vlm.api.runs import compare_runs as compare_runs
    from vlm.api.runs import list_runs as list_runs
    from vlm.api.training import fit_mixture as fit_mixture
    from vlm.api.training import reinforce as reinforce
    from vlm.api.training import scale as scale
    from vlm.api.training import soup as soup
    from vlm.api.training import train as train
    from vlm.cli.quickstart import quickstart as quickstart
    from vlm.client import AsyncClient as AsyncClient
    from vlm.client import Client as Client
    from vlm.server import serve as serve
    from vlm.service.results_page import write_results_page as write_results_page

DISTRIBUTION = "vlm-pipeline"
__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "DecodingOptions",
    "Hit",
    "Model",
    "SearchIndex",
    "UsageError",
    "VlmError",
    "build_concepts",
    "build_index",
    "caption_metrics",
    "caption_shards",
    "check_index",
    "compare_runs",
    "curate",
    "doctor",
    "embed",
    "evaluate",
    "explain",
    "export",
    "export_index",
    "fetch_model",
    "find",
    "fit_head",
    "fit_mixture",
    "fit_reranker",
    "import_embeddings",
    "inspect",
    "list_models",
    "list_runs",
    "load",
    "open_index",
    "pack",
    "quickstart",
    "reinforce",
    "relate",
    "scale",
    "score",
    "serve",
    "soup",
    "stream",
    "train",
    "train_tokenizer",
    "upgrade_index",
    "watch",
    "write_results_page",
]

# Each name with its module. A new one is also imported above under TYPE_CHECKING (`from M import NAME as NAME`) and
# listed in `__all__`. Not `train`: that is the package of this name, which can be called.
_MODULES: dict[str, str] = {
    "AsyncClient": "vlm.client",
    "Client": "vlm.client",
    "DecodingOptions": "vlm.api.inference",
    "Hit": "vlm.api.index",
    "Model": "vlm.api.inference",
    "SearchIndex": "vlm.api.index",
    "build_concepts": "vlm.api.curation",
    "build_index": "vlm.api.index_building",
    "caption_metrics": "vlm.api.evaluation",
    "caption_shards": "vlm.api.embedding",
    "check_index": "vlm.api.index_building",
    "compare_runs": "vlm.api.runs",
    "curate": "vlm.api.curation",
    "doctor": "vlm.api.data",
    "embed": "vlm.api.embedding",
    "evaluate": "vlm.api.evaluation",
    "explain": "vlm.api.explanation",
    "export": "vlm.api.model_export",
    "export_index": "vlm.api.index_building",
    "fetch_model": "vlm.api.local_models",
    "find": "vlm.api.find",
    "fit_head": "vlm.api.index_building",
    "fit_mixture": "vlm.api.training",
    "fit_reranker": "vlm.api.index_building",
    "import_embeddings": "vlm.api.index_building",
    "inspect": "vlm.api.curation",
    "list_models": "vlm.api.local_models",
    "list_runs": "vlm.api.runs",
    "load": "vlm.api.inference",
    "open_index": "vlm.api.index",
    "pack": "vlm.api.packing",
    "quickstart": "vlm.cli.quickstart",
    "reinforce": "vlm.api.training",
    "relate": "vlm.api.data",
    "scale": "vlm.api.training",
    "score": "vlm.api.index_building",
    "serve": "vlm.server",
    "soup": "vlm.api.training",
    "stream": "vlm.api.data",
    "train_tokenizer": "vlm.api.data",
    "upgrade_index": "vlm.api.index_building",
    "watch": "vlm.api.find",
    "write_results_page": "vlm.service.results_page",
}

# hidden from type checkers, which would otherwise take any misspelt name for a name of ours
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "train":
            return import_module("vlm.train")
        if name not in _MODULES:
            raise AttributeError(f"module 'vlm' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
