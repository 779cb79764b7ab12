"""`vlm` with the benchmark's networks registered by name: `vlm_trainer.py MODELS VERB …`.

MODELS: folder of architectures in open_clip's format.
"""

import sys

import open_clip

from vlm.cli.main import main

if __name__ == "__main__":
    open_clip.add_model_config(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
