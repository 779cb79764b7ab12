"""What a run is told, as frozen dataclasses: one file for each part."""

from vlm.train.config.loader import LoaderConfig
from vlm.train.config.model import ModelConfig
from vlm.train.config.objective import ObjectiveConfig
from vlm.train.config.optimizer import OptimizerConfig
from vlm.train.config.resume import FREE_ON_RESUME, differences
from vlm.train.config.run import TrainConfig
from vlm.train.config.safety import SafetyConfig

__all__ = [
    "FREE_ON_RESUME",
    "LoaderConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SafetyConfig",
    "TrainConfig",
    "differences",
]
