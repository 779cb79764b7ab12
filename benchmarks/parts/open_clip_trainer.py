"""open_clip's unchanged trainer, with the benchmark's networks registered by name: `open_clip_trainer.py MODELS …`.

MODELS: folder of architectures in open_clip's format.
"""

import sys

import open_clip
from open_clip_train.main import main

if __name__ == "__main__":
    open_clip.add_model_config(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
