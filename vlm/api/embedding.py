"""Shards to embeddings and captions: `vlm.embed`, `caption_shards`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.api.inference import Model, precision_name
from vlm.data.pack import shards_at
from vlm.data.selection import read_selection
from vlm.data.shards import Shards, join_shards
from vlm.errors import UsageError, VlmError, os_errors_explained
from vlm.index.embed import SINGLE_PROCESS, EmbedOptions, EmbedSummary, ProcessRank, embed_into, find_complete
from vlm.index.embeddings_folder import Modality, VectorStorage
from vlm.index.encoder import AnyEncoder
from vlm.launch import run_in_processes
from vlm.manifest import MANIFEST, PROGRESS, is_complete, recorded_configuration
from vlm.models.decoding_options import DecodingOptions
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.ray_engine import Engine, RayCluster, check_engine
from vlm.results import Result
from vlm.service.query import (
    Backend,
    chosen_backend,
    export_or_torch,
    has_gpu,
    load_bulk_encoder,
    load_encoder,
    log_unused_export,
    open_bulk_export,
    open_export,
)
from vlm.storage import is_remote

# imported where they are used: an ONNX export needs no torch
if TYPE_CHECKING:
    from vlm.index.ray_parts import ModelSource
    from vlm.index.recaption import RecaptionOptions, RecaptionSummary
    from vlm.models.model import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class EmbedResult(Result):
    """What was embedded of each modality, None of one that was not asked for; and the process that says so."""

    image: EmbedSummary | None = None
    text: EmbedSummary | None = None
    share: ProcessRank = SINGLE_PROCESS

    @property
    def summaries(self) -> tuple[EmbedSummary, ...]:
        """Those there are."""
        return tuple(summary for summary in (self.image, self.text) if summary)

    @property
    def missing_parts(self) -> int:
        """Parts that are left to other processes."""
        return max(summary.missing_parts for summary in self.summaries)

    def to_json(self) -> dict[str, Any]:
        """Of one modality its fields; of both, each under its name."""
        by_modality = {summary.modality: summary.to_json() for summary in self.summaries}
        return by_modality if len(by_modality) > 1 else self.summaries[0].to_json()


@os_errors_explained()
def embed(
    model: "str | Path | Model | VisionLanguageModel",
    shards: Shards,
    out: str | Path,
    *,
    modality: Literal["image", "text", "both"] = "image",
    batch_size: int | Literal["auto"] = 256,
    workers: int = 1,
    processes: int = 1,
    allow_damage: bool = False,
    selection: str | Path | None = None,
    store: Literal["float16", "float32"] = "float16",
    quantize: Sequence[Literal["int8", "binary"]] = (),
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    backend: Backend | Literal[""] = "",
    compile: bool = False,
    engine: Engine = "local",
    ray_address: str | None = None,
) -> EmbedResult:
    """Embed the images, the captions, or both, of shards, as `vlm embed` does; repeat the call to resume it.

    Args:
        model: MODEL as for `vlm.load`, or a model, whose device, precision and backend then count; several processes
            load it themselves, by its name.
        out: folder for the embeddings; of both modalities, for the folders images and texts.
        processes: how many to start, each with a model of its own; under a launcher each process makes this call.
        selection: file of `vlm curate`: embed only its samples.
        workers: that read and decode, processes for torch and threads for an ONNX export.
        store: precision of the vectors. quantize: quantized copies to store, too.
        backend: `onnx` is the model's ONNX export (`vlm.export`), which starts without torch and runs on the CPU;
            empty is what VLM_BACKEND says, else `auto`: what a folder was begun with, else the export where it is up to
            date and in float32 and there is no GPU. A folder holds rows of one backend only.
        compile: compile the image tower, which takes a minute or more at the start.
        engine: ray starts the processes on a Ray cluster: that of `ray_address`, of the variable RAY_ADDRESS, or one of
            this machine. Its machines must see the model, the shards and `out` under the same paths.

    Raises:
        UsageError: an option is out of range, `out` holds something else, or the cluster has no room.
        VlmError: a shard is damaged, or no sample can be used.
    """
    encoder = _encoder_given(model)
    spec = str(model) if encoder is None else _spec_of(encoder)
    if encoder is not None:
        # the folder notes what its rows were computed in
        precision = "fp32" if isinstance(encoder, OnnxEncoder) else precision_name(encoder)
        backend = "onnx" if isinstance(encoder, OnnxEncoder) else "torch"
    job = _EmbedJob(
        model=spec if encoder is None else encoder,
        shards=join_shards(shards),
        # both modalities in one pass, so that each shard is read once
        folders=_output_folders(Path(out), modality),
        device=device,
        backend=backend,
        options=EmbedOptions(
            model_spec=spec,
            batch_size=batch_size,
            workers=workers,
            allow_damage=allow_damage,
            storage=VectorStorage(store=store, codes=tuple(sorted(set(quantize)))),
            is_compiled=compile,
            precision=precision,
        ),
        selection=None if selection is None else Path(selection),
    )
    check_processes(processes)
    if engine != "local" or ray_address is not None:
        check_engine(engine, ray_address)
    if (complete := job.find_complete()) is not None:
        return complete
    if engine == "ray":
        return job.run_on_cluster(processes, ray_address)
    if processes == 1:
        return job.run()
    _check_device(device)
    # by its name: a loaded model is too large to be sent, and each process needs its own device
    results = run_in_processes(_EmbedJob.run, replace(job, model=job.options.model_spec), processes)
    # the one that wrote the last manifest knows all counts; none did where all was complete already
    finished = next((result for result in results if result.summaries[0].ended_here), results[0])
    return replace(finished, share=SINGLE_PROCESS)


@os_errors_explained()
def caption_shards(
    model: "str | Path | Model | VisionLanguageModel",
    shards: Shards,
    out: str | Path | None = None,
    *,
    decoding: DecodingOptions | None = None,
    batch_size: int = 64,
    workers: int = 1,
    processes: int = 1,
    allow_damage: bool = False,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    engine: Engine = "local",
    ray_address: str | None = None,
) -> "RecaptionSummary":
    """Write new captions of all samples of shards beside them, as `vlm caption MODEL SHARDS` does; repeat to resume.

    Training mixes them in: `captions_from` and `caption_mix` of its loader, or of a source of a mixture.

    Args:
        model: MODEL as for `vlm.load`, or a model, whose device and precision then count; several processes load it
            themselves, by its name.
        out: folder for the captions; by default `captions` in the folder of the shards.
        decoding: how captions are written, and how many of each image.
        processes: how many to start, each with a model of its own; under a launcher each process makes this call.
        engine, ray_address: as of `embed`.

    Raises:
        UsageError: the model has no caption decoder, an option is out of range, or `out` holds something else.
        VlmError: a shard is damaged, or no sample can be used.
    """
    from vlm.index.recaption import RecaptionOptions

    if isinstance(model, Model):
        model = model.encoder
    if not isinstance(model, str | Path):
        # what the captions depend on is the model that is there, not the argument
        precision = precision_name(model)
    url = join_shards(shards)
    job = _CaptionJob(
        model=str(model) if isinstance(model, str | Path) else model,
        shards=url,
        out=sidecar_folder(shards_at(url)) if out is None else Path(out),
        device=device,
        options=RecaptionOptions(
            model_spec=str(model) if isinstance(model, str | Path) else model.name,
            decoding=decoding or DecodingOptions(),
            batch_size=batch_size,
            workers=workers,
            allow_damage=allow_damage,
            precision=precision,
        ),
    )
    check_processes(processes)
    if engine != "local" or ray_address is not None:
        check_engine(engine, ray_address)
    if engine == "ray":
        from vlm.index.ray_parts import caption_on_ray

        source, cluster = _on_cluster(job, processes, ray_address)
        return caption_on_ray(source, shards_at(job.shards), job.out, job.options, cluster)
    if processes == 1:
        return job.run()
    _check_device(device)
    results = run_in_processes(_CaptionJob.run, replace(job, model=job.options.model_spec), processes)
    finished = next((result for result in results if result.ended_here), results[0])
    return replace(finished, new_samples=sum(result.new_samples for result in results))


def sidecar_folder(shards: Sequence[str]) -> Path:
    """Where captions of shards go by default: `captions` in their folder.

    Raises:
        UsageError: they lie in several folders, or not on this machine.
    """
    # one sidecar for all of them, so it has one place only where they share a folder
    folders = {shard.rpartition("/")[0] for shard in shards}
    if len(folders) > 1 or is_remote(shards[0]):
        raise UsageError(f"{shards[0]} and the others lie in no one local folder; name one for the captions (--out).")
    return Path(shards[0]).parent / "captions"


@dataclass(frozen=True, kw_only=True)
class _CaptionJob:
    """The share of a process of the captions of shards."""

    model: "str | VisionLanguageModel"
    shards: str
    out: Path
    device: str
    options: "RecaptionOptions"

    def run(self) -> "RecaptionSummary":
        """Load the model and caption this process's share."""
        from vlm.index.recaption import recaption
        from vlm.models.load import load_model

        rank = ProcessRank.from_environment()
        model = self.model
        if isinstance(model, str):
            device = _device_of_rank(self.device, rank)
            model = load_model(model, device=device, precision=self.options.precision)
        return recaption(model, shards_at(self.shards), self.out, replace(self.options, share=rank))


