"""The one compiled module; all else stands in `pyproject.toml`.

Without a C compiler, or on another processor, it is left out, and torch resizes as it does anyway. So it is for a
Python without a global lock, which has no limited API: setuptools refuses to name such a wheel.
"""

import platform
import sysconfig

from setuptools import Extension, setup

FILTER = Extension(
    "vlm.data.antialias",
    ["data/antialias.c"],
    # one build serves Python 3.11 and all later ones
    py_limited_api=True,
    optional=True,
    extra_compile_args=[] if platform.system() == "Windows" else ["-O3"],
)

if platform.machine() in ("x86_64", "AMD64") and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    setup(ext_modules=[FILTER], options={"bdist_wheel": {"py_limited_api": "cp311"}})
else:
    setup()
