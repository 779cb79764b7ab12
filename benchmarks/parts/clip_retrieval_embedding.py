"""clip-retrieval's side of the embedding benchmark, in its own environment: one call of its inference."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Embed as configured by the request, a line of JSON that is the only argument."""
    request = json.loads(sys.argv[1])
    from open_clip.factory import add_model_config

    add_model_config(Path(request["config"]))
    from clip_retrieval import clip_inference

    clip_inference(
        input_dataset=request["shards"],
        output_folder=request["out"],
        input_format="webdataset",
        batch_size=request["batch_size"],
        num_prepro_workers=request["workers"],
        clip_model=f"open_clip:{Path(request['config']).stem}/{request['weights']}",
        use_jit=False,
    )


if __name__ == "__main__":  # its processes that keep statistics import this file again
    main()
