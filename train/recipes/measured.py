"""Bands measured with this code, as `python -m vlm.train.recipes.measure` prints them."""

from vlm.train.recipes.bands import Band

MEASURED: dict[str, tuple[Band, ...]] = {
    "tiny": (
        Band(
            metric="loss",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 2.443, 3.206),
                (0.2, 1.977, 2.595),
                (0.3, 1.744, 2.289),
                (0.4, 1.555, 2.04),
                (0.5, 1.331, 1.747),
                (0.6, 1.299, 1.704),
                (0.7, 1.23, 1.614),
                (0.8, 1.152, 1.511),
                (0.9, 1.148, 1.507),
                (1.0, 1.041, 1.366),
            ),
        ),
        Band(
            metric="text_to_image_recall@1",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 0.03007, 0.3893),
                (0.2, 0.1324, 0.4916),
                (0.3, 0.2067, 0.5659),
                (0.4, 0.2744, 0.6336),
                (0.5, 0.3107, 0.6699),
                (0.6, 0.3717, 0.7309),
                (0.7, 0.4141, 0.7733),
                (0.8, 0.4771, 0.8363),
                (0.9, 0.5194, 0.8786),
                (1.0, 0.5191, 0.8783),
            ),
        ),
        Band(
            metric="image_to_text_recall@1",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 0.04864, 0.3927),
                (0.2, 0.166, 0.51),
                (0.3, 0.2243, 0.5684),
                (0.4, 0.2986, 0.6427),
                (0.5, 0.3583, 0.7024),
                (0.6, 0.4453, 0.7894),
                (0.7, 0.5258, 0.8699),
                (0.8, 0.5753, 0.9194),
                (0.9, 0.603, 0.947),
                (1.0, 0.6196, 0.9637),
            ),
        ),
    ),
    "fashion": (
        Band(
            metric="loss",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 2.795, 2.983),
                (0.2, 1.893, 2.02),
                (0.3, 1.554, 1.658),
                (0.4, 1.309, 1.398),
                (0.5, 1.108, 1.183),
                (0.6, 0.9335, 0.9963),
                (0.7, 0.726, 0.7748),
                (0.8, 0.6006, 0.641),
                (0.9, 0.4934, 0.5266),
                (1, 0.4656, 0.4969),
            ),
        ),
        Band(
            metric="text_to_image_recall@1",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.3806, 0.4868),),
        ),
        Band(
            metric="text_to_image_recall@10",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.7473, 0.9253),),
        ),
        Band(
            metric="image_to_text_recall@10",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.691, 0.8156),),
        ),
    ),
}
"""By the name of the recipe."""
