#!/usr/bin/env python
"""Our losses and poolings beside those of the authors' code and of known libraries, on the same random input.

    benchmarks/run authors_code [--code FOLDER] [--packages FOLDER] [--json]

open_clip is installed with us. --packages names a folder made by `pip install --no-deps --target FOLDER lightly`.
--code names a folder with checkouts of repositories by their names: DreamLIP, simpool, Bag-of-Queries; of each one file
is run. What is not there is left out. All in double precision.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import open_clip.loss as open_clip_loss
import torch
import tyro
from torch.nn import functional as F

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError
from vlm.models.towers.pooling import BagOfQueries, SimPool, TokenMap
from vlm.tensor_types import Tensor
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run_config import ObjectiveConfig
from vlm.train.task import LOSS_TERMS

ROWS, SENTENCES, PATCHES, WIDTH = 6, 3, 16, 64


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the comparison."""

    code: Path | None = None
    """Folder with checkouts of the authors' repositories."""

    packages: Path | None = None
    """Folder of installed packages that are not ours."""

    json: bool = False
    """Print the rows as JSON."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. note: what the two values have in common, where they are not the loss itself."""

    ours: str
    theirs: str
    our_value: float
    their_value: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The random input, the same for all."""

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def value(self, name: str, **config: Any) -> float:
        """Our loss, as training divides it."""
        term = LOSS_TERMS[name]
        options = LossOptions(config=ObjectiveConfig(**config), pad_token=0)
        if term.batch_level:
            return float(term.batch_level(self.outputs, self.inputs, options))
        assert term.sample_level
        total = term.sample_level(self.outputs, self.inputs, options)
        return float(total / term.normaliser(self.inputs, options))


def random_case() -> Case:
    """Unit vectors where the losses read such."""
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    labels = torch.randint(1, 30, (ROWS, 9), generator=draw)
    labels[:, 6:] = 0
    outputs = {
        "image_features": F.normalize(values(ROWS, WIDTH), dim=-1),
        "text_features": F.normalize(values(ROWS, WIDTH), dim=-1),
        "sub_features": F.normalize(values(ROWS, SENTENCES, WIDTH), dim=-1),
        "patch_features": values(ROWS, PATCHES, WIDTH),
        "logit_scale": torch.tensor(14.0, dtype=torch.float64),
        "grouping_scale": torch.tensor(1 / 0.07, dtype=torch.float64),
        "logit_bias": torch.tensor(-10.0, dtype=torch.float64),
        "logits": values(ROWS, 9, 30),
        "labels": labels,
        "crop_prototypes": values(ROWS, 2, 20),
        "target_prototypes": values(ROWS, 20),
        "prototype_centre": values(20),
    }
    inputs = {
        "tokens": F.pad(labels, (1, 0), value=1),
        "sub_tokens": torch.ones(ROWS, SENTENCES, 4, dtype=torch.int64),
        "teacher_image": F.normalize(values(ROWS, 8), dim=-1),
        "teacher_text": F.normalize(values(ROWS, 8), dim=-1),
        "global_target": values(ROWS, WIDTH),
    }
    return Case(outputs=outputs, inputs=inputs)


def open_clip_rows(case: Case) -> Iterator[Row]:
    """CLIP, SigLIP, CoCa's caption loss and MobileCLIP's distillation."""
    outputs, inputs = case.outputs, case.inputs
    images, texts, scale = outputs["image_features"], outputs["text_features"], outputs["logit_scale"]
    clip: Any = open_clip_loss.ClipLoss()(images, texts, scale)
    yield Row(ours="clip", theirs="open_clip ClipLoss", our_value=case.value("clip"), their_value=float(clip))
    siglip: Any = open_clip_loss.SigLipLoss()(images, texts, scale, outputs["logit_bias"])
    yield Row(ours="siglip", theirs="open_clip SigLipLoss", our_value=case.value("siglip"), their_value=float(siglip))
    coca: Any = open_clip_loss.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)
    caption = coca(images, texts, outputs["logits"], outputs["labels"], scale)[1]
    yield Row(ours="caption", theirs="open_clip CoCaLoss", our_value=case.value("caption"), their_value=float(caption))

    teachers = [inputs["teacher_image"], inputs["teacher_text"]]
    distill: Any = open_clip_loss.DistillClipLoss()(images, texts, scale, *teachers, torch.tensor(5.0))[1]
    # theirs is a cross-entropy, larger by the teacher's entropy, which has no gradient
    logits = 5.0 * teachers[0] @ teachers[1].T
    entropies = [-(part.softmax(1) * part.log_softmax(1)).sum(1).mean() for part in (logits, logits.T)]
    yield Row(
        ours="distill",
        theirs="open_clip DistillClipLoss",
        our_value=case.value("distill", teacher_scale=5.0),
        their_value=float(distill - torch.stack(entropies).mean()),
        note="theirs less the teacher's entropy",
    )


def lightly_rows(case: Case) -> Iterator[Row]:
    """DCL's weights and DINO's loss in the library lightly."""
    from lightly.loss import DCLLoss, DCLWLoss, DINOLoss  # pyright: ignore[reportMissingImports]

    outputs = case.outputs
    images, texts, scale = outputs["image_features"], outputs["text_features"], float(outputs["logit_scale"])
    plain = float(DCLLoss(temperature=1 / scale)(images, texts))
    weighted = float(DCLWLoss(temperature=1 / scale, sigma=0.5)(images, texts))
    yield Row(
        ours="dcl",
        theirs="lightly DCLLoss",
        our_value=case.value("dcl"),
        their_value=plain,
        note="theirs has images among an image's negatives, too, and texts among a text's",
    )
    yield Row(
        ours="weighted_dcl - dcl",
        theirs="lightly DCLWLoss - DCLLoss",
        our_value=case.value("weighted_dcl") - case.value("dcl"),
        their_value=weighted - plain,
        note="what the weights add, the same whatever the negatives are",
    )
    loss = DINOLoss(output_dim=20, teacher_temp=0.04, warmup_teacher_temp_epochs=0, student_temp=0.1).double()
    loss.center.copy_(outputs["prototype_centre"].reshape_as(loss.center))
    crops = outputs["crop_prototypes"]
    # the first student view belongs to the teacher's own and is not compared with it
    student = [outputs["target_prototypes"], crops[:, 0], crops[:, 1]]
    value = float(loss([outputs["target_prototypes"]], student, teacher_temp=0.04))
    yield Row(ours="dino", theirs="lightly DINOLoss", our_value=case.value("dino"), their_value=value)


def dreamlip_rows(case: Case, module: ModuleType) -> Iterator[Row]:
    """Sub-captions and grouping of DreamLIP's repository."""
    outputs = case.outputs
    images, sentences, patches = outputs["image_features"], outputs["sub_features"], outputs["patch_features"]
    scales = (outputs["logit_scale"], outputs["grouping_scale"])
    parts = module.ClipLoss(use_declip_loss=True)(images, sentences, *scales)
    total = sum(float(part) for part in parts.values())
    theirs = "DreamLIP ClipLoss, use_declip_loss"
    yield Row(ours="sub_captions", theirs=theirs, our_value=case.value("sub_captions"), their_value=total)
    yield Row(
        ours="joint_sub_captions",
        theirs=theirs,
        our_value=case.value("joint_sub_captions"),
        their_value=total,
        note="ours has all sentences as negatives at once",
    )

    def grouping(is_inside: bool) -> float:
        # image by image: with several, the repository's reshape gives an image the sentences of others
        loss = module.ClipLoss(use_finegrained_loss=True, sgl_delta=0.1)
        if is_inside:
            loss.pairwise_contrastive_loss = loss.pairwise_contrastive_loss_instance
        values: list[float] = []
        for row in range(ROWS):
            own = slice(row, row + 1)
            found = loss(images[own], sentences[own], *scales, local_image_features=patches[own])
            values.append(float(found["finegrained_loss"]))
        return math.fsum(values) / ROWS

    ours = case.value("grouping")
    theirs = "DreamLIP pairwise_contrastive_loss_instance"
    yield Row(ours="grouping", theirs=theirs, our_value=ours, their_value=grouping(True), note="image by image")
    theirs = "DreamLIP pairwise_contrastive_loss"
    yield Row(
        ours="grouping", theirs=theirs, our_value=ours, their_value=grouping(False), note="theirs in both directions"
    )
    yield Row(
        ours="sparc",
        theirs=theirs,
        our_value=case.value("sparc"),
        their_value=grouping(False),
        note="ours with patches of their own length, the threshold 1/P and CLIP's temperature",
    )


