"""Encoders whose answers are known, for tests of evaluators."""

import torch

from vlm.data.transforms import EvalTransform

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourEncoder:
    """Embeds an image as its mean colour, and a text as the colours it names: perfect on images of one colour."""

    name = "colours"
    fingerprint = "0123456789abcdef"
    logit_scale = 10.0

    def __init__(self) -> None:
        self.view = EvalTransform(size=8)
        self.num_images = 0
        self.num_texts = 0

    def embed_images(self, images):
        self.num_images += len(images)
        return torch.nn.functional.normalize(images.float().mean(dim=(2, 3)) + 1e-3, dim=-1)

    def embed_texts(self, texts):
        self.num_texts += len(texts)
        rows = [
            [sum(COLOURS[word][axis] for word in text.split() if word in COLOURS) for axis in range(3)]
            for text in texts
        ]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1e-3, dim=-1)
