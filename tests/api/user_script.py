# pyright: strict
"""A user's script under the strictest type checker: never run, but checked with everything else by scripts/check."""

from collections.abc import Sequence

import torch

import vlm


def train_step(images: torch.Tensor, tokens: torch.Tensor, uids: Sequence[str]) -> float:
    """The user's own step."""
    return float(images.sum()) + float(tokens.sum()) + len(uids)


def my_tokenizer(texts: list[str]) -> list[list[int]]:
    """A tokenizer of the user's own."""
    return [[len(text)] for text in texts]


def main() -> None:
    """What the API page shows."""
    packed = vlm.pack("photos", "shards", hold_out=20)
    print(packed.samples, packed.splits["train"], packed.to_json()["seconds"])

    with vlm.stream(["a", "b"], batch_size=8, tokenizer=my_tokenizer, epochs=None) as batches:
        for batch in batches:
            train_step(batch.images, batch.tokens, batch.uids)
            saved = batches.state_dict()
            batches.load_state_dict(saved)

    try:
        run = vlm.train("tiny", data="shards", run="runs/first", learning_rate=1e-3, optimizer={"beta2": 0.95})
        print(run.samples_per_second, run.metrics["loss"])
    except vlm.UsageError as error:
        print(error.exit_code)

    scores = vlm.evaluate("runs/first", retrieval="shards", classes="folders", class_names=["a", "b"])
    if scores.retrieval is not None:
        print(scores.retrieval.text_to_image.recall[10])
    embedded = vlm.embed("runs/first", "shards", "embeddings", modality="both", quantize=["int8"])
    if embedded.image is not None:
        print(embedded.image.rows)
    print(vlm.train_tokenizer("shards", "words.model").pieces)
    print([model.model for model in vlm.list_models().models])
