"""Fits a poly-encoder (`vlm.models.poly_encoder`) to the images and captions of an embeddings folder.

Each caption is to find its image among those that the frozen towers put nearest to it, which is what a reranker meets
in a search. Images that share the caption are no candidates. A part of the images is held out: the weights after the
epoch with the best mean reciprocal rank there are kept, the untrained ones included.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vlm.console import track
from vlm.errors import UsageError
from vlm.files import check_not_exists
from vlm.index.embeddings_folder import Embeddings
from vlm.models.model import VisionLanguageModel
from vlm.models.poly_encoder import FittedPolyEncoder, PolyEncoder, PolyEncoderSize, save_poly_encoder, token_states
from vlm.results import Result
from vlm.tensor_types import Float32, Int64, Tensor

_BATCH = 64
_TEXTS_AT_ONCE = 512
MIN_IMAGES = 20


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """codes: views of a text. candidates: nearest images that a caption chooses from. held_out: share of the images.

    language: of the captions; empty takes the first of each image.
    """

    codes: int = 16
    candidates: int = 50
    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    held_out: float = 0.1
    max_images: int = 50_000
    language: str = ""
    seed: int = 0

    def check(self) -> None:
        """Check values against their limits.

        Raises:
            UsageError: naming the value, its limit and the cure.
        """
        for name, least in (("codes", 1), ("candidates", 2), ("epochs", 1), ("max_images", MIN_IMAGES)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)} is too few; give at least {least}.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out = {self.held_out} is out of range: give a fraction between 0 and 1.")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning_rate = {self.learning_rate} must be above 0, and finite.")


@dataclass(frozen=True, kw_only=True)
class RerankerSummary(Result):
    """The folder and its identity, and what the poly-encoder does on the held-out images; numbers as of `FitResult`."""

    reranker: str
    fingerprint: str
    images: int
    held_out_images: int
    epoch: int
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The poly-encoder, and what it does on the held-out images: recall@1 and mean reciprocal rank of their captions.

    before, after: by cosine, and reranked. epoch: after which the weights were kept, 0 for untrained ones.
    """

    fitted: FittedPolyEncoder
    before: dict[str, float]
    after: dict[str, float]
    epoch: int
    images: int
    held_out_images: int


@dataclass(frozen=True, kw_only=True)
class CaptionedRows:
    """Unit vectors of images, and captions with the row of each: equal captions have one number in `groups`."""

    images: Float32[Tensor, "N D"]
    captions: tuple[str, ...]
    image_of: Int64[Tensor, " T"]
    groups: Int64[Tensor, " T"]

    def select(self, rows: Int64[Tensor, " K"]) -> "CaptionedRows":
        """Some of the images, with their captions."""
        places = torch.full((len(self.images),), -1)
        places[rows] = torch.arange(len(rows))
        captions = (places[self.image_of] >= 0).nonzero()[:, 0]
        return CaptionedRows(
            images=self.images[rows],
            captions=tuple(self.captions[number] for number in captions.tolist()),
            image_of=places[self.image_of[captions]],
            groups=self.groups[captions],
        )


def read_rows(embeddings: Embeddings, options: FitOptions) -> CaptionedRows:
    """The images of a folder, or evenly many of them, with their captions.

    Raises:
        UsageError: the folder holds texts, or too few images with a caption.
    """
    if embeddings.space.modality != "image":
        raise UsageError(f"{embeddings.folder} holds texts; embed the images with --modality image.")
    number = min(len(embeddings), options.max_images)
    # evenly spread over the folder, so that sorted data loses no kind of image
    rows = np.unique(np.linspace(0, len(embeddings) - 1, number).astype(np.int64))
    places = {row: place for place, row in enumerate(rows.tolist())}
    captions: list[str] = []
    image_of: list[int] = []
    for row, origin in enumerate(embeddings.origins()):
        if row in places:
            # one language only: captions of the same image in another would count as wrong answers to each other's
            # texts
            first = options.language or next(iter(origin.captions), "")
            for caption in origin.captions.get(first, ()):
                captions.append(caption)
                image_of.append(places[row])
    if len(set(image_of)) < MIN_IMAGES:
        raise UsageError(
            f"{embeddings.folder} has {len(set(image_of))} images with a caption; a reranker needs {MIN_IMAGES}."
        )
    # samples of one caption are equally right answers to it
    _, groups = np.unique(np.array(captions), return_inverse=True)
    return CaptionedRows(
        images=torch.from_numpy(embeddings.take(rows)),
        captions=tuple(captions),
        image_of=torch.tensor(image_of),
        groups=torch.from_numpy(groups),
    )


