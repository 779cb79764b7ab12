"""Export of models to other tools, tested there before they are handed over."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder
from vlm.models.load import save_model_folder
from vlm.models.model import VisionLanguageModel
from vlm.results import Result
from vlm.tensor_types import Tensor

TOLERANCE = 1e-5

# capitals, umlauts, and an empty text: what tokenizers treat differently
_TEXTS = ("a small red circle", "two large blue stars on a white background", "Ein Hund läuft über die Wiese.", "")
_SIZES = ((57, 41), (32, 32), (90, 200))


_SNIPPET = """\
import open_clip
import torch
from PIL import Image
{tokenizer_import}
model, _, preprocess = open_clip.create_model_and_transforms({address!r})
model.eval()
tokenizer = {tokenizer}
with torch.inference_mode():
    texts = model.encode_text(tokenizer(["a red circle", "a blue star"]), normalize=True)
    images = model.encode_image(preprocess(Image.new("RGB", (64, 64))).unsqueeze(0), normalize=True)
print(images @ texts.T)
"""


@dataclass(frozen=True, kw_only=True)
class Export(Result):
    """What was written.

    largest_difference: between an entry of a unit vector here and there, over some test images and texts.
    has_tokenizer: whether the other tool tokenizes texts the same way by itself.
    """

    out: str
    fingerprint: str
    largest_difference: float
    has_tokenizer: bool

    @property
    def snippet(self) -> str:
        """Python code that uses the folder with open_clip, to copy and run."""
        address = f"local-dir:{self.out}"
        if self.has_tokenizer:
            tokenizer_import = ""
            tokenizer = f"open_clip.get_tokenizer({address!r})"
        else:
            # open_clip itself has none for these ids
            tokenizer_import = "\nfrom vlm.adaptors.open_clip_tokenizer import get_tokenizer\n"
            tokenizer = f"get_tokenizer({self.out!r})"
        return _SNIPPET.format(address=address, tokenizer_import=tokenizer_import, tokenizer=tokenizer)


def export_open_clip(model: VisionLanguageModel, out: Path) -> Export:
    """A new folder that `open_clip.create_model_and_transforms("local-dir:OUT")` loads, which is tested.

    Images of noise go through open_clip's own preprocessing and network, texts through its network.

    Raises:
        UsageError: `out` exists, or open_clip cannot build this network. VlmError: its embeddings differ from ours.
    """
    with atomic_folder(out) as folder:
        save_model_folder(folder, model, inputs={"model": model.fingerprint})
        network, preprocess = _load_with_open_clip(folder, model.name)
        # both modalities, since either tower or the preprocessing may differ
        difference = max(_image_difference(model, network, preprocess), _text_difference(model, network))
        # "not at most" instead of "greater", so that NaN is refused as well
        if not difference <= TOLERANCE:
            raise VlmError(
                f"open_clip's embeddings differ from those of {model.name}: an entry of a unit vector by "
                f"{difference:.1e}, more than {TOLERANCE:.0e}; nothing was written."
            )
        has_tokenizer = _open_clip_tokenizer_matches(folder, model)
    return Export(
        out=str(out), fingerprint=model.fingerprint, largest_difference=difference, has_tokenizer=has_tokenizer
    )


def _load_with_open_clip(folder: Path, name: str) -> tuple[Any, Any]:
    import open_clip

    try:
        opened: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    # open_clip has no error of its own for configurations it cannot build
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError, OSError) as error:
        raise UsageError(
            f"open_clip cannot build the network of {name} ({error}): one of its towers is vlm's own. "
            "It stays usable here; for open_clip, train one of its architectures."
        ) from error
    network, _, preprocess = opened
    return network.eval(), preprocess


@torch.inference_mode()
def _image_difference(model: VisionLanguageModel, network: Any, preprocess: Any) -> float:
    rng = np.random.default_rng(0)
    # of several sizes and shapes, so that the preprocessing is compared as well
    our_pixels: list[np.ndarray] = []
    their_pixels: list[Tensor] = []
    for size in _SIZES:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        our_pixels.append(model.view(_png(image)))
        their_pixels.append(preprocess(image))
    ours = model.embed_images(torch.from_numpy(np.stack(our_pixels)))
    theirs = network.encode_image(torch.stack(their_pixels), normalize=True)
    return _max_difference(ours, theirs)


@torch.inference_mode()
def _text_difference(model: VisionLanguageModel, network: Any) -> float:
    tokens = torch.from_numpy(model.tokenizer.encode(_TEXTS))
    return _max_difference(model.embed_texts(_TEXTS), network.encode_text(tokens, normalize=True))


def _open_clip_tokenizer_matches(folder: Path, model: VisionLanguageModel) -> bool:
    import open_clip

    try:
        theirs: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
        return bool(np.array_equal(np.asarray(theirs(list(_TEXTS))), model.tokenizer.encode(_TEXTS)))
    except (OSError, ValueError, TypeError):
        return False


def _max_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
