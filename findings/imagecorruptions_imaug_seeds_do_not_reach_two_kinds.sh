#!/usr/bin/env bash
# imagecorruptions-imaug 1.1.5, corrupt(): thirteen of ImageNet-C's fifteen kinds follow numpy's global generator, so that
# numpy.random.seed repeats them. impulse_noise and glass_blur do not: after the same numpy.random.seed each call gives another
# picture. They are repeated only by an argument seed=, which most other kinds refuse with a TypeError.
# Why it matters: a robustness score is compared between models on the same altered pictures; with one way of seeding for all
# kinds, two runs see different ones in two of them. The cure: seed numpy for every picture, and give these two seed= as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "imagecorruptions-imaug==1.1.5" "numpy<2.5" 2>/dev/null
# the package asks for opencv-python, which needs the system's libGL; the headless build has the same functions
"$work/venv/bin/pip" uninstall --quiet --yes opencv-python 2>/dev/null
"$work/venv/bin/pip" install --quiet --disable-pip-version-check opencv-python-headless 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import numpy as np
from imagecorruptions import corrupt, get_corruption_names

picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def is_repeated(kind, **options):
    """Whether two calls after the same seed of numpy give the same picture."""
    seen = []
    for _ in range(2):
        np.random.seed(7)
        seen.append(corrupt(picture, severity=3, corruption_name=kind, **options))
    return np.array_equal(*seen)


def takes_seed(kind):
    """Whether the kind has an argument seed."""
    try:
        corrupt(picture, severity=3, corruption_name=kind, seed=7)
    except TypeError:
        return False
    return True


kinds = get_corruption_names("common")
not_repeated = [kind for kind in kinds if not is_repeated(kind)]
print("not repeated by numpy.random.seed:", *not_repeated)
refusing = [kind for kind in kinds if not takes_seed(kind)]
print("refuse seed=:", *refusing)
by_both = [kind for kind in not_repeated if is_repeated(kind, seed=7)]
assert sorted(not_repeated) == ["glass_blur", "impulse_noise"], not_repeated
assert by_both == not_repeated, by_both
assert {"gaussian_noise", "shot_noise", "snow"} <= set(refusing), refusing
CODE
"$work/venv/bin/python" "$work/seen.py"
# seen: not repeated by numpy.random.seed: impulse_noise, glass_blur; the other thirteen refuse seed=
