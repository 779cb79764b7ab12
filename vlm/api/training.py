"""Shards to trained models: `vlm.train`, `scale`, `fit_mixture`, `soup`, `reinforce`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vlm.api.embedding import check_processes
from vlm.config import number_list, text_list
from vlm.data.shards import Shards, expand_shards, join_shards, shards_fingerprint
from vlm.errors import UsageError, VlmError, os_errors_explained
from vlm.files import atomic_folder, check_not_exists, json_text, write_text
from vlm.index.embed import ProcessRank
from vlm.launch import run_in_processes
from vlm.models.load import load_model, load_network, save_model_folder
from vlm.models.model import VisionLanguageModel
from vlm.models.sentence_encoder import load_text_model
from vlm.results import Result
from vlm.train.averaging import Ingredient, Measure, PathPoint, build_soup, parse_metric, retrieval_measure
from vlm.train.dataset_reinforcement import ReinforceConfig, ReinforceSummary, Teachers
from vlm.train.dataset_reinforcement import reinforce as reinforce_shards
from vlm.train.mixture_weights import MixtureReport, measure_mixture
from vlm.train.presets import open_preset
from vlm.train.run import RunSummary
from vlm.train.run import train as train_run
from vlm.train.run_config import TrainConfig, override
from vlm.train.scaling import ScalingReport, measure_scaling
from vlm.train.teacher_views import ViewGeometry


@os_errors_explained()
def train(
    preset: str | Path | TrainConfig,
    *,
    data: Shards | None = None,
    val: Shards | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    allow: Sequence[str] = (),
    processes: int = 1,
    **settings: Any,
) -> RunSummary:
    """Pretrain or fine-tune on shards, as `vlm train` does.

    Under torchrun or accelerate's launcher every process makes this call; `processes` starts them itself, and a
    script then makes the call under `if __name__ == "__main__"`.

    Args:
        preset: a preset (`tiny`, `finetune`, …: docs/recipes.md), a TOML file, a run folder (its configuration), an
            open_clip architecture, or a configuration.
        data: training shards, or a mixture file (.toml). val: shards on which retrieval is measured meanwhile.
        run: folder of the run.
        resume: go on from the run's newest checkpoint as if it had never been interrupted.
        allow: settings, or groups of them, that may differ from those the run was begun with.
        settings: any setting by its name, e.g. `batch_size=512, learning_rate=1e-3`, or a group of them,
            `optimizer={"learning_rate": 1e-3}`.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run that is resumed.
        VlmError: the run had to end; what it has saved is kept.
    """
    config = _configuration(preset, data, val, run, settings, resume=resume)
    job = _TrainJob(config, resume=resume, allow=tuple(text_list(allow, "allow")))
    check_processes(processes)
    if processes == 1:
        return job.run()
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UsageError(
            f"processes = {processes}, and torch sees {torch.cuda.device_count()} GPUs: training needs one for each. "
            "Give at most as many."
        )
    # what a check finds is said once, before any process starts
    job.config.check()
    return run_in_processes(_train_in_process, job, processes)[0]


@os_errors_explained()
def scale(
    preset: str | Path | TrainConfig,
    *,
    data: Shards | None = None,
    val: Shards | None = None,
    run: str | Path | None = None,
    shares: Sequence[float] = (0.0625, 0.125, 0.25, 0.5, 1.0),
    architectures: str | Sequence[str] = (),
    seeds: int = 2,
    metric: str = "text_to_image_recall@10",
    hold: Literal["steps", "epochs"] = "steps",
    budgets: Sequence[float] = (),
    **settings: Any,
) -> ScalingReport:
    """Forecast what more data would bring, and a larger model, as `vlm scale` does; repeat the call to go on, finished
    runs are read.

    Args:
        preset, data, val, settings: as of `train`. run: folder of all the runs, of scaling.json and scaling.png.
        shares: sizes as shares of the shards. architectures: models of different sizes, three or more, each trained on
            all shares. seeds: runs of each.
        metric: the score, of `vlm soup --metric`'s names, or `loss`, the contrastive loss of the held-out data.
        hold: what all sizes have alike, the steps of the largest or the epochs.
        budgets: training FLOPs to divide between model and data; none takes those of the largest run, and ten times as
            many.

    Raises:
        UsageError: too few sizes or runs for a fit, or a configuration that cannot work. VlmError: a run had to end.
    """
    config = _configuration(preset, data, val, run, settings)
    _check_alone("scale")
    with _memory_error_explained(config, "repeat the command with it and another --run"):
        return measure_scaling(
            config,
            shares=number_list(shares, "shares"),
            architectures=text_list(architectures, "architectures"),
            seeds=seeds,
            metric=metric,
            hold=hold,
            budgets=number_list(budgets, "budgets"),
        )


@os_errors_explained()
def fit_mixture(
    preset: str | Path | TrainConfig,
    *,
    data: str | Path | None = None,
    val: Shards | None = None,
    run: str | Path | None = None,
    probes: int = 16,
    seeds: int = 2,
    metric: str = "loss",
    concentration: float = 1.0,
    **settings: Any,
) -> MixtureReport:
    """Choose the weights of a mixture's sources by small runs, as `vlm mixture` does.

    Repeat the call to go on after an interruption, or with more probes: finished runs are read.

    Args:
        preset, val, settings: as of `train`, for a probe; `steps` is needed. data: a mixture file (.toml), whose
            weights are not used. run: folder of all the runs, of mixture.toml with the recommended weights,
            mixture.json and mixture.png.
        probes: runs with drawn weights. seeds: runs of the recommended weights, and of equal ones; 0 checks nothing.
        metric: the score to improve, `loss` or a recall, as of `scale`.
        concentration: of the Dirichlet distribution that weights are drawn from.

    Raises:
        UsageError: one source, too few probes, or a configuration that cannot work. VlmError: a run had to end.
    """
    config = _configuration(preset, data, val, run, settings)
    _check_alone("mixture")
    with _memory_error_explained(config, "repeat the command with it and another --run"):
        return measure_mixture(config, probes=probes, seeds=seeds, metric=metric, concentration=concentration)


def _check_alone(verb: str) -> None:
    world_size = ProcessRank.from_environment().world_size
    if world_size > 1:
        raise UsageError(
            f"This is one of {world_size} processes, each of which would fit and write; start vlm {verb} alone, after "
            "training its larger runs with vlm train under a launcher, if they need several processes."
        )


def _configuration(
    preset: str | Path | TrainConfig,
    data: Shards | None,
    val: Shards | None,
    run: str | Path | None,
    settings: dict[str, Any],
    *,
    resume: bool = False,
) -> TrainConfig:
    """The preset's, with what the call sets; arguments as of `train`."""
    config = preset if isinstance(preset, TrainConfig) else open_preset(str(preset), resume=resume)
    for name, value in (("data", data), ("val", val), ("val_other", settings.get("val_other"))):
        if value is not None:
            settings[name] = join_shards(value)
    if run is not None:
        settings["run"] = str(run)
    return override(config, settings)


