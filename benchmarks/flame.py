#!/usr/bin/env python
"""A frozen language model as text tower (FLAME) on long captions and in each language, beside other models.

    benchmarks/run flame TRAIN_SHARDS VAL_SHARDS OUT --feature-folder features [--language-model FOLDER]
        [--compare runs/lit-local] [--epochs 3]

The image tower is that of the preset `lit-local`, frozen, with its features cached; the language model is frozen too,
so that a projection on each side is all that is trained. Without --language-model a small one is first trained on the
captions of TRAIN_SHARDS in all their languages, into OUT/language-model. Long captions are all those of an image in its
first language, joined; OUT/long holds shards with them for `vlm eval RUN --retrieval OUT/long`.
"""

import io
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn import functional as F

import vlm
from vlm.console import show_json, show_table, track
from vlm.data.collate import iter_sample_batches
from vlm.data.shards import expand_shards
from vlm.evaluation.retrieval_metrics import measure_retrieval
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel
from vlm.train.feature_cache import part_paths
from vlm.train.presets import LOCAL_WEIGHTS

VARIANTS = {
    "last token": "",
    "mean of the tokens": ",pooling=mean",
    "two facet prompts": ",prompts=['The objects are','The place is']",
}
"""Options of the text tower."""

_LONG_CONTEXT = 128
_VOCABULARY = 4096
_LM_BATCH = 64
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    train: tyro.conf.Positional[str]
    """Training shards."""

    val: tyro.conf.Positional[str]
    """Shards to measure retrieval on."""

    out: tyro.conf.Positional[Path]
    """Folder of the language model, the long captions and the runs."""

    feature_folder: str
    """Folder of the cached features of the image tower."""

    language_model: str = ""
    """Folder of a causal language model of transformers; empty trains a small one."""

    language_model_steps: int = 300
    """Steps of 64 captions to train it for."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Text towers."""

    compare: tuple[str, ...] = ()
    """Runs over the same image tower to measure as well."""

    languages: tuple[str, ...] = ()
    """Languages of the captions to train on; empty takes the first of each image."""

    epochs: float = 3.0
    """Epochs of each run."""

    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Features [N, F] of images, and their captions by language."""

    features: torch.Tensor
    captions: list[dict[str, tuple[str, ...]]]


def main(arguments: Arguments) -> None:
    """Train what is missing, measure, show."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_long_captions(arguments.val, arguments.out / "long")
    folder = arguments.language_model or str(train_language_model(arguments))
    runs: dict[str, str] = {}
    for name in arguments.variants:
        run = arguments.out / name.replace(" ", "-")
        if not (run / "manifest.json").is_file():
            train(arguments, folder, VARIANTS[name], run)
        runs[f"lm, {name}"] = str(run)
    runs |= {Path(run).name: run for run in arguments.compare}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in runs.items():
        results[name] = measure(load_model(run, device="cpu"), arguments)
    if arguments.json:
        show_json(results)
        return
    rows: list[list[Any]] = []
    for name, sets in results.items():
        for kind, values in sets.items():
            rows.append([name, kind, *(f"{100 * value:.1f}" for value in values.values())])
    columns = ["text tower", "captions", *(f"{way} R@{count}" for way in ("t→i", "i→t") for count in (1, 5, 10))]
    show_table(columns, rows, title=f"{arguments.epochs:g} epochs")


def write_long_captions(url: str, out: Path) -> None:
    """Shards of the same images, each with one caption: those of its first language, joined."""
    out.mkdir(exist_ok=True)
    for shard in expand_shards(url):
        path = out / Path(shard).name
        if path.is_file():
            continue
        with tarfile.open(shard) as source, tarfile.open(path.with_suffix(".part"), "w") as target:
            for member in source:
                content = source.extractfile(member)
                assert content is not None
                data = content.read()
                if member.name.endswith(".txt"):
                    continue
                if member.name.endswith(".json"):
                    data = json.dumps({"captions": [join(json.loads(data)["captions"])]}).encode()
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))
        path.with_suffix(".part").rename(path)


def join(captions: Sequence[str]) -> str:
    """One text of several sentences."""
    return " ".join(caption.strip().removesuffix(".").strip() + "." for caption in captions)


def all_captions(url: str) -> Iterator[str]:
    """Every caption in every language."""
    for batch in iter_sample_batches(expand_shards(url), None, workers=0):
        for sample in batch.samples:
            for captions in sample.captions.values():
                yield from captions


