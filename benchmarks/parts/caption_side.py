"""One side of the captioning benchmark: `caption_side.py ours|theirs FOLDER THREADS`.

Reads the ways of decoding from stdin, one a line as JSON, and answers each with its seconds, of the clock and of the
processor, and the rows of tokens.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Rows = list[list[int]]


class LogSoftmaxDecoder(torch.nn.Module):
    """open_clip's decoder with log-probabilities for logits: its beam search sums up what the decoder gives."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token at each place."""
        return self.decoder(*inputs).log_softmax(dim=-1)


def theirs(network: Any, pixels: torch.Tensor, way: dict[str, Any]) -> Rows:
    """open_clip's own `generate`."""
    lengths = {"seq_len": way["length"], "min_seq_len": way["min_length"] - 1}
    if way["beams"] == 1:
        return network.generate(pixels, generation_type="top_k", top_k=1, **lengths).tolist()
    decoder = network.text_decoder
    if way["log_softmax"]:
        network.text_decoder = LogSoftmaxDecoder(decoder)
    rows = network.generate(pixels, num_beams=way["beams"], num_beam_groups=way["groups"], **lengths).tolist()
    network.text_decoder = decoder
    return rows


def ours(network: Any, pixels: torch.Tensor, way: dict[str, Any]) -> Rows:
    """The decoder with cached keys and values."""
    from vlm.data.tokenizers import ClipTokenizer
    from vlm.models.caption_search import write_captions
    from vlm.models.decoding_options import DecodingOptions

    options = DecodingOptions(
        beams=way["beams"],
        beam_groups=way["groups"],
        diversity_penalty=0,
        min_length=way["min_length"],
        max_length=way["length"],
    )
    return write_captions(network, pixels, ClipTokenizer(), options).tokens[:, 0].tolist()


def main(side: str, folder: Path, threads: int) -> None:
    """Answer until stdin ends."""
    from open_clip import CoCa

    torch.set_num_threads(threads)
    network = CoCa(**json.loads((folder / "config.json").read_text(encoding="utf-8"))).eval()
    content = torch.load(folder / "weights.pt", weights_only=True)
    network.load_state_dict(content["network"])
    write: Callable[[Any, torch.Tensor, dict[str, Any]], Rows] = {"ours": ours, "theirs": theirs}[side]
    # imports, the vocabulary and the allocation of memory are not what is measured
    with torch.inference_mode():
        for beams in (1, 2):
            warm_up = {"length": 8, "min_length": 6, "beams": beams, "groups": 1, "log_softmax": False}
            write(network, content["pixels"][:1], warm_up)
    for line in sys.stdin:
        with torch.inference_mode():
            started, cpu_started = time.perf_counter(), time.process_time()
            rows = write(network, content["pixels"], json.loads(line))
        cpu_seconds = time.process_time() - cpu_started
        print(
            json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds, "rows": rows}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
