#!/usr/bin/env bash
# clip-benchmark 1.6.2, metrics.zeroshot_classification.average_precision_per_class: images of equal score keep the order in which
# they were read. A model that gives every image the same score gets 1.0 where the positives come first and 0.35 where they come
# last; scikit-learn, which takes equal scores together, gives 0.5, the share of positives, for both.
# Also: with NumPy 2.4, accuracy() of the same module raises TypeError ("only 0-dimensional arrays can be converted to Python
# scalars"), as it calls float() on an array of one element; with NumPy 2.3 it answers.
# Why it matters: a diverged or wrongly wired model can look perfect on a set sorted by class, and the same model's figure changes
# when the set is packed in another order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "torch==2.15.0" "numpy==2.4.6" "scikit-learn==1.9.1" tqdm 2>/dev/null
# without its dependencies: the functions of metrics need no more than the above
"${pip[@]}" --no-deps "clip-benchmark==1.6.2" "open_clip_torch==3.3.0" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import importlib.util

import numpy as np
import torch
from sklearn.metrics import average_precision_score

# the module alone: its package imports models and data sets that are not needed here
package = importlib.util.find_spec("clip_benchmark").submodule_search_locations[0]
path = f"{package}/metrics/zeroshot_classification.py"
spec = importlib.util.spec_from_file_location("zeroshot_classification", path)
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)

scores = torch.full((10, 2), 0.5)
first, last = [1] * 5 + [0] * 5, [0] * 5 + [1] * 5
target = torch.tensor([first, last]).T
theirs = [float(value) for value in metrics.average_precision_per_class(scores, target)]
independent = [average_precision_score(target[:, column], scores[:, column]) for column in range(2)]
print("clip_benchmark", [round(value, 3) for value in theirs], "scikit-learn", independent)
assert abs(theirs[0] - 1) < 1e-6 and theirs[1] < 0.4, theirs
assert independent == [0.5, 0.5], independent

if np.__version__.startswith("2.4"):
    try:
        metrics.accuracy(torch.eye(4), torch.arange(4), topk=(1,))
        raise AssertionError("accuracy answers")
    except TypeError as error:
        print("accuracy:", error)
else:
    print("accuracy:", metrics.accuracy(torch.eye(4), torch.arange(4), topk=(1,)))
CODE
"$work/venv/bin/python" "$work/seen.py"
"${pip[@]}" "numpy==2.3.5" 2>/dev/null
"$work/venv/bin/python" "$work/seen.py"
# seen: clip_benchmark [1.0, 0.354], scikit-learn [0.5, 0.5]; accuracy raises with NumPy 2.4.6 and gives [1.0] with 2.3.5
