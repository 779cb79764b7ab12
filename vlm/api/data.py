"""Shards to what training needs of them: `vlm.stream`, `vlm.train_tokenizer`, `vlm.relate`, `vlm.doctor`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlm.api.stream import CallableTokenizer, EvaluationReading, SampleStream, TextsToTokens, TrainingReading
from vlm.config import number_list, text_list
from vlm.data.caption_sampler import CaptionSampler, warn_of_unseen_fields
from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.corpus import MIXTURE_SUFFIX, Source, open_corpus, read_sources
from vlm.data.pack import shards_at
from vlm.data.sample_relations import SUFFIX as RELATIONS_SUFFIX
from vlm.data.sample_relations import RelationsSummary, relate_samples, write_relations
from vlm.data.sampler import DEFAULT_WINDOW, BatchSampler, SequentialBatches
from vlm.data.selection import read_selection
from vlm.data.shards import EvalCollator, Shards, count_samples, expand_shards, join_shards, shards_fingerprint
from vlm.data.tokenizer_training import TokenizerSummary
from vlm.data.tokenizer_training import train_tokenizer as train_on_shards
from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, EvalTransform, RandomResizedCrop
from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_parent_exists, compute_fingerprint
from vlm.index.curation_scores import ScoreWriter
from vlm.index.embed import ProcessRank
from vlm.index.embeddings_folder import Embeddings
from vlm.models.load import load_model
from vlm.results import Result, json_values

# imported where they are used: a stream needs none of them
if TYPE_CHECKING:
    from vlm.api.inference import Model
    from vlm.data.bottleneck_report import BottleneckReport
    from vlm.data.profiling import PipelineProfile, ProfileSetup, Stage
    from vlm.models.model import VisionLanguageModel


@os_errors_explained()
def train_tokenizer(
    shards: Shards, out: str | Path, *, vocabulary: int = 8192, languages: Sequence[str] = ()
) -> TokenizerSummary:
    """Train a SentencePiece tokenizer on the captions of shards, as `vlm tokenizer train` does.

    Args:
        out: file to write, ending in .model, for `vlm.train(…, tokenizer=out)`.
        vocabulary: most pieces it may have. languages: of the captions; empty takes all.

    Raises:
        UsageError: `out` exists, or the shards hold no captions.
    """
    urls = shards_at(join_shards(shards))
    return train_on_shards(urls, Path(out), vocabulary=vocabulary, languages=tuple(text_list(languages, "languages")))


@os_errors_explained()
def relate(
    shards: Shards,
    out: str | Path,
    *,
    languages: Sequence[str] = (),
    images: bool = True,
    embeddings: str | Path | None = None,
    neighbours: int = 32,
    workers: int = 1,
) -> RelationsSummary:
    """Write what samples are to each other, for `vlm.train(..., batches="distinct")` or "hard", as `vlm relate` does.

    Args:
        out: file to write, ending in .relations.
        languages: of the captions that are compared; empty takes the first of each sample, as training does.
        images: look for near-duplicate images too, which decodes every image.
        embeddings: image embeddings of the same shards, by which the nearest `neighbours` of each sample are stored.

    Raises:
        UsageError: `out` exists or has another suffix, or the embeddings are of other shards.
        VlmError: a shard is damaged.
    """
    path = Path(out)
    if path.suffix != RELATIONS_SUFFIX:
        raise UsageError(f"{path} must end in {RELATIONS_SUFFIX}.")
    if path.exists():
        raise UsageError(f"{path} exists already; name another file or remove it.")
    check_parent_exists(path)
    # opened before the scan, which takes longer
    nearest = ScoreWriter(Embeddings.open(Path(embeddings))).neighbours(neighbours) if embeddings else None
    relations = relate_samples(
        shards_at(join_shards(shards)),
        languages=tuple(text_list(languages, "languages")),
        images=images,
        workers=workers,
    )
    if nearest is not None:
        relations = relations.with_neighbours(*nearest)
    write_relations(path, relations)
    return RelationsSummary(
        relations=str(path),
        fingerprint=relations.fingerprint,
        samples=relations.samples,
        grouped_samples=relations.grouped_samples,
        neighbours=relations.num_neighbours,
    )


@dataclass(frozen=True, kw_only=True)
class PipelineDiagnosis(Result):
    """What each stage between the disk and the model takes alone, and which of them holds a run back."""

    profile: "PipelineProfile"
    report: "BottleneckReport"

    def to_json(self) -> dict[str, Any]:
        """What `vlm doctor --json` prints."""
        # the key stays "verdict", which scripts read
        return json_values(asdict(self.profile) | {"verdict": asdict(self.report)})


@os_errors_explained()
def doctor(
    shards: Shards,
    model: "str | Path | Model | VisionLanguageModel" = "",
    *,
    workers: Sequence[int] = (0, 1, 2, 4),
    samples: int = 512,
    batch_size: int = 64,
    size: int | None = None,
    tokenizer: str | Path = "clip",
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> PipelineDiagnosis:
    """Benchmark each stage of the input pipeline alone and name the bottleneck, as `vlm doctor` does.

    Times are medians of a few repeats: run nothing else on the machine.

    Args:
        model: MODEL as for `vlm.load`, or a model, whose device and precision then count; it sets image size and
            tokenizer. Without one the stages up to the device are measured.
        workers: numbers of workers to try, four to a process; a script that starts some runs under
            `if __name__ == "__main__"`.
        samples: how many to measure with.
        size: of images in pixels; None uses that of the model, or 224. tokenizer: if there is no model.

    Raises:
        UsageError: nothing is there, a number is out of range, the device is neither cpu nor cuda, or `size` is not
            that of the model.
        VlmError: a shard is damaged, or no sample can be used.
    """
    from vlm.api.inference import encoder_of, precision_name
    from vlm.data.bottleneck_report import find_bottleneck
    from vlm.data.profiling import profile_pipeline
    from vlm.models.load import choose_device
    from vlm.models.throughput import accelerator_name, measure_copy, measure_model

    numbers = sorted(set(number_list(workers, "workers")))
    if not numbers or numbers[0] < 0 or any(number != int(number) for number in numbers):
        raise UsageError(f"workers = {numbers}: give whole numbers from 0 on, as 0, 1, 2.")
    numbers = list(map(int, numbers))
    # a model that is loaded already lies where it lies
    place = choose_device(device) if isinstance(model, str | Path) else encoder_of(model).device
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"device = {place}: only cpu and cuda are measured.")
    network = None if model == "" else encoder_of(model, device=device, precision=precision)

    def measure_compute(batch: TrainingBatch) -> "list[Stage]":
        stages = measure_copy(batch.images, place)
        return stages if network is None else [*stages, *measure_model(network, batch.images, batch.tokens)]

    profile = profile_pipeline(
        _profile_setup(shards, network, size, tokenizer, samples=samples, batch_size=batch_size),
        numbers,
        device=accelerator_name(place),
        # on a CPU the model and the workers compete, so that their rates do not add up
        shares_cores=place.type == "cpu",
        precision=precision if network is None else precision_name(network),
        measure_compute=measure_compute,
    )
    return PipelineDiagnosis(profile=profile, report=find_bottleneck(profile))


def _profile_setup(
    shards: Shards,
    model: "VisionLanguageModel | None",
    size: int | None,
    tokenizer: str | Path,
    *,
    samples: int,
    batch_size: int,
) -> "ProfileSetup":
    from vlm.data.profiling import ProfileSetup

    default_size = model.view.size if model else 224
    # a model of fixed positions sees one size only
    if model and size not in (None, default_size):
        raise UsageError(f"{model.name} has an image size of {default_size} px; omit size = {size}.")
    return ProfileSetup(
        shards=tuple(expand_shards(join_shards(shards))),
        view=RandomResizedCrop(size=default_size if size is None else size, grid=model.view.grid if model else None),
        tokenizer=model.tokenizer if model else open_tokenizer(str(tokenizer)),
        samples=samples,
        batch_size=batch_size,
    )


class HasView(Protocol):
    """A model, or what else says how it sees images and reads texts."""

    @property
    def view(self) -> EvalTransform:
        """Size, resizing and normalisation of images."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to ids."""
        ...


