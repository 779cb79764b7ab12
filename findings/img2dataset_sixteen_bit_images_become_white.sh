#!/usr/bin/env bash
# img2dataset 1.47.0 (with opencv-python-headless 4.14.0.94): a PNG of 16 bits a channel, grey or in colour, is stored as a white JPEG,
# with the status "success" and no message. Its values up to 65,535 are cut to 255 where the picture is encoded, not divided by 257.
# skip_reencode changes nothing, as the picture is made smaller. Pillow 12.3.0 opens the same file in colour rightly (one in grey it
# too turns white, in convert("RGB")).
# Why it matters: scans of museums and archives, microscope and satellite pictures and renders are such files; each becomes a white
# square with a detailed caption, and the share of successes is full.
# The cure: drop samples whose stored picture has one colour only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "img2dataset==1.47.0" "opencv-python-headless==4.14.0.94" \
    "albumentations==1.4.24" "pillow==12.3.0" "setuptools<80" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import functools
import http.server
import json
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
from img2dataset import download
from PIL import Image

folder = Path(sys.argv[1])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def main():
    pages = folder / "pages"
    pages.mkdir()
    eight = np.random.default_rng(0).integers(10, 180, (60, 90, 3), dtype=np.uint8)
    eight = cv2.resize(eight, (450, 300), interpolation=cv2.INTER_NEAREST)
    sixteen = eight.astype(np.uint16) * 257
    pictures = {"colour8": eight, "colour16": sixteen, "grey8": eight[..., 1], "grey16": sixteen[..., 1]}
    for name, pixels in pictures.items():
        cv2.imwrite(str(pages / f"{name}.png"), pixels)
    handler = functools.partial(Quiet, directory=str(pages))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = [f"http://127.0.0.1:{server.server_port}/{name}.png" for name in pictures]
    (folder / "addresses.txt").write_text("\n".join(addresses) + "\n")

    means = {}
    for skip in (False, True):
        out = folder / f"out-{skip}"
        download(
            url_list=str(folder / "addresses.txt"),
            output_folder=str(out),
            image_size=128,
            resize_mode="keep_ratio",
            skip_reencode=skip,
            processes_count=1,
            thread_count=4,
        )
        for record in sorted(out.glob("*/*.json")):
            fields = json.loads(record.read_text())
            name = Path(fields["url"]).stem
            stored = np.asarray(Image.open(record.with_suffix(".jpg")).convert("RGB"))
            opened = np.asarray(Image.open(pages / f"{name}.png").convert("RGB"))
            print(
                f"skip_reencode={skip} {name}: {fields['status']}, stored mean {stored.mean():.0f}, darkest {stored.min()}; "
                f"Pillow's mean of the source {opened.mean():.0f}",
                file=sys.stderr,
            )
            assert fields["status"] == "success" and fields["error_message"] is None
            means[skip, name] = stored.mean()
    assert len(means) == 8
    for (_, name), mean in means.items():
        assert mean > 254 if name.endswith("16") else 60 < mean < 130


if __name__ == "__main__":
    main()
CODE
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" "$work/seen.py" "$work" 2>&1 >/dev/null | grep -E "stored mean|Error|assert"
