import os
import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, torch
from vlm.train.session import keep_freed_memory
is_kept = keep_freed_memory()
for _ in range(3):
    torch.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8 << 20)
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )
    is_kept, faults = done.stdout.split()
    return is_kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_freed_memory_is_used_again():
    is_kept, faults = page_faults()
    assert is_kept == "True"
    assert faults < 20 * 8192 / 2  # a tensor has 8,192 pages, of which the kernel may reclaim some meanwhile


def test_settings_of_the_environment_stay():
    is_kept, faults = page_faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert is_kept == "False"
    assert platform.libc_ver()[0] != "glibc" or faults > 20 * 8192 / 2