@os_errors_explained()
def stream(
    shards: Shards,
    *,
    batch_size: int = 256,
    model: str | Path | HasView | None = None,
    image_size: int = 224,
    tokenizer: str | Path | Tokenizer | TextsToTokens = "clip",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    normalised: bool = True,
    transform: Literal["training", "evaluation"] = "training",
    crop_scale: tuple[float, float] = (0.9, 1.0),
    flip: float = 0.0,
    languages: Sequence[str] = (),
    tag_fields: Sequence[str] = (),
    seed: int = 0,
    epochs: float | None = 1,
    workers: int = 1,
    shuffle_window: int = DEFAULT_WINDOW,
    selection: str | Path | None = None,
    captions_from: str | Path | None = None,
    caption_mix: float = 0.5,
    allow_damage: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
) -> SampleStream:
    """Batches of image-text pairs for a training loop of your own, with `state_dict` and `load_state_dict`.

    Every sample is seen once an epoch, whatever the number of workers and processes; what is drawn for a sample
    depends on the seed, the epoch and its key alone, so a stream that resumes gives the very batches that it would
    have given.

    Args:
        shards: a folder, pattern or URL of shards, several of them, a mixture file (.toml), or whatever `vlm.pack`
            reads, which is packed once into the cache.
        batch_size: samples of a batch over all processes; each gets `batch_size / world_size`.
        model: a model, or MODEL as for `vlm.load`, whose image size, normalisation and tokenizer are used; without
            one, `image_size`, `tokenizer` (also a callable of another library), `mean` and `std` say them.
        normalised: give floats for the model; otherwise bytes, a quarter of the memory, to normalise on the device.
        transform: training draws crops, flips and captions in shuffled order, and replaces what cannot be used;
            evaluation gives each sample once, in file order, with the model's own view and the first caption.
        crop_scale: range of the random crop's share of the image. flip: probability of mirroring it.
        languages: of captions; empty takes the first one of each sample. `tags` stands for its tags.
        tag_fields: for training: metadata fields whose values are tags as well; needs `tags` among the languages.
        epochs: of one loop over the stream, for training; None is endless.
        workers: processes that read and decode; 0 does it in this one.
        selection: file of `vlm curate` that says which samples are used, and how often.
        captions_from: folder of `vlm caption`, for training: a caption from there is shown with the probability
            `caption_mix` instead of the sample's own.
        rank, world_size: the share of this process; as the launcher (torchrun, accelerate, srun) says if not given.

    Raises:
        UsageError: an option is out of range, or nothing is there.
        VlmError: a shard is damaged.
    """
    if epochs is not None and not 0 < epochs < float("inf"):
        raise UsageError(f"epochs = {epochs} is not a length; give a positive number, or None for an endless stream.")
    share = _share(rank, world_size)
    if batch_size < 1 or batch_size % share.world_size:
        raise UsageError(f"batch_size = {batch_size} must be positive and a multiple of {share.world_size} processes.")
    view, texts_to_tokens = _view_and_tokenizer(model, image_size, tokenizer, mean, std)
    if transform == "training":
        crop = RandomResizedCrop.of_view(view, scale=crop_scale, flip=flip)
        sources = _read_sources(shards, selection, captions_from, caption_mix)
        corpus = open_corpus(sources, seed=seed, window=shuffle_window, allow_damage=allow_damage)
        draw = _caption_sampler(languages, tag_fields, corpus.shards[0])
        plan = BatchSampler(
            order=corpus.order, batch_size=batch_size, process=share.rank, num_processes=share.world_size
        )
        collate = TrainingCollator(
            plan=plan, view=crop, tokenizer=texts_to_tokens, draw=draw, seed=seed, caption_mix=corpus.caption_mix
        )
        reading = TrainingReading(plan=plan, collate=collate, epochs=epochs, sequence=corpus.fingerprint)
        return SampleStream(corpus.shards, reading, view, workers=workers, is_normalised=normalised)
    _refuse_in_evaluation(captions_from=captions_from, tag_fields=tag_fields or None)
    if transform != "evaluation":
        raise UsageError(f"transform = {transform!r}; give training or evaluation.")
    urls = shards_at(join_shards(shards))
    reading = EvaluationReading(
        plan=_sequential(urls, selection, batch_size // share.world_size, allow_damage=allow_damage),
        collate=EvalCollator(view=view),
        tokenizer=texts_to_tokens,
        languages=tuple(text_list(languages, "languages")),
        share=share,
        sequence=_sequence(urls, selection),
    )
    return SampleStream(tuple(urls), reading, view, workers=workers, is_normalised=normalised)


def _refuse_in_evaluation(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is for training; evaluation shows the shards' own captions.")


def _caption_sampler(languages: Sequence[str], tag_fields: Sequence[str], shard: str) -> CaptionSampler:
    draw = CaptionSampler(
        languages=tuple(text_list(languages, "languages")), tag_fields=tuple(text_list(tag_fields, "tag_fields"))
    )
    if tag_fields:
        warn_of_unseen_fields(draw.tag_fields, shard)
    return draw


def _share(rank: int | None, world_size: int | None) -> ProcessRank:
    """The process's share as given, else as its launcher says."""
    if rank is None and world_size is None:
        return ProcessRank.from_environment()
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(f"rank = {rank} of world_size = {world_size}; give both, rank from 0 to world_size - 1.")
    return ProcessRank(rank, world_size, rank)


def _view_and_tokenizer(
    model: str | Path | HasView | None,
    image_size: int,
    tokenizer: str | Path | Tokenizer | TextsToTokens,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[EvalTransform, Tokenizer]:
    """Those of the model, else those that are described."""
    if isinstance(model, str | Path):
        model = load_model(str(model), device="cpu")
    if model is not None:
        return model.view, model.tokenizer
    # not every caller's types are checked
    if not isinstance(image_size, int) or image_size < 1:
        raise UsageError(f"image_size = {image_size}; give the pixels of an image's side, 1 or more.")
    view = EvalTransform(size=image_size, mean=tuple(mean), std=tuple(std))
    if isinstance(tokenizer, str | Path):
        return view, open_tokenizer(str(tokenizer))
    return view, tokenizer if isinstance(tokenizer, Tokenizer) else CallableTokenizer(tokenizer)


def _read_sources(
    shards: Shards, selection: str | Path | None, captions_from: str | Path | None, caption_mix: float
) -> tuple[Source, ...]:
    if not 0 <= caption_mix <= 1:
        raise UsageError(f"caption_mix = {caption_mix} is a probability; give a number from 0 to 1.")
    url = join_shards(shards)
    # a mixture names the shards of each of its sources
    data = url if url.endswith(MIXTURE_SUFFIX) else "::".join(shards_at(url))
    return read_sources(data, str(selection or ""), captions_from=str(captions_from or ""), caption_mix=caption_mix)


def _sequential(
    urls: list[str], selection: str | Path | None, batch_size: int, *, allow_damage: bool
) -> SequentialBatches:
    counts = count_samples(urls, allow_damage=allow_damage)
    times = None if selection is None else read_selection(Path(selection)).times_of(urls)
    return SequentialBatches(counts=counts, batch_size=batch_size, times=times)


def _sequence(urls: list[str], selection: str | Path | None) -> str:
    """Identity of a sequence in file order."""
    selected = "" if selection is None else read_selection(Path(selection)).fingerprint
    return compute_fingerprint(shards_fingerprint(urls), selected)
