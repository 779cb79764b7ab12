"""Duplicates planted among real photos are all found, and nothing that only resembles them.

All of these photos, that is: of others each kind here misses up to 2 in 1,000 (figures in vlm.data.dedup). Not
promised at all are quality below 50, 5% more contrast, and 5% more brightness, which clips pale products.
"""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vlm.data.pack import PackConfig, pack
from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import ShardReader

# another colour or another print of the same product (fashion), another moment of the same scene (Flickr8k)
ALIKE = {
    "fashion": [("18831", "18829"), ("13382", "13388"), ("17310", "17311"), ("17855", "17856"), ("20562", "20456")],
    "flickr8k": [
        ("384465370_9918873f9a", "384465575_31294122c0"),
        ("186890601_8a6b0f1769", "186890605_ddff5b694e"),
        ("482882719_165722082d", "482882307_7dcb9eee11"),
    ],
}
SHARDS_OF_ALIKE = ["train-00003", "train-00004", "train-00006", "train-00008", "val-00001"]


def encoded(source_image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    source_image.save(file, kind, **({"quality": 90} | options if kind != "PNG" else options))
    return file.getvalue()


def cut(source_image: Image.Image, share: float) -> Image.Image:
    across, down = round(source_image.width * share / 2), round(source_image.height * share / 2)
    return source_image.crop((across, down, source_image.width - across, source_image.height - down))


def scaled(source_image: Image.Image, times: float) -> Image.Image:
    return source_image.resize(
        (round(source_image.width * times), round(source_image.height * times)), Image.Resampling.LANCZOS
    )


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 50": lambda source_image: encoded(source_image, quality=50),
    "quality 85": lambda source_image: encoded(source_image, quality=85),
    "webp": lambda source_image: encoded(source_image, "WEBP", quality=80),
    "png": lambda source_image: encoded(source_image, "PNG"),
    "half": lambda source_image: encoded(scaled(source_image, 0.5)),
    "larger": lambda source_image: encoded(scaled(source_image, 1.7)),
    "brighter": lambda source_image: encoded(ImageEnhance.Brightness(source_image).enhance(1.03)),
    "darker by 5%": lambda source_image: encoded(ImageEnhance.Brightness(source_image).enhance(0.95)),
    "more contrast": lambda source_image: encoded(ImageEnhance.Contrast(source_image).enhance(1.03)),
    "cut by 2%": lambda source_image: encoded(cut(source_image, 0.02)),
}
OTHERS: dict[str, Callable[[Image.Image], bytes]] = {
    "mirrored": lambda source_image: encoded(source_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "cut by 20%": lambda source_image: encoded(cut(source_image, 0.2)),
    "grey": lambda source_image: encoded(source_image.convert("L").convert("RGB")),
    "red and blue swapped": lambda source_image: encoded(Image.merge("RGB", source_image.split()[::-1])),
}
NEED_COLOUR = {"grey", "red and blue swapped"}


def is_colourful(source_image: Image.Image) -> bool:
    grey = np.asarray(source_image.convert("L").convert("RGB"), dtype=np.float64)
    return float(np.abs(np.asarray(source_image) - grey).mean()) > 10


def photos_of(name, datasets, every) -> dict[str, bytes]:
    """Some photos by key, those of `ALIKE` among them."""
    named = {key for pair in ALIKE[name] for key in pair}
    if name == "fashion":
        source = open_source(str(datasets / "fashion" / "fashion.tar"), SourceOptions())
        keys = [source.read(number).key for number in range(len(source))]
        wanted = [n for n, key in enumerate(keys) if n % every == 0 or key in named]
        return {keys[number]: source.read(number).image for number in wanted}
    found = {}
    for shard in SHARDS_OF_ALIKE:
        reader = ShardReader(str(datasets / "flickr8k" / f"{shard}.tar"))
        for number, key in enumerate(reader.index.sample_keys()):
            if number % every == 0 or key in named:
                found[key] = reader.read(number).image
        reader.close()
    return found


@pytest.mark.parametrize(("name", "every"), [("fashion", 200), ("flickr8k", 50)])
def test_all_planted_duplicates_are_found_and_no_near_miss(name, every, datasets, make_shard, apply):
    photos = photos_of(name, datasets, every)
    assert {key for pair in ALIKE[name] for key in pair} <= set(photos)
    samples = [{"key": key, "image": image} for key, image in photos.items()]
    for key, image in photos.items():
        source_image = Image.open(io.BytesIO(image)).convert("RGB")
        copies = {what: make(source_image) for what, make in COPIES.items()} | {"bytes": image}
        others = {
            what: make(source_image)
            for what, make in OTHERS.items()
            if what not in NEED_COLOUR or is_colourful(source_image)
        }
        for what, data in copies.items():
            samples.append({"key": f"{key} copy {what}", "image": data})
        for what, data in others.items():
            samples.append({"key": f"{key} other {what}", "image": data})
    curated = apply(make_shard(samples), "near-duplicates")
    keys = [sample["key"] for sample in samples]
    result = curated.steps[0].result
    assert result.duplicates_of is not None
    kept = {position: position if twin < 0 else int(twin) for position, twin in enumerate(result.duplicates_of)}
    groups: dict[int, set[str]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(kept[position], set()).add(key)
    expected = [{key, *(f"{key} copy {what}" for what in [*COPIES, "bytes"])} for key in photos]
    found = sorted(map(sorted, (group for group in groups.values() if len(group) > 1)))
    assert found == sorted(map(sorted, expected))
    assert all(keys[position].endswith("larger") for position in groups if len(groups[position]) > 1)


@pytest.mark.parametrize("what", COPIES)
@pytest.mark.parametrize(("name", "every"), [("fashion", 200), ("flickr8k", 50)])
def test_a_copy_is_found_without_other_copies_that_lead_to_it(name, every, what, datasets, make_shard, apply):
    photos = photos_of(name, datasets, every)
    copies = {
        f"{key} copy": COPIES[what](Image.open(io.BytesIO(image)).convert("RGB")) for key, image in photos.items()
    }
    samples = [{"key": key, "image": image} for key, image in (photos | copies).items()]
    step = apply(make_shard(samples), "near-duplicates").steps[0]
    assert step.result.duplicates_of is not None
    found = {frozenset((position, int(twin))) for position, twin in enumerate(step.result.duplicates_of) if twin >= 0}
    assert found == {frozenset((position, position + len(photos))) for position in range(len(photos))}


@pytest.mark.slow
def test_the_natural_duplicates_of_flickr8k_are_the_one_pair_there_is(datasets, apply):
    curated = apply(sorted((datasets / "flickr8k").glob("*.tar")), "near-duplicates")
    assert (curated.selection.samples, curated.selection.kept) == (7000, 6999)


@pytest.mark.slow
def test_the_natural_duplicates_of_fashion_were_looked_at_and_are_true(datasets, tmp_path, apply):
    pack(open_source(str(datasets / "fashion" / "fashion.tar"), SourceOptions()), tmp_path / "fashion", PackConfig())
    curated = apply(sorted((tmp_path / "fashion").glob("*.tar")), "exact-duplicates", "near-duplicates")
    assert [step.dropped for step in curated.steps] == [118, 2]
