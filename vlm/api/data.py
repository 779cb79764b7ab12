"""Shards to what training needs of them: `vlm.stream`, `vlm.train_tokenizer`, `vlm.build_concepts`, `vlm.relate`,
`vlm.inspect`, `vlm.curate`, `vlm.doctor`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlm.api.stream import CallableTokenizer, EvaluationReading, SampleStream, TextsToTokens, TrainingReading
from vlm.config import number_list, text_list
from vlm.data.caption_sampler import CaptionSampler
from vlm.data.collate import EvalCollator, TrainingBatch, TrainingCollator
from vlm.data.corpus import MIXTURE_SUFFIX, Source, open_corpus, read_sources
from vlm.data.curation.caption_filters import ConceptLimits, ConceptSummary, TextLines
from vlm.data.curation.caption_filters import build_concepts as write_concepts
from vlm.data.pack import shards_at
from vlm.data.sample_relations import SUFFIX as RELATIONS_SUFFIX
from vlm.data.sample_relations import RelationsSummary, relate_samples, write_relations
from vlm.data.sampler import DEFAULT_WINDOW, BatchSampler, SequentialBatches
from vlm.data.selection import Selection, read_selection, write_selection
from vlm.data.shards import Shards, count_samples, expand_shards, join_shards, shards_fingerprint
from vlm.data.tokenizer_training import TokenizerSummary, read_captions
from vlm.data.tokenizer_training import train_tokenizer as train_on_shards
from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.data.transforms import CLIP_MEAN, CLIP_STD, EvalTransform, RandomResizedCrop
from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_parent_exists, compute_fingerprint, json_text, write_text
from vlm.index.curation_scores import ScoreWriter
from vlm.index.embed import ProcessRank
from vlm.index.embeddings_folder import Embeddings
from vlm.models.load import load_model
from vlm.ray_engine import Engine, RayCluster, check_engine
from vlm.results import Result, json_values

# imported where they are used: a stream needs none of them
if TYPE_CHECKING:
    from vlm.api.inference import Model
    from vlm.data.bottleneck_report import BottleneckReport
    from vlm.data.curation.pipeline import CurationResult
    from vlm.data.inspection.findings import Inspection
    from vlm.data.profiling import PipelineProfile, ProfileSetup, Stage
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)

TEXT_SUFFIX = ".txt"


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
    return train_on_shards(urls, Path(out), vocabulary=vocabulary, languages=tuple(languages))


@os_errors_explained()
def build_concepts(
    corpus: Shards,
    out: str | Path,
    *,
    min_count: int = 100,
    min_pmi: float = 5.0,
    max_bigrams: int = 0,
    titles: str | Path | None = None,
    wordnet: str | Path | None = None,
    case: Literal["fold", "keep"] = "fold",
    languages: Sequence[str] = (),
) -> ConceptSummary:
    """Write a list of concepts for the filter `balance` of `vlm curate`, as `vlm concepts` does.

    Args:
        corpus: shards, whose captions are read, or a text file ending in .txt, a text a line.
        out: JSON list to write. min_count: least occurrences of a word or a pair of words. min_pmi: least pointwise
            mutual information of a pair in bits. max_bigrams: most pairs, 0 for all.
        titles: a file of titles, one a line. wordnet: a folder of WordNet's database.
        case: `fold` lower-cases everything. languages: of the captions; empty takes all.

    Raises:
        UsageError: `out` exists, a number is out of range, a source cannot be read, or no concept is left.
    """
    limits = ConceptLimits(min_count=min_count, min_pmi=min_pmi, max_bigrams=max_bigrams, folds_case=case == "fold")
    address = join_shards(corpus)
    if address.endswith(TEXT_SUFFIX):
        if not Path(address).is_file():
            raise UsageError(f"There is no text file {address}.")
        texts = TextLines(Path(address))
    else:
        texts = read_captions(shards_at(address), tuple(languages))
    return write_concepts(
        texts,
        Path(out),
        limits,
        titles=Path(titles) if titles else None,
        wordnet=Path(wordnet) if wordnet else None,
    )


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
    relations = relate_samples(shards_at(join_shards(shards)), languages=languages, images=images, workers=workers)
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


SELECTION_SUFFIX = ".selection"

Paths = str | Path | Sequence[str | Path]
"""A file or several."""


@os_errors_explained()
def inspect(
    shards: Shards,
    *,
    sample: int | None = None,
    selection: str | Path | None = None,
    tokenizer: str | Path = "",
    context_length: int | None = None,
    near_limit: int = 100_000,
    workers: int = 0,
    html: str | Path | None = None,
) -> "Inspection":
    """What shards hold, with all that is corrupt, damaged or there twice, as `vlm inspect` finds it.

    Args:
        sample: inspect at most so many samples, evenly spread. selection: only those of a file of `vlm.curate`.
        tokenizer: count tokens, too: clip, a SentencePiece .model file, or a tokenizer folder.
        context_length: report captions with more tokens; None uses that of the tokenizer.
        near_limit: search for near-duplicate images among at most so many samples.
        html: write a page with histograms and images to this file.

    Raises:
        UsageError: nothing is there, a number is out of range, or the folder of `html` does not exist.
        VlmError: none of the shards can be read.
    """
    from vlm.data.inspection.findings import contact_sheet
    from vlm.data.inspection.inspection import inspect_shards
    from vlm.pages import Provenance

    # before the scan, whose result would be lost
    if html:
        check_parent_exists(Path(html))
    address = join_shards(shards)
    inspection = inspect_shards(
        shards_at(address),
        sample=sample,
        workers=workers,
        selection=read_selection(Path(selection)) if selection else None,
        tokenizer=str(tokenizer),
        context_length=context_length,
        near_limit=near_limit,
    )
    if html:
        write_text(Path(html), contact_sheet(inspection, title=address, provenance=Provenance.current()))
        logger.info(f"Page: {html}")
    return inspection


@dataclass(frozen=True, kw_only=True)
class CurationSummary(Result):
    """A selection that was made.

    out: its file, None of a dry run. kept: distinct samples; visits: of an epoch. corrupt: samples that cannot be used,
    by reason. lineage: each step with its counts. curated: the filters as they were applied, before other selections.
    """

    out: str | None
    samples: int
    kept: int
    visits: int
    corrupt: dict[str, int]
    fingerprint: str
    lineage: tuple[dict[str, Any], ...]
    curated: "CurationResult" = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `vlm curate --json` prints; a dry run has no `out`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "curated"}
        if self.out is None:
            del values["out"]
        return json_values(values)


@os_errors_explained()
def curate(
    shards: Shards,
    out: str | Path,
    *,
    filter: str | Sequence[str] = (),
    and_: Paths = (),
    minus: Paths = (),
    plus: Paths = (),
    weight: float = 1.0,
    columns: Paths = (),
    seed: int = 0,
    workers: int = 1,
    engine: Engine = "local",
    ray_address: str | None = None,
    allow_damage: bool = False,
    dry_run: bool = False,
    html: str | Path | None = None,
    report: str | Path | None = None,
) -> CurationSummary:
    """Filter, deduplicate and balance samples into a selection, as `vlm curate` does; the shards stay unchanged.

    Args:
        out: file to write, ending in .selection, for `vlm.train(…, selection=out)` and `vlm.stream`.
        filter: filters in their order, each as `size:min=200` (docs/cli.md has all).
        and_: then intersect with these selections, whose repeat counts multiply. minus: subtract these.
        plus: add the repeat counts of these. weight: multiply all repeat counts by this.
        columns: score files, or folders of them, of `vlm.score`.
        engine, ray_address: as of `vlm.embed`; a Ray cluster scans with `workers` processes.
        allow_damage: curate the intact samples of truncated shards.
        dry_run: write no selection.
        html: write a page with kept and dropped images of each filter to this file.
        report: write the steps, and the counts of each balanced concept or cluster, as JSON to this file.

    Raises:
        UsageError: `out` exists or has another suffix, a filter does not exist or lacks its scores, or a number is out
            of range.
        VlmError: a shard is damaged.
    """
    from vlm.data.curation.filter import parse_filter
    from vlm.data.curation.pipeline import FILTERS, compose_selections
    from vlm.data.curation.pipeline import curate as apply_filters
    from vlm.data.curation.score_columns import ScoreColumns

    _check_curation({"seed": seed, "workers": workers, "weight": weight}, Path(out), (html, report), dry_run=dry_run)
    filters = [parse_filter(text, FILTERS) for text in text_list(filter, "filter")]
    # read before the long scan, which a selection that cannot be read would waste
    intersect = list(map(read_selection, _paths(and_)))
    subtract = list(map(read_selection, _paths(minus)))
    added = list(map(read_selection, _paths(plus)))
    check_engine(engine, ray_address)
    address = join_shards(shards)
    # a process more at least, where locally 0 scans in this one
    cluster = RayCluster(processes=max(workers, 1), address=ray_address, uses_gpus=False)
    curated = apply_filters(
        expand_shards(address),
        filters,
        columns=ScoreColumns(_paths(columns)),
        seed=seed,
        workers=workers,
        allow_damage=allow_damage,
        cluster=cluster if engine == "ray" else None,
    )
    selection = compose_selections(
        curated.selection,
        intersect=intersect,
        subtract=subtract,
        plus=added,
        weight=weight,
        seed=seed,
    )
    _write_curation_pages(curated, selection, f"Curation of {address}", html, report)
    if not dry_run:
        write_selection(Path(out), selection)
    counts = curated.summary(selection)
    return CurationSummary(out=None if dry_run else str(out), **counts, lineage=selection.lineage, curated=curated)


def _paths(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else list(map(Path, paths))


def _check_curation(numbers: dict[str, float], out: Path, pages: Sequence[str | Path | None], *, dry_run: bool) -> None:
    """Refuse, before the long scan, outputs that cannot be written and numbers out of range."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} = {value} is outside its range; give a number from 0 on.")
    for page in pages:
        if page:
            check_parent_exists(Path(page))
    if out.suffix != SELECTION_SUFFIX:
        raise UsageError(f"{str(out)!r} must end in {SELECTION_SUFFIX}, e.g. {out.with_suffix(SELECTION_SUFFIX)}")
    if dry_run:
        return
    if out.exists():
        raise UsageError(f"{out} exists already, and runs may depend on it; remove it or choose another name.")
    check_parent_exists(out)


