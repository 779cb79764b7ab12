"""Embedding and captioning on a Ray cluster: its processes write parts, this one counts them and completes the folder.

A process of the cluster does a shard by the same call as `vlm embed` on one machine does (`ShardEmbedder`,
`ShardRecaptioner`), so the parts have the same bytes. A part is whole or absent: when a process dies, its shard is
done again by another, and a part that it had finished stays.
"""

import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlm import __version__
from vlm.console import progress
from vlm.data.selection import read_selection
from vlm.errors import UsageError, VlmError
from vlm.index.embed import EmbedOptions, EmbedPlan, EmbedSummary, ShardEmbedder
from vlm.index.embeddings_folder import Modality
from vlm.index.recaption import RecaptionOptions, RecaptionPlan, RecaptionSummary, ShardRecaptioner
from vlm.model_spec import absolute_spec
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.ray_engine import RayCluster, check_shared, run_on_ray


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model that each process of the cluster loads. spec: MODEL, which every machine must have or see.

    device: auto uses the GPU that Ray gives a process. open_export: of a MODEL, where its ONNX export embeds.
    """

    spec: str
    device: str = "auto"
    precision: str = "fp32"
    open_export: Callable[[str], OnnxEncoder] | None = None

    def load(self) -> VisionLanguageModel:
        """Load it on this machine, by torch."""
        return load_model(self.spec, device=self.device, precision=self.precision)

    def open(self) -> VisionLanguageModel | OnnxEncoder:
        """What embeds on this machine."""
        return self.open_export(self.spec) if self.open_export else self.load()


def embed_on_ray(
    source: ModelSource,
    shards: Sequence[str],
    folders: Mapping[Modality, Path],
    options: EmbedOptions,
    cluster: RayCluster,
    *,
    selection: Path | None = None,
) -> dict[Modality, EmbedSummary]:
    """As `embed_into`, on a Ray cluster; safe to interrupt: called again, it does what is missing.

    The model is loaded on this machine too, on the CPU: for its name in the manifest, and so that a mistake shows
    before the cluster is asked.

    Args:
        selection: a selection file, which every machine must see; in place of `options.selection`.

    Raises:
        UsageError: as `embed_into`, or the cluster has no room for so many processes.
        VlmError: as `embed_into`, or a machine of the cluster does not see the folders.
    """
    started = time.perf_counter()
    # here too, though only for its counts: a selection that does not fit must fail before the cluster starts
    options = replace(options, selection=read_selection(selection) if selection else None)
    model = replace(source, device="cpu").open()
    embedder = ShardEmbedder(model, EmbedPlan.make(model, shards, folders, options))
    if missing := list(embedder.missing_parts(range(len(shards)))):
        absolute = {modality: path.absolute() for modality, path in folders.items()}
        plan = replace(embedder.plan, folders=absolute, assigner=embedder.assigner)
        # each process reads the selection from its file, which may be larger than what Ray should carry
        plan = replace(plan, options=replace(options, selection=None))
        open_writer = partial(_open_embedder, _absolute(source), plan, selection and selection.absolute())
        _write_on_ray(embedder, missing, open_writer, list(absolute.values()), cluster, what="embed")
    return embedder.finish(seconds=time.perf_counter() - started)


def caption_on_ray(
    source: ModelSource, shards: Sequence[str], out: Path, options: RecaptionOptions, cluster: RayCluster
) -> RecaptionSummary:
    """As `recaption`, on a Ray cluster; see `embed_on_ray`."""
    started = time.perf_counter()
    model = replace(source, device="cpu").load()
    plan = RecaptionPlan.make(model, shards, out, options)
    recaptioner = ShardRecaptioner(model, plan)
    if missing := recaptioner.missing_parts(range(len(shards))):
        open_writer = partial(_open_recaptioner, _absolute(source), replace(plan, out=out.absolute()))
        _write_on_ray(recaptioner, missing, open_writer, [out.absolute()], cluster, what="caption")
    return recaptioner.finish(seconds=time.perf_counter() - started)


_Writer = ShardEmbedder | ShardRecaptioner


def _write_on_ray(
    writer: _Writer,
    missing: Sequence[int],
    open_writer: Callable[[], _Writer],
    folders: Sequence[Path],
    cluster: RayCluster,
    *,
    what: str,
) -> None:
    """Have processes of the cluster, each with a writer of its own, write parts; with the progress bar of a local run.

    missing: numbers of the parts.
    """
    shards = writer.plan.shards
    total = sum(writer.num_samples(range(len(shards))))
    samples = writer.num_samples(missing)
    with _begun(folders) as begun, progress(total=total, done=total - sum(samples), what=what, unit=" samples") as bar:
        open_worker = partial(_open_worker, open_writer, begun)
        # tasks end in any order; each part is a file of its own, so that does not matter
        for task, _ in run_on_ray(open_worker, missing, cluster, name_of=shards.__getitem__):
            bar.update(samples[task])
    # other processes wrote them, so this one's own count knows nothing of them
    writer.count_parts(missing)


@dataclass(frozen=True)
class _Begun:
    """What each machine of the cluster is checked for. marks: files that this one wrote. version: of vlm."""

    marks: tuple[Path, ...]
    version: str = __version__


@contextmanager
def _begun(folders: Sequence[Path]) -> Iterator[_Begun]:
    # named as what a killed process leaves half-written: it is removed with that if this one is killed
    name = f".ray.{secrets.token_hex(6)}.part"
    marks = tuple(folder / name for folder in folders)
    try:
        for mark in marks:
            mark.touch()
        yield _Begun(marks)
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def _open_worker(open_writer: Callable[[], _Writer], begun: _Begun) -> Callable[[int], None]:
    """In a process of the cluster: check its machine, load the model, and write parts by their numbers."""
    node = platform.node()
    # another version may write another format, or other vectors
    if begun.version != __version__:
        raise UsageError(
            f"The machine {node} has vlm {__version__}, the command vlm {begun.version}; install the same everywhere."
        )
    # a folder that is only local to that machine would swallow its parts
    for mark in begun.marks:
        check_shared(mark, node)
    writer = open_writer()

    def write(number: int) -> None:
        writer.write_missing_parts([number], is_shown=False)

    return write


def _absolute(source: ModelSource) -> ModelSource:
    # processes of the cluster have another working folder
    return replace(source, spec=absolute_spec(source.spec))


def _open_embedder(source: ModelSource, plan: EmbedPlan, selection: Path | None) -> ShardEmbedder:
    # the name may mean other weights on that machine: its fingerprint decides
    model = source.open()
    _check_fingerprint(model, plan.inputs["model"])
    options = replace(plan.options, selection=read_selection(selection) if selection else None)
    return ShardEmbedder(model, replace(plan, options=options))


def _open_recaptioner(source: ModelSource, plan: RecaptionPlan) -> ShardRecaptioner:
    model = source.load()
    _check_fingerprint(model, plan.identity["model"])
    return ShardRecaptioner(model, plan)


def _check_fingerprint(model: VisionLanguageModel | OnnxEncoder, wanted: str) -> None:
    if model.fingerprint != wanted:
        raise VlmError(
            f"The machine {platform.node()} has another model under the name {model.name}: fingerprint "
            f"{model.fingerprint}, {wanted} was expected. Name a model on shared storage."
        )
