#!/usr/bin/env python
"""Build every named backbone, train it for one step, save, load and embed with it; write docs/towers.md.

benchmarks/run towers [PATTERN]    (with a pattern, only the matching towers are run, and printed instead of written)
"""

import fnmatch
import gc
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "towers.md"
SIZES = (96, 128)
BATCH = 4
TEXTS = ("a small red circle", "two blue stars", "a green square on white", "three yellow triangles")


@dataclass(frozen=True)
class Family:
    """A backbone of a paper by its smallest registered name; note: remark on the overrides, for the table."""

    paper: str
    tower: str
    overrides: dict[str, Any] = field(default_factory=dict)
    note: str = ""


FAMILIES = (
    Family("A ConvNet for the 2020s (ConvNeXt)", "timm:convnext_zepto_rms"),
    Family("Swin Transformer", "timm:swin_tiny_patch4_window7_224"),
    Family("Swin Transformer V2", "timm:swinv2_cr_tiny_224"),
    Family("Swin Transformer V2, timm's own", "timm:swinv2_tiny_window8_256"),
    Family("Searching the Search Space of Vision Transformer (S3)", "timm:swin_s3_tiny_224"),
    Family("CrossViT", "timm:crossvit_tiny_240"),
    Family("Transformer in Transformer", "timm:tnt_s_patch16_224"),
    Family("VOLO", "timm:volo_d1_224"),
    Family("Learning Transferable Architectures (NASNet)", "timm:nasnetalarge"),
    Family("Scaling Local Self-Attention (HaloNet)", "timm:halonet_h1"),
    Family("Bottleneck Transformers (BoTNet)", "timm:botnet26t_256"),
    Family("MaxViT", "timm:maxvit_pico_rw_256"),
    Family("FBNet", "timm:fbnetc_100"),
    Family("Single-Path NAS", "timm:spnasnet_100"),
    Family("MnasNet", "timm:mnasnet_small"),
    Family("GhostNetV2", "timm:ghostnetv2_100"),
    Family("Focal Modulation Networks", "timm:focalnet_tiny_srf"),
    Family("MetaFormer Is Actually What You Need (PoolFormer)", "timm:poolformer_s12"),
    Family("MetaFormer Baselines: CAFormer", "timm:caformer_s18"),
    Family("MetaFormer Baselines: ConvFormer", "timm:convformer_s18"),
    Family("MetaFormer Baselines: PoolFormerV2", "timm:poolformerv2_s12"),
    Family("Global Context Vision Transformers", "timm:gcvit_xxtiny"),
    Family("Revisiting ResNets (ResNet-RS)", "timm:resnetrs50"),
    Family("Fast and Accurate Model Scaling (RegNetZ)", "timm:regnetz_005"),
    Family("InceptionNeXt", "timm:inception_next_atto"),
    Family("EdgeNeXt", "timm:edgenext_xx_small"),
    Family("Next-ViT", "timm:nextvit_small"),
    Family("Rethinking Spatial Dimensions (PiT)", "timm:pit_ti_224"),
    Family("RepViT", "timm:repvit_m1"),
    Family("MobileViT", "timm:mobilevit_xxs"),
    Family("TinyViT", "timm:tiny_vit_5m_224"),
    Family("Going deeper with Image Transformers (CaiT)", "timm:cait_xxs24_224"),
    Family("Patches Are All You Need? (ConvMixer)", "timm:convmixer_768_32"),
    Family("Visformer", "timm:visformer_tiny"),
    Family("Scaling Vision Transformers (ViT-g)", "timm:vit_giant_patch14_224", {"depth": 2}, "2 of its 40 layers"),
    Family("PVT v2", "timm:pvt_v2_b0"),
    Family("Sequencer", "timm:sequencer2d_s"),
    Family("LeViT", "timm:levit_128s"),
    Family("LeViT, with convolutions", "timm:levit_conv_128s"),
    Family("MLP-Mixer", "timm:mixer_s32_224"),
    Family("DeiT", "timm:deit_tiny_patch16_224"),
    Family("DeiT, distilled", "timm:deit_tiny_distilled_patch16_224"),
    Family("DeiT III", "timm:deit3_small_patch16_224"),
    Family("An Image is Worth 16x16 Words (ViT)", "timm:vit_tiny_patch16_224"),
    Family("XCiT", "timm:xcit_nano_12_p16_224"),
    Family("Three things everyone should know about ViTs", "timm:vit_small_patch16_18x2_224"),
    Family("Vision Transformers Need Registers", "timm:vit_dwee_patch16_reg1_gap_256"),
    Family("Patch n' Pack (NaViT)", "timm:naflexvit_base_patch16_gap", {"depth": 2}, "2 of its 12 layers"),
    Family("CvT", "hf:cvt"),
    Family("Pyramid Vision Transformer", "hf:pvt"),
    Family("Dilated Neighborhood Attention Transformer", "hf:dinat"),
)


