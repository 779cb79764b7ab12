"""Each recipe: its data, its commands, what is expected of it and where that figure is from."""

from dataclasses import dataclass

from vlm.config import choose
from vlm.train.recipes.bands import Band
from vlm.train.recipes.measured import MEASURED

ZERO_SHOT = "zero_shot_top1"
_IMAGENET = "vlm eval RUN --classes imagenet/val --out RUN/evaluation"
_TO_SHARDS = "--output_format webdataset --image_size 256 --resize_mode keep_ratio_largest"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A preset with everything around it.

    preset: its name in `PRESETS`. data: what it is trained on. prepare: commands that bring the data into shape, where
    it is ours to bring. train: the command. evaluate: the command whose figure is compared, where the run itself does
    not measure it. remarks: where we differ from what was published.
    """

    preset: str
    data: str
    prepare: tuple[str, ...]
    train: str
    evaluate: str = ""
    bands: tuple[Band, ...]
    remarks: str = ""


def published(low: float, high: float, source: str) -> tuple[Band, ...]:
    """The band of a figure others published: zero-shot top-1 on ImageNet's validation pictures at the end."""
    return (Band(metric=ZERO_SHOT, kind="published", source=source, points=((1.0, low, high),)),)


def find_recipe(name: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        UsageError: there is none of that name; the nearest is named.
    """
    return choose(RECIPES, name, "recipe")


def _ours(preset: str, *, data: str, prepare: tuple[str, ...], options: str, remarks: str = "") -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=prepare,
        train=f"vlm train {preset} {options} --run runs/{preset}",
        bands=MEASURED.get(preset, ()),
        remarks=remarks,
    )


def _web(
    preset: str, *, data: str, shards: str, prepare: str = "", options: str = "", bands: tuple[Band, ...], remarks: str
) -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=(prepare,) if prepare else (),
        train=f"accelerate launch -m vlm train {preset} --data '{shards}'{options} --run runs/{preset}",
        evaluate=_IMAGENET,
        bands=bands,
        remarks=remarks,
    )


_SCENE_SHARDS = (
    "vlm pack scenes shards/train --scenes.number 16000",
    "vlm pack scenes shards/val --scenes.split val --scenes.number 1000 --scenes.is-distinct",
    "vlm tokenizer train shards/train words.model --vocabulary 256 --languages en",
)
_SCENE_OPTIONS = "--data shards/train --val shards/val --tokenizer words.model"
_SPLIT_OPTIONS = "--data 'shards/train-*.tar' --val 'shards/val-*.tar' --tokenizer words.model"

RECIPES: dict[str, Recipe] = {
    recipe.preset: recipe
    for recipe in (
        _ours("tiny", data="16,000 drawn scenes", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _ours("tiny-coca", data="16,000 drawn scenes", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _ours(
            "fashion",
            data="8,383 product photos with titles, 1,000 held out",
            prepare=(
                "vlm pack fashion.tar shards --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 2048",
            ),
            options=_SPLIT_OPTIONS,
        ),
        _ours(
            "flickr8k",
            data="Flickr8k: 6,000 photos with five captions each, 1,000 held out",
            prepare=("vlm tokenizer train 'flickr8k/train-*.tar' words.model --vocabulary 4096 --languages en",),
            options="--data 'flickr8k/train-*.tar' --val 'flickr8k/val-*.tar' --tokenizer words.model",
        ),
        _ours(
            "emoji",
            data="8,038 emoji drawings of three vendors, names in twelve languages, 1,000 held out",
            prepare=(
                "vlm pack emoji.tar shards --caption-column names --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 8000",
            ),
            options=_SPLIT_OPTIONS,
            remarks="A name stands for one drawing of each vendor; the pack holds out all of them together.",
        ),
        _web(
            "cc3m",
            data="Conceptual Captions: 3.3 million pairs, of which some links are dead",
            prepare=f"img2dataset --url_list cc3m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc3m",
            shards="cc3m/{00000..00331}.tar",
            bands=published(0.158, 0.185, "ViT-B/16: 17.1% SLIP's README, 15.8% LaCLIP's; RN50: 18.5% open_clip#448"),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 2.9 million pairs an epoch. "
            "SLIP decays to 1e-5 and does not cut the gradient, we decay to zero and cut at 1.",
        ),
        _web(
            "cc12m",
            data="Conceptual 12M, of which about 10.7 million pairs are left",
            prepare=f"img2dataset --url_list cc12m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc12m",
            shards="cc12m/{00000..01242}.tar",
            bands=published(0.365, 0.402, "ViT-B/16: 36.5% SLIP's README, 40.2% LaCLIP's (other settings)"),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 10.7 million pairs an epoch. "
            "SLIP decays to 1e-5 and does not cut the gradient, we decay to zero and cut at 1.",
        ),
        _web(
            "datacomp-small",
            data="CommonPool small: 12.8 million pairs, or what a filter leaves of them",
            prepare="python download_upstream.py --scale small --data_dir datacomp-small  # mlfoundations/datacomp",
            shards="datacomp-small/shards/*.tar",
            bands=published(0.025, 0.051, "2.5% unfiltered, 5.1% by CLIP score: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The filter decides.",
        ),
        _web(
            "datacomp-medium",
            data="CommonPool medium: 128 million pairs, or what a filter leaves of them",
            prepare="python download_upstream.py --scale medium --data_dir datacomp-medium  # mlfoundations/datacomp",
            shards="datacomp-medium/shards/*.tar",
            bands=published(0.176, 0.297, "17.6% unfiltered, 29.7% DataComp's filter: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The filter decides.",
        ),
        _web(
            "laion",
            data="LAION-400M",
            shards="laion400m/{00000..41407}.tar",
            options=" --micro-batch 256",
            bands=published(0.62, 0.63, "62.96% open_clip's PRETRAINED.md, 62.0% LaCLIP's README"),
            remarks="Batch and epochs of PRETRAINED.md, the rest as in the CLIP paper (so open_clip#100 says). "
            "Shards that are gone since 2021 shorten the epochs.",
        ),
        _web(
            "lit",
            data="CC12M; the published model saw CC12M and YFCC100M",
            shards="cc12m/{00000..01242}.tar",
            options=" --start-from MODEL",
            bands=published(0.721, 0.757, "72.1% LiT-B16B, 75.7% LiT-L16L: model card (Zhai et al. 2022)"),
            remarks="Rate and batch of big_vision's lit_coco.py; decay and length are ours. Both towers start from "
            "MODEL, whose image tower stays as it is; the published ones started from ViT on ImageNet-21k and BERT. So "
            "the figure is a yardstick rather than a promise: it depends on MODEL.",
        ),
        _web(
            "coca",
            data="LAION-2B (English)",
            shards="laion2b/{000000..231349}.tar",
            options=" --micro-batch 256",
            bands=published(0.628, 0.638, "63.3% ± 0.5 assumed, coca_ViT-B-32 laion2b_s13b_b90k: openclip_results.csv"),
            remarks="Batch and samples seen are in the name of the published weights; rate, warm-up and beta2 are "
            "those of DataComp's xlarge scale, which has the same batch, since CoCa's were not published.",
        ),
    )
}
"""By the name of the preset."""