def simpool_rows(case: Case, module: ModuleType) -> Iterator[Row]:
    """SimPool's layer, for one image, since theirs takes the least value of the batch."""
    patches = case.outputs["patch_features"][:1]
    ours = SimPool(WIDTH, 2.0).double()
    make = torch.tensor
    # their constants are made on a GPU
    with patch.object(torch, "tensor", lambda data, device=None: make(data, dtype=torch.float64)):
        theirs = module.SimPool(WIDTH).double()
    theirs.wq.weight = ours.attention.q.weight
    theirs.wk.weight = ours.attention.k.weight
    with torch.no_grad():
        normed = ours.attention.norm(patches)
        found = theirs(patches.mean(dim=1, keepdim=True), normed, normed).flatten()
        own = ours(TokenMap(prefix=patches[:, :0], patches=patches)).flatten() - (normed.min() - 1e-6)
    yield _norms("SimPool, γ = 2", "simpool sp.py", own, found, "ours less the least value, which theirs leaves out")


def boq_rows(case: Case, module: ModuleType) -> Iterator[Row]:
    """Bag-of-Queries with the same weights."""
    torch.manual_seed(0)
    ours = BagOfQueries(WIDTH, queries=8, rows=4, pool_width=WIDTH).double().eval()
    theirs = module.BoQ(in_channels=WIDTH, proj_channels=WIDTH, num_queries=8, num_layers=2, row_dim=4).double().eval()
    # by the order of the weights, which both modules create alike
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    patches = case.outputs["patch_features"]
    grid = patches.transpose(1, 2).unflatten(2, (4, 4))
    with torch.no_grad():
        own = ours(TokenMap(prefix=patches[:, :0], patches=patches))
        # theirs has the queries' channels in the place of rows
        own = F.normalize(own.unflatten(1, (4, WIDTH)).transpose(1, 2).flatten(1), dim=-1)
        found = theirs(grid)[0]
    yield _norms("BoQ", "Bag-of-Queries src/boq.py", own, found, "outputs normalised, channels before rows")