@dataclass(frozen=True, kw_only=True)
class _EmbedJob:
    """The share of a process of the work on shards."""

    model: str | AnyEncoder
    shards: str
    folders: dict[Modality, Path]
    device: str
    backend: Backend | Literal[""]
    options: EmbedOptions
    selection: Path | None

    def run(self) -> EmbedResult:
        """Load the model and embed this process's share."""
        options = self._own_options()
        model = self.model
        if isinstance(model, str):
            backend = self._chosen_backend()
            model = load_bulk_encoder(
                model,
                # an export runs on the CPU, whatever GPU a rank would have
                device="cpu" if backend == "onnx" else _device_of_rank(self.device, options.share),
                precision=options.precision,
                backend=backend,
                needs_network=options.is_compiled,
            )
        summaries = embed_into(model, shards_at(self.shards), self.folders, options)
        return EmbedResult(image=summaries.get("image"), text=summaries.get("text"), share=options.share)

    def find_complete(self) -> EmbedResult | None:
        """What the folders hold where an export has made all rows; None where anything is left to embed.

        The model's fingerprint is all that is asked for then, which torch knows where the export cannot be opened.
        """
        is_whole = all(map(is_complete, self.folders.values()))
        if not isinstance(self.model, str) or not is_whole or self._chosen_backend() != "onnx":
            return None
        try:
            model = open_export(self.model)
        except VlmError as error:
            try:
                model = load_encoder(self.model, device="cpu")
            except VlmError:
                # there is an export alone, as where MODEL names one
                raise error from None
        options = self._own_options()
        summaries = find_complete(model, shards_at(self.shards), self.folders, options)
        if summaries is None:
            return None
        return EmbedResult(image=summaries.get("image"), text=summaries.get("text"), share=options.share)

    def _own_options(self) -> EmbedOptions:
        """The options with what each process finds for itself."""
        selection = read_selection(self.selection) if self.selection else None
        return replace(self.options, share=ProcessRank.from_environment(), selection=selection)

    def run_on_cluster(self, processes: int, ray_address: str | None) -> EmbedResult:
        """Have processes of a Ray cluster embed all of it."""
        from vlm.index.ray_parts import embed_on_ray

        source, cluster = _on_cluster(self, processes, ray_address)
        if self._uses_export_on_cluster():
            source = replace(source, open_export=open_bulk_export)
        shards = shards_at(self.shards)
        summaries = embed_on_ray(source, shards, self.folders, self.options, cluster, selection=self.selection)
        return EmbedResult(image=summaries.get("image"), text=summaries.get("text"))

    def _uses_export_on_cluster(self) -> bool:
        """Whether the processes of a cluster run the export: as on one machine, so that the parts have its bytes."""
        choice = self._chosen_backend()
        if choice != "auto":
            return choice == "onnx"
        try:
            encoder = open_bulk_export(self.options.model_spec)
        except VlmError as error:
            log_unused_export(error)
            return False
        # the export of a name lies in a cache, which other machines do not see
        return Path(encoder.name).is_dir() and encoder.export.details.precision == "float32"

    def _chosen_backend(self) -> Backend:
        options = self.options
        return export_or_torch(
            _backend_to_go_on(self.backend, self.folders),
            device=self.device,
            precision=options.precision,
            needs_network=options.is_compiled,
        )


