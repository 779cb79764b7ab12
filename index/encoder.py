"""What embedding asks of a model (`Encoder`), and of its vectors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlm.errors import VlmError
from vlm.index.embeddings_folder import find_non_unit_rows
from vlm.tensor_types import Array, Float32, Tensor, UInt8

# named alone: a search by words needs no image library
if TYPE_CHECKING:
    import vlm.data.transforms


@runtime_checkable
class Encoder(Protocol):
    """Images and texts to unit vectors on the CPU; `fingerprint` identifies their embedding space."""

    @property
    def view(self) -> "vlm.data.transforms.EvalTransform":
        """From an encoded image to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same vectors."""
        ...

    @property
    def embedding_size(self) -> int:
        """D."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Images as `view` gives them."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Texts, not yet tokenized."""
        ...


def check_unit_norm(vectors: Float32[Array, "N D"], names: Sequence[str]) -> None:
    """Refuse vectors that cannot be compared by cosine.

    Raises:
        VlmError: a vector is not finite or not of length 1; `names` says whose it is.
    """
    wrong, lengths = find_non_unit_rows(vectors)
    if len(wrong):
        raise VlmError(
            f"The model gave a vector of length {lengths[0]:.4g} for {names[wrong[0]]!r} ({len(wrong)} such of "
            f"{len(vectors)} in this batch); 1 was expected. Its weights are damaged or its training diverged: "
            "use another checkpoint."
        )
