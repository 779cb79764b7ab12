"""Shards as they are written: the bytes that webdataset writes, without loading torch for them."""

import io
import subprocess
import sys
from pathlib import Path

from vlm.data.tar_entries import SampleWriter


def test_the_bytes_are_those_of_webdatasets_writer():
    from webdataset.writer import TarWriter

    samples = [
        {"__key__": "a", "jpg": b"image", "txt": b"caption", "json": b"{}", "depth.npy": b"0" * 600},
        {"__key__": "folder/" + "long" * 60, "png": b"", "json": b'{"n": 1}'},
        {"__key__": "caf\u00e9 \u72d7", "webp": b"x" * 512},
    ]
    ours, theirs = io.BytesIO(), io.BytesIO()
    with SampleWriter(ours) as writer, TarWriter(theirs, encoder=False, mtime=0) as expected:
        for sample in samples:
            writer.write(sample)
            expected.write(sample)
    assert ours.getvalue() == theirs.getvalue()


def test_packing_loads_no_torch(tmp_path: Path):
    pack = "vlm.pack('scenes', out, scenes=vlm.data.sources.source.SceneOptions(number=2))"
    code = f"import sys, vlm, vlm.data.sources.source\nout = sys.argv[1]\n{pack}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)
