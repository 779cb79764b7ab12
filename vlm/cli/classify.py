"""Classify pictures into classes named on the spot: vlm classify MODEL cat.jpg --classes cat,dog,car."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import bar, show_json, show_table
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm classify`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, or open_clip NAME:WEIGHTS."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Picture files."""

    classes: str
    """Candidate classes: a,b,c or a file with one a line."""

    templates: tuple[str, ...] = ()
    """Sentences with {} for the class name; empty takes three common ones."""

    top: int = 5
    """Classes shown for each picture."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Probabilities of the classes for each picture: softmax of scaled cosines (CLIP §3.1.2)."""
    import torch

    from vlm.cli.eval import read_names
    from vlm.data.transforms import load_images
    from vlm.evaluation.zero_shot import DEFAULT_TEMPLATES, class_embeddings
    from vlm.models.load import load_model

    names = read_names(arguments.classes)
    if len(names) < 2:
        raise UsageError(f"--classes {arguments.classes!r} names {len(names)} class; give at least two, as a,b,c.")
    model = load_model(arguments.model, device=arguments.device)
    images = load_images(arguments.images, model.view)
    classifier = torch.from_numpy(class_embeddings(model, names, arguments.templates or DEFAULT_TEMPLATES))
    shares = (model.logit_scale * model.embed_images(images) @ classifier.T).softmax(dim=-1)
    results = []
    for path, row in zip(arguments.images, shares.tolist(), strict=True):
        ranked = sorted(zip(names, row, strict=True), key=lambda entry: -entry[1])[: arguments.top]
        results.append({"image": str(path), "classes": [{"name": n, "probability": p} for n, p in ranked]})
    if arguments.json:
        show_json(results)
        return
    for result in results:
        rows = [[entry["name"], entry["probability"], bar(entry["probability"])] for entry in result["classes"]]
        show_table(["class", "probability", ""], rows, title=result["image"])
