#!/usr/bin/env bash
# open_clip 3.3.0, ClipLoss on several processes under DDP (torch 2.13.0): with the trainer's defaults (neither --local-loss nor
# --gather-with-grad) the gradient of the towers is the true one, that of the whole batch on one process, divided by the number of
# processes; the temperature's is whole. 24 pairs give 0.500 of it on two processes and 0.250 on four, in the true direction.
# --local-loss alone gives 0.507 on two and on four, in another direction (cosine 0.978). With --gather-with-grad the gradient is
# whole. The loss that is logged is the same in all cases.
# Why it matters: AdamW hides the factor, but its epsilon does not, nor does SGD; --grad-clip-norm, the temperature's part of that norm,
# and a threshold for spikes mean something else on eight GPUs than on one. The cure: --gather-with-grad (with --local-loss for memory).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy<3" 2>/dev/null
# without torchvision: its loss and its trainer's options are modules that need torch alone
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "open_clip_torch==3.3.0" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import importlib.util
import sysconfig

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel


def module(path):
    spec = importlib.util.spec_from_file_location("module", f"{sysconfig.get_path('purelib')}/{path}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


ClipLoss = module("open_clip/loss.py").ClipLoss
defaults = module("open_clip_train/params.py").parse_args([])
assert not defaults.local_loss and not defaults.gather_with_grad


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
        self.temperature = torch.nn.Parameter(torch.tensor(2.6593))

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), self.temperature.exp()


dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
drawn = torch.Generator().manual_seed(1)
images, texts = (torch.randn(24, 32, generator=drawn) for _ in range(2))
texts += images @ torch.randn(32, 32, generator=drawn) * 0.2
whole = TwoTowers()
whole_loss = ClipLoss()(*whole(images, texts))
whole_loss.backward()
mine = slice(rank * 24 // processes, (rank + 1) * 24 // processes)
for local, gathered in ((False, False), (True, False), (False, True), (True, True)):
    wrapped = DistributedDataParallel(TwoTowers())
    loss = ClipLoss(local_loss=local, gather_with_grad=gathered, rank=rank, world_size=processes)(
        *wrapped(images[mine], texts[mine])
    )
    loss.backward()
    logged = loss.detach().clone()
    dist.all_reduce(logged)
    towers, true = (
        torch.cat([each.image.weight.grad.flatten(), each.text.weight.grad.flatten()]) for each in (wrapped.module, whole)
    )
    share, cosine = float(towers.norm() / true.norm()), float(F.cosine_similarity(towers, true, dim=0))
    temperature = float(wrapped.module.temperature.grad / whole.temperature.grad)
    if rank == 0:
        print(
            f"{processes} processes, local_loss={local}, gather_with_grad={gathered}: towers {share:.3f} of the true gradient, "
            f"cosine {cosine:.3f}; temperature {temperature:.3f}; loss {float(logged) / processes:.4f} ({float(whole_loss):.4f})",
            flush=True,
        )
    assert abs(temperature - 1) < 1e-3 and abs(float(logged) / processes - float(whole_loss)) < 1e-3
    if gathered:
        assert abs(share - 1) < 1e-3 and cosine > 0.9999
    elif local:
        assert share < 0.6 and cosine < 0.98
    else:
        assert abs(share - 1 / processes) < 1e-3 and cosine > 0.9999
dist.destroy_process_group()
CODE
export OMP_NUM_THREADS=1
for processes in 2 4; do
    "$work/venv/bin/torchrun" --nproc-per-node "$processes" --master-port 2966$processes "$work/seen.py" 2>"$work/errors" ||
        { cat "$work/errors"; exit 1; }
done