def _encoder_given(model: "str | Path | Model | VisionLanguageModel") -> "VisionLanguageModel | OnnxEncoder | None":
    """A model that is loaded already, ready for many rows; None where it is only named."""
    if isinstance(model, str | Path):
        return None
    encoder = model.query_encoder if isinstance(model, Model) else model
    return replace(encoder, is_bulk=True) if isinstance(encoder, OnnxEncoder) else encoder


def _spec_of(encoder: "VisionLanguageModel | OnnxEncoder") -> str:
    return encoder.spec if isinstance(encoder, OnnxEncoder) else encoder.name


def _backend_to_go_on(backend: str, folders: Mapping[Modality, Path]) -> Backend:
    """The backend asked for; for auto the one that a folder was begun with, if one was.

    Raises:
        UsageError: a folder was begun with another one than is asked for, or two folders with different ones.
    """
    choice = chosen_backend(backend)
    recorded: dict[Path, Backend] = {}
    for folder in folders.values():
        begun = recorded_configuration(folder)
        # other kinds of folder have no modality, and are refused for what they are
        if "modality" in begun:
            # before backends were noted there was torch alone; an int8 export is one, too, as shows when it is opened
            recorded[folder] = "torch" if begun.get("backend", "torch") == "torch" else "onnx"
    if choice == "auto" and len(set(recorded.values())) > 1:
        which = " and ".join(f"{folder} with {name}" for folder, name in recorded.items())
        raise UsageError(
            f"The folders were begun with two backends, {which}: embed one --modality at a time into these folders, "
            "or name another folder for both."
        )
    for folder, name in recorded.items():
        if choice not in ("auto", name):
            raise UsageError(
                f"{folder} was begun with the backend {name}, and holds rows of one only: leave out the backend "
                f"{choice} to go on with {name}, or name another folder."
            )
        choice = name
    return choice


