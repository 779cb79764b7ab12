"""clip-retrieval's side of the serving benchmark, in its own environment: its back on an exported index."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Serve as configured by the request, a line of JSON that is the only argument."""
    request = json.loads(sys.argv[1])
    from open_clip.factory import add_model_config

    add_model_config(Path(request["config"]))
    from clip_retrieval.clip_back import clip_back

    clip_back(
        indices_paths=request["indices"],
        port=request["port"],
        clip_model=f"open_clip:{Path(request['config']).stem}/{request['weights']}",
        use_jit=False,
        enable_mclip_option=False,
        provide_aesthetic_embeddings=False,
        enable_faiss_memory_mapping=False,
    )


if __name__ == "__main__":
    main()
