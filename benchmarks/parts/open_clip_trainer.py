"""open_clip's trainer as it is, with the benchmark's networks known by name: `open_clip_trainer.py MODELS …`.

MODELS: folder of architectures in open_clip's format.
"""

import sys

import open_clip
from open_clip_train.main import main

if __name__ == "__main__":
    open_clip.add_model_config(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