def main() -> None:
    """Try the families one by one, then write the page."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    lines: list[str] = []
    for family in FAMILIES:
        if not fnmatch.fnmatch(family.tower, pattern):
            continue
        begun = time.monotonic()
        lines.append(try_family(family))
        gc.collect()
        print(f"{lines[-1]}  [{time.monotonic() - begun:.0f} s]", flush=True)
    if pattern == "*":
        DOCUMENT.write_text(document(lines), encoding="utf-8")


def try_family(family: Family) -> str:
    """Train, save and load one backbone; returns its row of the table."""
    import torch

    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.errors import UsageError
    from vlm.models.model import VisionLanguageModel, fit_to_tokenizer, model_config
    from vlm.models.towers.tower import batch_norm_layers

    tokenizer = open_tokenizer("clip", 16)
    config = fit_to_tokenizer(model_config(f"{family.tower}+bag,width=16@64"), tokenizer)
    config["vision_cfg"] |= {"overrides": family.overrides} if family.overrides else {}
    own_size = config["vision_cfg"]["image_size"]
    try:
        network, size = build_small(config, own_size)
    except UsageError as error:
        return f"| {family.paper} | `{family.tower}` | – | not built: {str(error)[:90]}… | | | | | |"
    model = VisionLanguageModel(
        name=family.tower, network=network, config=config, view=EvalTransform(size=size), tokenizer=tokenizer
    )
    images = torch.randint(0, 255, (BATCH, 3, size, size), dtype=torch.uint8)
    before, after = one_step(model, images)
    tower: Any = network.visual
    parameters = sum(parameter.numel() for parameter in tower.trunk.parameters()) / 1e6
    layout = "; ".join(map(str, tower.trunk_info.layouts))
    norms = "yes" if batch_norm_layers(network) else "no"
    note = f" ({family.note})" if family.note else ""
    checked = embedding_check(model, images)
    return (
        f"| {family.paper} | `{family.tower}`{note} | {size} of {own_size} | {layout} | {tower.width} | "
        f"{parameters:.1f} | {norms} | {before:.3f} → {after:.3f} | {checked} |"
    )


def build_small(config: dict[str, Any], own_size: int) -> tuple[Any, int]:
    """The network at the smallest of 96, 128 and its own resolution that it supports; the config gets that size."""
    import torch

    from vlm.errors import UsageError
    from vlm.models.model import build_network

    sizes = [size for size in SIZES if size < own_size] + [own_size]
    if "giant_patch14" in config["vision_cfg"]["tower"]:
        sizes = [112, own_size]
    for size in sizes:
        config["vision_cfg"]["image_size"] = size
        torch.manual_seed(0)
        try:
            return build_network(config), size
        except UsageError:
            if size == own_size:
                raise
    raise AssertionError("the tower's own resolution was tried last")


def one_step(model: Any, images: Any) -> tuple[float, float]:
    """CLIP loss on a batch before and after one AdamW step on it, in training mode."""
    import torch
    from torch.nn import functional as F

    from vlm.models.model import normalise

    network = model.network.train()
    tokens = torch.from_numpy(model.tokenizer.encode(TEXTS))
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=1e-5)

    def loss() -> torch.Tensor:
        outputs = network(normalise(images, model.view), tokens)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        matching = torch.arange(BATCH)
        return (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2

    first = loss()
    first.backward()
    idle = [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None]
    assert not idle, f"no gradient for {idle}"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        second = float(loss())
    assert math.isfinite(second)
    network.eval()
    return float(first.detach()), second


def embedding_check(model: Any, images: Any) -> str:
    """Whether a saved folder, loaded twice, yields the same unit vectors."""
    import torch

    from vlm.models.load import load_model_folder, save_model_folder

    expected = model.embed_images(images)
    assert torch.allclose(expected.norm(dim=1), torch.ones(BATCH), atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        save_model_folder(Path(folder), model, inputs={})
        for _ in range(2):
            loaded = load_model_folder(Path(folder), torch.device("cpu"), torch.float32)
            assert loaded.network.training is False
            difference = float((loaded.embed_images(images) - expected).abs().max())
            if difference > 1e-5:
                return f"differs by {difference:.1e}"
    return "ok"


def document(lines: list[str]) -> str:
    """The content of docs/towers.md."""
    head = """# Backbones

Written by `benchmarks/run towers`: one tower per backbone paper, by the smallest registered name, with a bag-of-words
text encoder. Each is built with random weights at the smallest of 96 pixels, 128 and its own resolution
that it supports; trained for one AdamW step (learning rate 1e-5, CLIP loss, a batch of 4 noise images, training mode);
saved and loaded twice; the embeddings of both copies must agree with the original's to 1e-5. Every trained weight had a
gradient. The loss only shows that a step runs; after one step on noise it may rise. The learning rate is 1e-5 because
the loss of three of eight towers rose at 1e-4.

Pixels: input resolution used, of the tower's own. Features: layout of the trunk's output; tokens are written prefix +
patches × width. Width: size of the vector after the trunk's own pooling. BN: whether the tower has batch normalisation,
with which micro-batches differ from the whole batch.

| paper | tower | pixels | features | width | parameters (M) | BN | loss, one step | embeddings |
|---|---|---|---|---|---|---|---|---|
"""
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
