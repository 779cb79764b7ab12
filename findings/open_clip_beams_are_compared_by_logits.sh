#!/usr/bin/env bash
# open_clip 3.3.0 with transformers 4.56.2, CoCa.generate, beam search (its default): beams are compared by the sum of raw logits,
# without a log-softmax, so that the caption returned is the one with the greatest sum of logits, and often not the most probable
# one. Of twelve tiny random models with 64 beams over 2,744 captions of four tokens, all twelve give the greatest sum of logits;
# six of them give a caption that is less probable than another, once 0.8% where another has 38%.
# Why it matters: a logit says nothing across steps, as each step may have another constant; more beams do not bring the better
# caption nearer, and scores of captions by probability (reranking, a threshold) disagree with the order of the beams.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "torch==2.13.0" "numpy<3" "pillow<13" 2>/dev/null
"${pip[@]}" --no-deps "torchvision==0.28.0" "open_clip_torch==3.3.0" "timm==1.0.31" 2>/dev/null
"${pip[@]}" "transformers==4.56.2" ftfy 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import itertools
import math
import sys

import torch

try:
    import torchvision
except RuntimeError:  # a CPU build of torch beside torchvision's usual wheel; none of its compiled operators is used here
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from open_clip.coca_model import CoCa

VOCABULARY, LENGTH, PAD, START, END = 8, 5, 0, 1, 2
text = {"context_length": 8, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1}
vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "output_tokens": True}
pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
inner = [token for token in range(VOCABULARY) if token != END]
tails = itertools.product(*[inner] * (LENGTH - 2), range(VOCABULARY))
every_caption = torch.tensor([(START, *tail) for tail in tails])


@torch.no_grad()
def compare(seed):
    """Of the caption that beam search gives: its place by sum of logits and by probability, its probability, and the greatest."""
    torch.manual_seed(seed)
    model = CoCa(16, text, text | {"embed_cls": True, "output_tokens": True}, vision | pooled, pad_id=PAD)
    model.text_decoder.text_projection.normal_()  # which open_clip leaves uninitialised
    image = torch.randn(1, 3, 16, 16)
    tokens = {"sot_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    lengths = {"seq_len": LENGTH, "min_seq_len": LENGTH - 1, "max_seq_len": LENGTH}
    [caption] = model.eval().generate(image, num_beams=64, num_beam_groups=1, **lengths, **tokens)
    logits = model(image.expand(len(every_caption), -1, -1, -1), every_caption, output_labels=False)["logits"][:, :-1]
    next_tokens = every_caption[:, 1:, None]
    by_logits = logits.gather(2, next_tokens).sum((1, 2))
    by_probability = logits.log_softmax(-1).gather(2, next_tokens).sum((1, 2))
    [place] = (every_caption == caption).all(1).nonzero().flatten().tolist()
    ranks = [int((scores > scores[place] + 1e-4).sum()) + 1 for scores in (by_logits, by_probability)]
    return *ranks, math.exp(by_probability[place]), math.exp(by_probability.max())


outcomes = [compare(seed) for seed in range(12)]
for seed, (logit_rank, rank, probability, greatest) in enumerate(outcomes):
    print(f"seed {seed}: place {logit_rank} by logits, {rank} by probability ({probability:.3f}; the best {greatest:.3f})")
assert all(logit_rank == 1 for logit_rank, *_ in outcomes), "beams are no longer compared by logits"
assert sum(rank > 1 for _, rank, *_ in outcomes) >= 4, "the beams are the most probable captions now"
assert max(greatest / probability for *_, probability, greatest in outcomes) > 10
CODE
"$work/venv/bin/python" "$work/seen.py" 2>/dev/null
