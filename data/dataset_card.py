"""The README.md of a folder of shards, by which Hugging Face datasets knows its splits and the type of each column.

Without it `load_dataset` takes the types from the first five samples: it drops what comes later, or fails where a
column is empty in those five. The block between `---` is YAML, of which JSON is a part
(https://huggingface.co/docs/hub/datasets-cards).
"""

import json
from collections.abc import Iterable
from typing import Any

from vlm.data.json_columns import JsonColumns
from vlm.data.tar import IMAGE_EXTENSIONS

CARD = "README.md"
_KEYS = ("__key__", "__url__")


def dataset_card(columns: JsonColumns, *, splits: Iterable[str], endings: Iterable[str], samples: int) -> str:
    """The text of the card. splits: the names before the number of a shard. endings: of the members in all shards.

    The types are left out where a column has none that holds all its values, and where arrays are stored.
    """
    endings = sorted(set(endings))
    # shards that are not split are called shard-*.tar
    data_files = [{"split": "train" if split == "shard" else split, "path": f"{split}-*.tar"} for split in splits]
    card: dict[str, Any] = {"configs": [{"config_name": "default", "data_files": data_files}]}
    json_feature = columns.feature()
    if json_feature is not None and not any(ending.endswith("npy") for ending in endings):
        features: list[dict[str, Any]] = []
        for ending in endings:
            if ending == "json":
                features.append({"name": ending} | json_feature)
            else:
                features.append({"name": ending, "dtype": "image" if ending in IMAGE_EXTENSIONS else "string"})
        features += [{"name": key, "dtype": "string"} for key in _KEYS]
        card["dataset_info"] = {"features": features}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in card.items()]
    parts = ", ".join(endings)
    return "\n".join(
        ["---", *lines, "---", "", f"{samples:,} samples in WebDataset shards ({parts}), written by vlm pack.", ""]
    )
