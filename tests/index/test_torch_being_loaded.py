"""Searches in one thread while another one loads torch, as a service does at its start."""

import subprocess
import sys

TORCH = """
import time
time.sleep(0.5)
import numpy
class Numbers:
    def __init__(self, rows): self.rows = rows
    def float(self): return Numbers(self.rows.astype(numpy.float32))
    def numpy(self): return self.rows
from_numpy = Numbers
"""

SCRIPT = """
import sys, threading, time
import numpy as np
from vlm.index.ann.faiss_search import to_float32
assert "torch" not in sys.modules
sys.path.insert(0, sys.argv[1])
loading = threading.Thread(target=lambda: __import__("torch"))
loading.start()
while "torch" not in sys.modules: time.sleep(0.001)
assert to_float32(np.array([0.5], np.float16)).tolist() == [0.5]
loading.join()
"""


def test_torch_in_the_middle_of_being_loaded_is_waited_for(tmp_path):
    (tmp_path / "torch.py").write_text(TORCH, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