def _on_cluster(
    job: "_EmbedJob | _CaptionJob", processes: int, ray_address: str | None
) -> tuple["ModelSource", RayCluster]:
    from vlm.index.ray_parts import ModelSource

    _check_device(job.device)
    source = ModelSource(spec=job.options.model_spec, device=job.device, precision=job.options.precision)
    return source, RayCluster(processes=processes, address=ray_address, uses_gpus=job.device != "cpu")


def check_processes(processes: int) -> None:
    """Refuse a number of processes to start that is below one, or where a launcher has started some.

    Raises:
        UsageError: it is.
    """
    if processes < 1:
        raise UsageError(f"processes = {processes} is out of range: give at least 1.")
    world_size = ProcessRank.from_environment().world_size
    if processes > 1 and world_size > 1:
        raise UsageError(
            f"A launcher has started {world_size} processes already; omit --processes. (A script that starts them "
            "itself makes this call under if __name__ == '__main__'.)"
        )


def _check_device(device: str) -> None:
    # one named GPU would hold a model of each process
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: each of several processes uses a GPU of its own; omit --device.")


def _output_folders(out: Path, modality: Literal["image", "text", "both"]) -> dict[Modality, Path]:
    if modality == "image" or modality == "text":
        return {modality: out}
    if modality != "both":
        raise UsageError(f"modality = {modality!r}; give image, text or both.")
    # the marks of an output folder of one modality, which subfolders would be lost in
    if any((out / name).exists() for name in (MANIFEST, PROGRESS)):
        raise UsageError(f"{out} holds other output; --modality both needs a folder of its own.")
    return {"image": out / "images", "text": out / "texts"}


def _device_of_rank(device: str, rank: ProcessRank) -> str:
    """With several processes on a machine with GPUs, each uses the GPU of its local rank."""
    if device != "auto" or rank.world_size == 1 or not has_gpu():
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    # more processes than GPUs share them in turn
    return f"cuda:{rank.local_rank % torch.cuda.device_count()}"
