"""How the weights move."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon beside it, with linear warm-up and cosine decay to zero."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices inside the towers move by orthogonalised momentum, all else by AdamW, at one learning rate."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    table_rate: float = 1.0
    """Learning rate of tables of tokens, relative to the others'."""

    gain_rate: float = 1.0
    """The same, of gains and biases."""

    kernel_rate: float = 1.0
    """The same, of kernels of convolutions, patch embeddings among them."""

    temperature_rate: float = 1.0
    """The same, of temperature and bias of the similarities."""

    weight_decay: float = 0.1
    """On matrices only; gains, biases and the temperature are left alone."""

    beta1: float = 0.9
    """Decay of the mean of the gradient."""

    beta2: float = 0.98
    """Decay of the mean of its square."""

    epsilon: float = 1e-6
    """Added to the root of the latter."""

    warmup_steps: int = 100
    """Steps from zero to the peak."""

    clip_norm: float = 1.0
    """The gradient's norm is cut to this; 0 leaves it."""

    average_decay: float = 0.0
    """Decay of the running mean of the weights (EMA), which becomes the final model; 0 keeps none."""
