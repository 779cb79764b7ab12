"""`vlm.list_models`: the models that load here without a network, and how to fetch another ahead."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlm.errors import UsageError, os_errors_explained
from vlm.model_spec import CHECKPOINTS, CONFIG, RUN_MODEL
from vlm.models.load import load_model
from vlm.results import Result

ModelSource: TypeAlias = Literal["run", "folder", "open_clip", "hub", "package"]

_RUN_CONFIG = "config.toml"
# where open_clip keeps weights that it fetches by URL, as OpenAI's package did
_OPEN_CLIP_CACHE = Path("~/.cache/clip")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIG_IN_RECORD = re.compile(r"^[^,\n]*/(?:open_clip_)?config\.json(?=,)", re.MULTILINE)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model as MODEL names it, where it is from, and its size.

    bytes: of its weights; 0 if they are not here. missing: what has to be fetched before it loads; empty: nothing.
    """

    model: str
    source: ModelSource
    bytes: int
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelList(Result):
    """Models, own ones first, then of open_clip, the Hub and packages. cache: folder of what the Hub gave."""

    models: tuple[LocalModel, ...]
    cache: str


@os_errors_explained()
def list_models(folder: str | Path = "runs", *, known: bool = False, cache: str | Path | None = None) -> ModelList:
    """The models that load without a network: runs and model folders, what the local caches hold, and packages bring.

    Args:
        folder: is searched for runs and model folders, at any depth.
        known: list the weights of open_clip that are not here, too.
        cache: of the Hugging Face Hub; its own if not given.

    Raises:
        UsageError: there is no such folder.
    """
    from huggingface_hub import constants

    root = Path(folder)
    if not root.is_dir() and root != Path("runs"):
        raise UsageError(f"There is no folder {str(folder)!r}; give the one that your runs and models are in.")
    hub = Path(cache or constants.HF_HUB_CACHE)
    repositories = dict(_cached_repositories(hub))
    models = [*_own_models(root), *_open_clip_models(repositories, known=known), *_hub_models(repositories)]
    models += _package_models()
    return ModelList(models=tuple(models), cache=str(hub))


@os_errors_explained()
def fetch_model(model: str) -> LocalModel:
    """Fetch a model with its tokenizer into the local caches, and check that it loads.

    Raises:
        UsageError: there is no such model. VlmError: it is not within reach.
    """
    loaded = load_model(model, device="cpu")
    tensors = loaded.network.state_dict().values()
    source: ModelSource = "open_clip" if ":" in model and not Path(model).exists() else "hub"
    return LocalModel(model=model, source=source, bytes=sum(tensor.nbytes for tensor in tensors))


def _own_models(root: Path) -> Iterator[LocalModel]:
    runs: set[Path] = set()
    for config in sorted(root.rglob(CONFIG)):
        folder = config.parent
        if folder.name == RUN_MODEL or folder.parent.name == CHECKPOINTS:
            run = folder.parent if folder.name == RUN_MODEL else folder.parent.parent
            # a run is listed once, by its own name, whichever of its weights are there
            if (run / _RUN_CONFIG).is_file():
                if run not in runs:
                    runs.add(run)
                    newest = run / RUN_MODEL if (run / RUN_MODEL / CONFIG).is_file() else folder
                    yield LocalModel(model=str(run), source="run", bytes=_weight_bytes(newest))
                continue
        yield LocalModel(model=str(folder), source="folder", bytes=_weight_bytes(folder))
    for config in sorted(root.rglob("config.json")):
        if not (config.parent / CONFIG).is_file() and _is_transformers_model(config.parent):
            yield LocalModel(model=str(config.parent), source="folder", bytes=_weight_bytes(config.parent))


def _is_transformers_model(folder: Path) -> bool:
    from vlm.models.huggingface_clip import is_dual_encoder
    from vlm.models.sentence_encoder import is_sentence_transformer

    try:
        return bool(_weight_bytes(folder)) and (is_sentence_transformer(folder) or is_dual_encoder(folder))
    # a config.json of something else
    except (ValueError, AttributeError):
        return False


def _cached_repositories(hub: Path) -> Iterator[tuple[str, Path]]:
    """The models in the cache of the Hugging Face Hub, each with the folder of its main revision."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir(hub).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        main = [revision for revision in repository.revisions if "main" in revision.refs]
        if repository.repo_type == "model" and main:
            yield repository.repo_id, main[0].snapshot_path


def _open_clip_models(repositories: dict[str, Path], *, known: bool) -> Iterator[LocalModel]:
    """The names of open_clip whose weights are in a cache."""
    import open_clip

    for name, tag in open_clip.list_pretrained():
        weights = _open_clip_weights(open_clip.get_pretrained_cfg(name, tag) or {}, repositories)
        if weights is None and not known:
            continue
        missing = "weights" if weights is None else _missing_tokenizer(open_clip.get_model_config(name), repositories)
        size = weights.stat().st_size if weights else 0
        yield LocalModel(model=f"{name}:{tag}", source="open_clip", bytes=size, missing=missing)


def _open_clip_weights(pretrained: dict[str, Any], repositories: dict[str, Path]) -> Path | None:
    """The file of weights that open_clip would load; None if it would have to fetch it."""
    # `organisation/name/file`, or `organisation/name/` for open_clip's usual file
    repository, file = os.path.split(pretrained.get("hf_hub", ""))
    if repository:
        folder = repositories.get(repository)
        stem = Path(file).stem
        names = (f"{stem}.safetensors", file) if file else _OPEN_CLIP_WEIGHTS
        paths = [] if folder is None else [folder / name for name in names]
    else:
        paths = [_OPEN_CLIP_CACHE.expanduser() / pretrained.get("url", "").rpartition("/")[2]]
    return next((path for path in paths if path.is_file()), None)


def _missing_tokenizer(config: dict[str, Any] | None, repositories: dict[str, Path]) -> str:
    name = (config or {}).get("text_cfg", {}).get("hf_tokenizer_name", "")
    folder = repositories.get(name)
    if not name or (folder and any((folder / file).is_file() for file in _TOKENIZER_FILES)):
        return ""
    return f"tokenizer {name}"


def _hub_models(repositories: dict[str, Path]) -> Iterator[LocalModel]:
    """The repositories that are models of open_clip, or of a family of transformers that we load."""
    for name, folder in repositories.items():
        is_open_clip = any((folder / CONFIG).is_file() and (folder / file).is_file() for file in _OPEN_CLIP_WEIGHTS)
        if is_open_clip or _is_transformers_model(folder):
            yield LocalModel(model=name, source="hub", bytes=_weight_bytes(folder))


def _package_models() -> Iterator[LocalModel]:
    """The model folders that installed Python packages bring."""
    for distribution in metadata.distributions():
        # searched as text: of thousands of lines hardly one is parsed
        configs = _CONFIG_IN_RECORD.findall(distribution.read_text("RECORD") or "")
        for place in dict.fromkeys(config.rpartition("/")[0] for config in configs):
            folder = Path(str(distribution.locate_file(place)))
            if _weight_bytes(folder) and ((folder / CONFIG).is_file() or _is_transformers_model(folder)):
                yield LocalModel(model=str(folder), source="package", bytes=_weight_bytes(folder))


def _weight_bytes(folder: Path) -> int:
    """The size of the first kind of weights that is there; the same weights are often there in several."""
    for pattern in _WEIGHTS:
        if size := sum(path.stat().st_size for path in folder.glob(pattern)):
            return size
    return 0