def train_language_model(arguments: Arguments) -> Path:
    """A small GPT-2 over byte pairs, trained to predict the captions; a folder as transformers writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = arguments.out / "language-model"
    if (folder / "config.json").is_file():
        return folder
    captions = list(all_captions(arguments.train))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(captions, trainer)
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<end>"
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=256, n_layer=2, n_head=4, n_positions=2 * _LONG_CONTEXT)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 1, 0
    network = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=arguments.language_model_steps)
    rng = np.random.default_rng(0)
    loss = torch.tensor(0.0)
    for _ in track(range(arguments.language_model_steps), total=arguments.language_model_steps, what="language model"):
        texts = [captions[number] for number in rng.integers(len(captions), size=_LM_BATCH)]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=_LONG_CONTEXT, return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        loss = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"Language model: {arguments.language_model_steps} steps, loss {float(loss.detach()):.2f} a token.")
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(arguments: Arguments, folder: str, tower: str, run: Path) -> None:
    """One run: both towers frozen, a projection on each side."""
    started = time.process_time()
    image = f"timm:tf_efficientnet_lite2,initial_weights={LOCAL_WEIGHTS[0]},residual=1024,head_dropout=0.3"
    vlm.train(
        "lit-local",
        data=arguments.train,
        run=run,
        architecture=f"{image}+lm:{folder},hidden=1024{tower}@512",
        tokenizer=folder,
        context_length=_LONG_CONTEXT,
        lock="image",
        feature_folder=arguments.feature_folder,
        caption_blend=0.0,
        languages=arguments.languages,
        epochs=arguments.epochs,
        batch_size=256,
        workers=0,
        checkpoint_every=1_000_000,
        evaluate_every=1_000_000,
    )
    print(f"{run.name}: {time.process_time() - started:.0f} s of processor time")


def read_photos(model: VisionLanguageModel, arguments: Arguments) -> Photos:
    """The val images whose features are cached, which a run that was trained there leaves to do only for val."""
    shards = expand_shards(arguments.val)
    rows: list[np.ndarray] = []
    captions: list[dict[str, tuple[str, ...]]] = []
    for shard, part in zip(shards, part_paths(Path(arguments.feature_folder), "image", shards, model, ()), strict=True):
        stored = np.load(part) if part.is_file() else None
        for batch in iter_sample_batches([shard], None if stored is not None else model.view, workers=0):
            if stored is None:
                rows += list(trunk_features(model, batch.images))
                captions += [dict(sample.captions) for sample in batch.decoded]
                continue
            for sample in batch.samples:
                rows.append(stored[sample.sample_index.number, 0])
                captions.append(dict(sample.captions))
    return Photos(features=torch.from_numpy(np.stack(rows).astype(np.float32)), captions=captions)


@torch.inference_mode()
def trunk_features(model: VisionLanguageModel, images: torch.Tensor) -> np.ndarray:
    """What the frozen trunk gives."""
    from vlm.models.model import normalise

    tower: Any = model.network.get_submodule("visual")
    return tower.embed(normalise(images, model.view)).numpy()


def measure(model: VisionLanguageModel, arguments: Arguments) -> dict[str, dict[str, float]]:
    """Recall of short captions, of long ones, and of those in each language."""
    photos = read_photos(model, arguments)
    tower: Any = model.network.get_submodule("visual")
    with torch.inference_mode():
        images = F.normalize(tower.project(photos.features), dim=-1).numpy()
    first = [next(iter(captions.values())) for captions in photos.captions]
    sets: dict[str, list[tuple[str, ...]]] = {"short": first, "joined": [(join(own),) for own in first]}
    languages = {language: None for captions in photos.captions for language in captions}
    for language in list(languages)[1:]:
        sets[language] = [captions.get(language, ()) for captions in photos.captions]
    results: dict[str, dict[str, float]] = {}
    for name, captions in sets.items():
        flat: list[str] = []
        for own in captions:
            flat += own
        texts = embed_texts(model, flat)
        found = measure_retrieval(images, texts, captions, every_positive=False)
        values: dict[str, float] = {}
        for direction in ("text_to_image", "image_to_text"):
            for count, recall in getattr(found, direction).recall.items():
                values[f"{direction}_recall@{count}"] = recall
        results[name] = values
    return results


def embed_texts(model: VisionLanguageModel, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors; those of like length together, so that little is padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    rows: list[np.ndarray] = []
    for begin in range(0, len(order), _TEXTS_AT_ONCE):
        rows.append(model.embed_texts([texts[number] for number in order[begin : begin + _TEXTS_AT_ONCE]]).numpy())
    return np.concatenate(rows)[np.argsort(order, kind="stable")]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
