"""What users of a loader without a transform of its own write: decoded by Pillow, open_clip's training crop, floats."""

from torchvision import transforms

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def training_transform(size: int) -> transforms.Compose:
    """RGB image of Pillow → its random view [3 S S], normalised: what the other sides do, by torchvision."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=(0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _DEVIATION),
        ]
    )