@dataclass(frozen=True)
class _TrainJob:
    config: TrainConfig
    resume: bool
    allow: tuple[str, ...]

    def run(self) -> RunSummary:
        with _memory_error_explained(self.config, "go on with --resume --allow micro_batch"):
            return train_run(self.config, resume=self.resume, allow=self.allow)


@contextlib.contextmanager
def _memory_error_explained(config: TrainConfig, how_to_go_on: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise VlmError(
            f"A step of {config.batch_size} samples does not fit into the memory of the device; what was saved is "
            f"kept. Give a smaller --micro-batch, which changes no gradient, and {how_to_go_on}."
        ) from error


def _train_in_process(job: _TrainJob) -> RunSummary:
    if not torch.cuda.is_available():
        # else accelerate asks for a GPU as soon as there are several processes
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    summary = job.run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return summary


SOUP_FILE = "soup.json"


@dataclass(frozen=True, kw_only=True)
class SoupSummary(Result):
    """A soup that was written, its ingredients, and its metric with its value if one was measured.

    sweep: the interpolations that were tried.
    """

    out: str
    method: Literal["uniform", "weighted", "greedy", "interpolation"]
    fingerprint: str
    metric: str | None
    value: float | None
    ingredients: tuple[Ingredient, ...]
    sweep: tuple[PathPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """What `vlm soup --json` prints; a point of the sweep has the keys of what was measured there."""
        points: list[dict[str, Any]] = []
        for point in self.sweep:
            points.append({"alpha": point.alpha, "value": point.metric})
            if point.other is not None:
                points[-1] |= {"other": point.other, "is_allowed": point.is_allowed}
        return super().to_json() | {"sweep": points}


@os_errors_explained()
def soup(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    greedy: bool = False,
    weights: Sequence[float] = (),
    interpolate: str | Path = "",
    alphas: Sequence[float] = (),
    val: Shards = "",
    val_other: Shards = "",
    max_drift: float = 0.01,
    feature_folder: str | Path = "",
    metric: str = "recall@10",
    languages: Sequence[str] = (),
    captions_each: int = 0,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> SoupSummary:
    """Average fine-tuned models of the same base into one, as `vlm soup` does.

    Args:
        models: several for a uniform, weighted or greedy soup; one for an interpolation.
        out: model folder to write.
        greedy: begin with the best model and add each that does not lower the metric on `val`.
        weights: one for each model; empty weighs all equally.
        interpolate: the base of the one model: the result is (1 - α) · base + α · model.
        alphas: α of the interpolation; empty uses 0.5, or with `val` the best of 0, 0.25, 0.5, 0.75, 1.
        val: held-out shards to measure retrieval on.
        val_other: shards of other data that the base is good at, for an interpolation, which is then drawn into
            path.png. max_drift: how far the metric on them may be below that of the base.
        feature_folder: folder of a run's features: equal trunks then need not run again.
        metric: recall@1, @5 or @10, the mean of both directions, or one direction: text_to_image_recall@10, ….
        languages: of captions; empty uses the first of each sample. captions_each: captions per image and language, 0
            for all.

    Raises:
        UsageError: options exclude each other, `out` exists, or the models differ in more than their weights.
        VlmError: a model has diverged.
    """
    names = [str(models)] if isinstance(models, str | Path) else list(map(str, models))
    method = _soup_method(len(names), greedy=greedy, weights=number_list(weights, "weights"), interpolate=interpolate)
    _check_soup_measures(method, metric, val, val_other, number_list(alphas, "alphas"), max_drift)
    check_not_exists(Path(out))
    languages = tuple(text_list(languages, "languages"))
    # the choice of ingredients depends on the held-out shards as well
    inputs: dict[str, str] = {}
    measures: dict[str, Measure] = {}
    for name, held_out in (("val", val), ("val-other", val_other)):
        if held_out:
            shards = expand_shards(join_shards(held_out))
            inputs[name] = shards_fingerprint(shards)
            measures[name] = retrieval_measure(
                metric, shards, languages=languages, captions_each=captions_each, workers=workers
            )
    mean = build_soup(
        names,
        # a function, so that models are opened one by one: large ones need not fit into memory together
        open_model=partial(load_network, device=device, precision=precision),
        measure=measures.get("val"),
        greedy=greedy,
        shares=tuple(weights),
        start=str(interpolate),
        alphas=tuple(alphas),
        measure_other=measures.get("val-other"),
        max_drift=max_drift,
        feature_folder=Path(feature_folder) if feature_folder else None,
    )
    summary = SoupSummary(
        out=str(out),
        method=method,
        fingerprint=mean.model.fingerprint,
        metric=metric if val else None,
        value=mean.metric,
        ingredients=mean.ingredients,
        sweep=mean.sweep,
    )
    _write_soup(summary, mean.model, inputs, max_drift=max_drift)
    return summary


def _soup_method(
    number: int, *, greedy: bool, weights: Sequence[float], interpolate: str | Path
) -> Literal["uniform", "weighted", "greedy", "interpolation"]:
    """The way of averaging, in a word; options that exclude each other are refused before anything is read."""
    methods = {"greedy": greedy, "weights": len(weights) > 0, "interpolate": bool(interpolate)}
    requested = [name for name, value in methods.items() if value]
    if len(requested) > 1:
        raise UsageError(f"{' and '.join(requested)} are different ways to average; give one of them.")
    if interpolate and number != 1:
        raise UsageError(f"interpolate, the base, needs one tuned model besides it; {number} were given.")
    if not interpolate and number < 2:
        raise UsageError("A soup needs two models or more; for one and its base give the base as interpolate.")
    if interpolate:
        return "interpolation"
    if greedy:
        return "greedy"
    return "weighted" if requested else "uniform"


def _check_soup_measures(
    method: str, metric: str, val: Shards, val_other: Shards, alphas: Sequence[float], max_drift: float
) -> None:
    # read for its error alone: a misspelt metric must not show after the models are loaded
    parse_metric(metric)
    if len(alphas) and method != "interpolation":
        raise UsageError("alphas are of an interpolation: give the base of the one model as interpolate.")
    if val_other and not (method == "interpolation" and val):
        raise UsageError("val_other is measured beside val along an interpolation; give val and interpolate, too.")
    if not 0 <= max_drift <= 1:
        raise UsageError(f"max_drift = {max_drift} is not a share; give a number from 0 to 1.")
    if method == "greedy" and not val:
        raise UsageError("greedy chooses by a metric on held-out shards: give them as val.")


def _write_soup(summary: SoupSummary, model: VisionLanguageModel, inputs: dict[str, str], *, max_drift: float) -> None:
    inputs = dict(inputs)
    for ingredient in summary.ingredients:
        # models that greedy selection left out have no part in the weights
        if ingredient.share:
            inputs[f"model {ingredient.model}"] = ingredient.fingerprint
    # the summary first, so that the manifest, written last, lists it
    with atomic_folder(Path(summary.out)) as folder:
        write_text(folder / SOUP_FILE, json_text(summary.to_json(), indent=2) + "\n")
        if summary.metric and "val-other" in inputs:
            # here: matplotlib is loaded by those who draw
            from vlm.train.plots import draw_path

            draw_path(summary.sweep, folder / "path.png", metric=summary.metric, max_drift=max_drift)
        save_model_folder(folder, model, inputs=inputs)


@os_errors_explained()
def reinforce(
    shards: Shards,
    out: str | Path,
    *,
    teacher: str | Path | Sequence[str | Path] = (),
    views: int = 5,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    flip: float = 0.0,
    seed: int = 0,
    text_model: str | Path = "",
    pooling: Literal["", "mean", "last"] = "",
    context_length: int = 0,
    prompt: str | Sequence[str] = (),
    half: bool = False,
    batch_size: int = 256,
    workers: int = 1,
    allow_damage: bool = False,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> ReinforceSummary:
    """Write shards with precomputed teacher embeddings, as `vlm reinforce` does; repeat the call to resume it.

    Training then needs no teacher: `vlm.train(…, objective="clip + distill", arrays=("teacher_image", "teacher_text"),
    crop_scale=…, flip=…)` shows the student the very same views.

    Args:
        out: folder for the new shards.
        teacher: a MODEL, or several, whose similarities are averaged.
        views: augmented views per image. crop_scale: range of a view's share of the image area. flip: probability of a
            horizontal flip. The student needs the same.
        text_model: MODEL, or Hugging Face folder of a language model, whose embeddings of the captions are stored.
        pooling, context_length: of a language model; empty uses the last hidden state, 0 uses 77 tokens.
        prompt: facet prompts for a language model, whose embeddings are concatenated (FLAME).
        half: store the embeddings of `text_model` in float16, as those of teachers are.
        batch_size: views per batch of a teacher.

    Raises:
        UsageError: neither teacher nor text_model is given, `out` holds something else, or a number is out of range.
        VlmError: a shard is damaged, or no sample can be used.
    """
    config = ReinforceConfig(
        num_views=views, geometry=ViewGeometry(crop_scale=crop_scale, flip=flip), seed=seed, half=half
    )
    urls = expand_shards(join_shards(shards))
    names = (str(teacher),) if isinstance(teacher, str | Path) else tuple(map(str, teacher))
    language_model = None
    if text_model:
        language_model = load_text_model(
            str(text_model),
            context_length=context_length,
            pooling=pooling,
            prompts=tuple(text_list(prompt, "prompt")),
            device=device,
            precision=precision,
        )
    teachers = Teachers(
        models=tuple(load_model(name, device=device, precision=precision) for name in names),
        names=names,
        text_model=language_model,
        text_name=str(text_model),
    )
    return reinforce_shards(
        urls, Path(out), teachers, config, batch_size=batch_size, workers=workers, allow_damage=allow_damage
    )