def fit_poly_encoder(model: VisionLanguageModel, embeddings: Embeddings, options: FitOptions) -> FitResult:
    """Fit codes and maps on a part of the images; the towers do not change.

    Raises:
        UsageError: an option is out of range, the embeddings are of another model, or the tower has no token states.
    """
    options.check()
    if embeddings.space.fingerprint != model.fingerprint:
        raise UsageError(
            f"{embeddings.folder} was made by another model than {model.name} ({embeddings.space.model}); give that."
        )
    rows = read_rows(embeddings, options)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(rows.images), generator=generator)
    number = max(1, round(options.held_out * len(order)))
    held_out = rows.select(order[:number].sort().values)
    fitting = rows.select(order[number:].sort().values)

    states, _, _ = token_states(model, fitting.captions[:1])
    size = PolyEncoderSize(codes=options.codes, width=states.shape[-1], dimension=embeddings.dimension)
    # the network draws its weights from the global generator
    torch.manual_seed(options.seed)
    network = PolyEncoder(size, cosine_weight=model.logit_scale).to(model.device)
    before = measure(model, network, held_out, options.candidates, by_cosine=True)
    # epoch 0 is a candidate as well: a fit that makes things worse leaves the untrained weights
    best = (measure(model, network, held_out, options.candidates)["mrr"], 0, copy.deepcopy(network.state_dict()))
    for epoch in _train(model, network, fitting, options, generator):
        after = measure(model, network, held_out, options.candidates)
        if after["mrr"] > best[0]:
            best = (after["mrr"], epoch, copy.deepcopy(network.state_dict()))
    network.load_state_dict(best[2])
    network.eval().requires_grad_(False)
    return FitResult(
        fitted=FittedPolyEncoder(network=network.cpu(), model_fingerprint=model.fingerprint, model=model.name),
        before=before,
        after=measure(model, network.to(model.device), held_out, options.candidates),
        epoch=best[1],
        images=len(fitting.images),
        held_out_images=len(held_out.images),
    )


def fit_reranker(model: VisionLanguageModel, embeddings: Embeddings, out: Path, options: FitOptions) -> RerankerSummary:
    """Fit a poly-encoder and write its folder, whole or not at all.

    Raises:
        UsageError: `out` exists; otherwise as of `fit_poly_encoder`.
    """
    check_not_exists(out)
    result = fit_poly_encoder(model, embeddings, options)
    summary = RerankerSummary(
        reranker=str(out),
        fingerprint=result.fitted.fingerprint,
        images=result.images,
        held_out_images=result.held_out_images,
        epoch=result.epoch,
        before=result.before,
        after=result.after,
    )
    save_poly_encoder(out, result.fitted, configuration=asdict(options), details={"evidence": summary.to_json()})
    return summary


