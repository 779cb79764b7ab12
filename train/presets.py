"""Named runs: a model with the settings that train it well. Adding one is one entry."""

from pathlib import Path

from vlm.config import from_toml, nearest
from vlm.errors import UsageError
from vlm.train.config import LoaderConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig

_SCENES = LoaderConfig(languages=("en",), crop_scale=(1.0, 1.0))
_QUICK = OptimizerConfig(learning_rate=2e-3, beta2=0.95, warmup_steps=80)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "learns the drawn scenes in about three minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="tiny"),
            loader=_SCENES,
            optimizer=_QUICK,
            batch_size=128,
            epochs=10.0,
            val_captions_each=1,
        ),
    ),
    "tiny-coca": (
        "learns to caption the drawn scenes in under five minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="tiny-coca"),
            loader=_SCENES,
            objective=ObjectiveConfig(objective="coca", contrastive_weight=1.0, caption_weight=1.5),
            optimizer=_QUICK,
            batch_size=128,
            epochs=8.5,
            val_captions_each=1,
        ),
    ),
    "fashion": (
        "titles of 7,400 product photos, in ten minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="small"),
            loader=LoaderConfig(crop_scale=(0.7, 1.0), flip=0.5),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.2, warmup_steps=100),
            batch_size=256,
            epochs=32.0,
        ),
    ),
    "flickr8k": (
        "6,000 photos with five captions each, in five minutes on two CPU cores",
        TrainConfig(
            model=ModelConfig(architecture="small"),
            loader=LoaderConfig(crop_scale=(0.6, 1.0), flip=0.5),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.2, warmup_steps=100),
            batch_size=256,
            epochs=12.0,
        ),
    ),
}


def open_preset(name: str) -> TrainConfig:
    """The configuration named by a preset, a TOML file, a run folder, or an architecture of open_clip.

    Raises:
        UsageError: it is none of these; the nearest preset is named.
    """
    if name in PRESETS:
        return PRESETS[name][1]
    path = Path(name)
    if path.is_dir():
        return from_toml(TrainConfig, path / "config.toml") if (path / "config.toml").is_file() else _refuse(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"There is no configuration {name!r}.")
        return from_toml(TrainConfig, path)
    return _of_architecture(name)


def _of_architecture(name: str) -> TrainConfig:
    import open_clip

    if open_clip.get_model_config(name) is None:
        return _refuse(name)
    is_coca = name.startswith("coca_")
    return TrainConfig(
        model=ModelConfig(architecture=name),
        objective=ObjectiveConfig(objective="coca" if is_coca else "clip"),
        optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, warmup_steps=2000),
        batch_size=1024,
        precision="bf16",
    )


def _refuse(name: str) -> TrainConfig:
    hint = nearest(name, list(PRESETS))
    raise UsageError(f"Unknown preset {name!r}; {hint}. A TOML file, a run folder or an open_clip name will do too.")