def _write_curation_pages(
    curated: "CurationResult", selection: Selection, title: str, html: str | Path | None, report: str | Path | None
) -> None:
    from vlm.data.curation.pipeline import render_curation_report
    from vlm.pages import Provenance

    if html:
        write_text(Path(html), render_curation_report(curated, title=title, provenance=Provenance.current()))
        logger.info(f"Page: {html}")
    if report:
        write_text(Path(report), json_text(curated.report(selection), indent=1) + "\n")
        logger.info(f"Report: {report}")


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
        model: MODEL as for `vlm.load`, or a model; it sets image size and tokenizer. Without one the stages up to the
            device are measured.
        workers: numbers of worker processes to try; a script that starts some runs under `if __name__ == "__main__"`.
        samples: how many to measure with.
        size: of images in pixels; None uses that of the model, or 224. tokenizer: if there is no model.

    Raises:
        UsageError: nothing is there, a number is out of range, the device is neither cpu nor cuda, or `size` is not
            that of the model.
        VlmError: a shard is damaged, or no sample can be used.
    """
    from vlm.api.inference import encoder_of
    from vlm.data.bottleneck_report import find_bottleneck
    from vlm.data.profiling import profile_pipeline
    from vlm.models.load import choose_device
    from vlm.models.throughput import accelerator_name, measure_copy, measure_model

    numbers = sorted(set(number_list(workers, "workers")))
    if not numbers or numbers[0] < 0:
        raise UsageError(f"workers = {numbers}: give numbers from 0 on, as 0, 1, 2.")
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
        precision=precision,
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
        view=RandomResizedCrop(size=default_size if size is None else size),
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
        languages: of captions; empty takes the first one of each sample.
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
        crop = RandomResizedCrop(size=view.size, scale=crop_scale, flip=flip, interpolation=view.interpolation)
        draw = CaptionSampler(languages=tuple(languages))
        sources = _read_sources(shards, selection, captions_from, caption_mix)
        corpus = open_corpus(sources, seed=seed, window=shuffle_window, allow_damage=allow_damage)
        plan = BatchSampler(
            order=corpus.order, batch_size=batch_size, process=share.rank, num_processes=share.world_size
        )
        collate = TrainingCollator(
            plan=plan, view=crop, tokenizer=texts_to_tokens, draw=draw, seed=seed, caption_mix=corpus.caption_mix
        )
        reading = TrainingReading(plan=plan, collate=collate, epochs=epochs, sequence=corpus.fingerprint)
        return SampleStream(corpus.shards, reading, view, workers=workers, is_normalised=normalised)
    if captions_from is not None:
        raise UsageError("captions_from is for training; evaluation shows the shards' own captions.")
    if transform != "evaluation":
        raise UsageError(f"transform = {transform!r}; give training or evaluation.")
    urls = shards_at(join_shards(shards))
    reading = EvaluationReading(
        plan=_sequential(urls, selection, batch_size // share.world_size, allow_damage=allow_damage),
        collate=EvalCollator(view=view),
        tokenizer=texts_to_tokens,
        languages=tuple(languages),
        share=share,
        sequence=_sequence(urls, selection),
    )
    return SampleStream(tuple(urls), reading, view, workers=workers, is_normalised=normalised)


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
