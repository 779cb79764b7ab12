"""What a locked image trunk gave for each view it has seen, so that it runs once for a view that comes again.

LiT (Zhai et al. 2022, §3.1) precomputes the embeddings of a locked tower. Here a caption decoder gets the whole map,
and what is kept is found by the pixels, so that no augmentation can give another view's features.
"""

import copy
import hashlib
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.models.network import Network
from vlm.models.towers.tower import ImageTower
from vlm.tensor_types import Float, Num, Tensor

logger = logging.getLogger(__name__)

_BYTES_IN_GB = 1_000_000_000
# of a tower: pooled features of 50,000 images, or of 170,000 captions
_EVALUATED_BYTES = 256_000_000
_AT_ONCE = 32
_DIGEST_BYTES = 16


class LockedFeatures:
    """What a trunk gives by the digest of its input, up to `max_bytes`; what finds no room is computed each time.

    compute: a method of the tower that runs its trunk. only_evaluations: keep nothing while gradients are computed.
    path: a file that `save` writes and later runs begin with.
    """

    def __init__(
        self, tower: Any, compute: Any, *, max_bytes: int, only_evaluations: bool = False, path: Path | None = None
    ) -> None:
        self._compute = compute
        self._trunk: nn.Module = tower.trunk
        self._max_bytes = max_bytes
        self._only_evaluations = only_evaluations
        self._rows: dict[bytes, int] = {}
        self._maps: Tensor | None = None
        self._path = path
        self._num_saved = 0
        if path is not None and path.is_file():
            self._load(path)

    # a copy of the network, as the counter of FLOPs makes one without data, computes for itself
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._compute, memo)

    def __call__(self, pixels: Num[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """What the trunk gives for these pixels, or tokens."""
        if self._only_evaluations and torch.is_grad_enabled():
            return self._compute(pixels)
        digests = [_digest(image) for image in pixels.detach().cpu()]
        is_new: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            if digest not in self._rows:
                is_new.setdefault(digest, place)
        if is_new:
            places = torch.tensor(list(is_new.values()), device=pixels.device)
            computed = self._run(pixels[places])
            if len(self._rows) + len(is_new) > self._room(computed):
                return self._run(pixels)
            assert self._maps is not None
            first = len(self._rows)
            self._maps[first : first + len(computed)] = computed.cpu()
            for digest in is_new:
                self._rows[digest] = len(self._rows)
        assert self._maps is not None
        rows = torch.tensor([self._rows[digest] for digest in digests])
        return self._maps[rows].to(pixels.device)

    @torch.no_grad()
    def _run(self, pixels: Tensor) -> Tensor:
        # a locked trunk drops nothing, whatever mode the network is in
        was_training = self._trunk.training
        self._trunk.eval()
        computed: list[Tensor] = []
        # all images of an evaluation's batch at once would take gigabytes for activations
        for part in pixels.split(_AT_ONCE):
            maps = self._compute(part)
            if not isinstance(maps, Tensor):
                raise UsageError("This image tower gives several maps; leave out --locked-features-gb.")
            computed.append(maps)
        self._trunk.train(was_training)
        return torch.cat(computed)

    def save(self) -> None:
        """Write what is kept to the file, if there is one and anything has come since."""
        if self._path is None or self._maps is None or len(self._rows) == self._num_saved:
            return
        digests = np.frombuffer(b"".join(self._rows), np.uint8).reshape(-1, _DIGEST_BYTES)
        with atomic_write(self._path) as file:
            # numpy has no bfloat16
            np.savez(file, digests=digests, features=self._maps[: len(self._rows)].float().numpy())
        self._num_saved = len(self._rows)

    def _load(self, path: Path) -> None:
        try:
            # opened here, since numpy leaves a damaged archive open
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                digests = arrays["digests"]
                features = torch.from_numpy(arrays["features"])
            is_whole = len(features) > 0 and digests.shape == (len(features), _DIGEST_BYTES)
        # whatever a damaged file holds: features can always be computed again
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            digests = np.empty((0, _DIGEST_BYTES), np.uint8)
            features = torch.empty(0)
            is_whole = False
        if not is_whole:
            logger.warning(f"{path} is damaged; the features in it are computed again.")
            return
        number = min(len(features), self._room(features))
        assert self._maps is not None
        self._maps[:number] = features[:number]
        self._rows = {digest.tobytes(): row for row, digest in enumerate(digests[:number])}
        self._num_saved = number

    def _room(self, maps: Tensor) -> int:
        """How many images there is room for, which is taken now."""
        if self._maps is None:
            size = maps[0].numel() * maps.element_size()
            rows = self._max_bytes // size
            # not one of inference mode, in which the first evaluation may run: no gradient goes through those
            with torch.inference_mode(False):
                self._maps = torch.empty(rows, *maps.shape[1:], dtype=maps.dtype)
            if not self._only_evaluations:
                logger.info(f"What the locked image tower gives is kept for {rows:,} views of {size / 1000:,.0f} kB.")
        return len(self._maps)


def keep_locked_features(network: Network, gigabytes: float) -> None:
    """Let the image tower of a captioner keep what its trunk gives.

    Raises:
        UsageError: a tower without a caption decoder, or not locked whole.
    """
    tower: Any = network.get_submodule("visual")
    if not isinstance(tower, ImageTower) or tower.memory is None:
        raise UsageError(
            "--locked-features-gb is for captioners over towers (coca:, cptr:); for others give --cache-features."
        )
    if any(parameter.requires_grad for parameter in tower.trunk.parameters()):
        raise UsageError("--locked-features-gb needs an image tower that is locked whole: give --lock image.")
    tower.features = LockedFeatures(tower, tower.features, max_bytes=int(gigabytes * _BYTES_IN_GB))


def keep_evaluated_features(network: nn.Module, paths: Mapping[str, Path] | None = None) -> list[LockedFeatures]:
    """Let towers whose trunks are locked whole keep their pooled features between evaluations, where only heads change.

    paths: files for those of `visual` and of `text`. Other towers are left as they are. A pass with gradients keeps
    nothing.
    """
    kept: list[LockedFeatures] = []
    for name in ("visual", "text"):
        tower: Any = getattr(network, name, None)
        has_features = all(hasattr(tower, part) for part in ("trunk", "embed", "project"))
        # pooling of ours is trained, and a captioner reads more than pooled features
        if not has_features or len(getattr(tower, "pools", ())) or getattr(tower, "memory", None) is not None:
            continue
        if any(parameter.requires_grad for parameter in tower.trunk.parameters()):
            continue
        path = (paths or {}).get(name)
        tower.embed = LockedFeatures(tower, tower.embed, max_bytes=_EVALUATED_BYTES, only_evaluations=True, path=path)
        kept.append(tower.embed)
    return kept


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=_DIGEST_BYTES).digest()