def _norms(ours: str, theirs: str, own: Tensor, found: Tensor, note: str) -> Row:
    """Vectors as their sums of absolute values; the note has the largest difference of an element."""
    largest = float((own - found).abs().max())
    return Row(
        ours=ours,
        theirs=theirs,
        our_value=float(own.abs().sum()),
        their_value=float(found.abs().sum()),
        note=f"{note}; sums of absolute values, largest difference {largest:.1e}",
    )


AUTHORS: dict[str, Callable[[Case, ModuleType], Iterator[Row]]] = {
    "DreamLIP/open_clip/loss.py": dreamlip_rows,
    "simpool/sp.py": simpool_rows,
    "Bag-of-Queries/src/boq.py": boq_rows,
}
"""The file of each repository that is run, and what it is compared with."""


def run(arguments: Arguments) -> None:
    """Compare with what is there, show."""
    case = random_case()
    rows = list(open_clip_rows(case))
    if arguments.packages:
        with _packages(arguments.packages):
            rows += lightly_rows(case)
    for path, compare in AUTHORS.items():
        if arguments.code and (arguments.code / path).is_file():
            rows += compare(case, _load(arguments.code / path))
    if arguments.json:
        show_json([vars(row) for row in rows])
        return
    shown: list[list[object]] = []
    for row in rows:
        shown.append([row.ours, row.theirs, f"{row.our_value:.10f}", f"{row.their_value:.10f}", row.note])
    show_table(["ours", "theirs", "our value", "their value", ""], shown)


@contextmanager
def _packages(folder: Path) -> Iterator[None]:
    if not (folder / "lightly").is_dir():
        raise UsageError(f"{folder} holds no package lightly; pip install --no-deps --target {folder} lightly")
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