def _train(
    model: VisionLanguageModel,
    network: PolyEncoder,
    rows: CaptionedRows,
    options: FitOptions,
    generator: torch.Generator,
) -> Iterator[int]:
    """Train the poly-encoder; gives the number of each epoch when it is done."""
    images = rows.images.to(model.device)
    candidates = nearest_candidates(model, rows, options.candidates).to(model.device)
    # a caption whose image is not among its nearest would teach that a low cosine is right, and no search asks for it
    usable = (candidates[:, 0] >= 0).nonzero()[:, 0].cpu()
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    batches = -(-len(usable) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)
    for epoch in track(range(1, options.epochs + 1), total=options.epochs, what="fitting", unit="epoch"):
        order = usable[torch.randperm(len(usable), generator=generator)]
        for chosen in order.split(_BATCH):
            texts = [rows.captions[number] for number in chosen.tolist()]
            states, mask, vectors = token_states(model, texts)
            own = candidates[chosen.to(candidates.device)]
            scores = network(states, mask, vectors, images[own.clamp(min=0)])
            # -1 fills rows with fewer candidates
            scores = scores.masked_fill(own < 0, -torch.inf)
            loss = F.cross_entropy(scores, torch.zeros_like(own[:, 0]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


def nearest_candidates(model: VisionLanguageModel, rows: CaptionedRows, number: int) -> Int64[Tensor, "T C"]:
    """For each caption its own image, and the nearest of the images that do not share it; -1 for want of more.

    -1 in the first place, too, where the own image is not among the `number` nearest.
    """
    shared = _images_of_groups(rows)
    found: list[Tensor] = []
    for first, vectors in _text_blocks(model, rows.captions):
        cosines = vectors @ rows.images.T
        for row, group in enumerate(rows.groups[first : first + len(vectors)].tolist()):
            # images with the same caption are right answers, so they must not be taught as wrong ones
            cosines[row, shared[group]] = -torch.inf
        own = rows.image_of[first : first + len(vectors), None]
        own_cosines = (vectors * rows.images[own[:, 0]]).sum(dim=1, keepdim=True)
        top = cosines.topk(min(number - 1, len(rows.images)), dim=1)
        others = top.indices.masked_fill(top.values == -torch.inf, -1)
        own = own.masked_fill((cosines > own_cosines).sum(dim=1, keepdim=True) >= number, -1)
        found.append(torch.cat([own, others], dim=1))
    return torch.cat(found)


@torch.no_grad()
def measure(
    model: VisionLanguageModel, network: PolyEncoder, rows: CaptionedRows, number: int, *, by_cosine: bool = False
) -> dict[str, float]:
    """Recall@1 and mean reciprocal rank of the captions among these images, the nearest `number` of them reranked."""
    shared = _images_of_groups(rows)
    first_right = 0
    reciprocal = 0.0
    done = 0
    for first, vectors in _text_blocks(model, rows.captions):
        texts = rows.captions[first : first + len(vectors)]
        cosines = vectors @ rows.images.T
        nearest = cosines.topk(min(number, len(rows.images)), dim=1).indices
        if not by_cosine:
            states, mask, unit = token_states(model, texts)
            scores = network(states, mask, unit, rows.images[nearest].to(states.device)).cpu()
            # stable, so that equal scores stay in the order of their cosines
            nearest = nearest.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        for row, group in enumerate(rows.groups[first : first + len(vectors)].tolist()):
            is_right = torch.isin(nearest[row], shared[group])
            if is_right.any():
                rank = int(is_right.float().argmax())
                first_right += rank == 0
                # a caption whose image is not among the candidates adds nothing: reranking cannot bring it back
                reciprocal += 1 / (rank + 1)
        done += len(vectors)
    return {"recall@1": first_right / done, "mrr": reciprocal / done}


def _images_of_groups(rows: CaptionedRows) -> dict[int, Int64[Tensor, " K"]]:
    """The images that have each caption."""
    images: dict[int, list[int]] = {}
    for group, image in zip(rows.groups.tolist(), rows.image_of.tolist(), strict=True):
        images.setdefault(group, []).append(image)
    return {group: torch.tensor(own) for group, own in images.items()}


def _text_blocks(model: VisionLanguageModel, captions: Sequence[str]) -> Iterator[tuple[int, Float32[Tensor, "T D"]]]:
    for first in range(0, len(captions), _TEXTS_AT_ONCE):
        yield first, model.embed_texts(captions[first : first + _TEXTS_AT_ONCE])
