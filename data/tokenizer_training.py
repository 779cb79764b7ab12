"""Training a tokenizer: the captions of shards become a SentencePiece model."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.shards import EvalCollator, count_samples
from vlm.data.tokenizers import SentencePieceTokenizer
from vlm.errors import UsageError
from vlm.files import write_bytes
from vlm.results import Result

# SentencePiece's own limit of a line
_MAX_LINE_BYTES = 4192
_MAX_TOKENS = 512
_MEASURED_CAPTIONS = 20_000
_SAMPLES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerSummary(Result):
    """The file, the captions it was trained on, its vocabulary, and the lengths that its context has to hold."""

    tokenizer: str
    captions: int
    pieces: int
    longest_caption_tokens: int
    mean_caption_tokens: float


def train_tokenizer(
    shards: Sequence[str], out: Path, *, vocabulary: int, languages: tuple[str, ...] = ()
) -> TokenizerSummary:
    """Write a SentencePiece model of the captions in these languages (empty: all) to `out`.

    Raises:
        UsageError: `out` exists, there are no captions, or the vocabulary does not hold their characters.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name another file or remove it.")
    captions = read_captions(shards, languages)
    if not captions:
        raise UsageError(f"{shards[0]} … holds no captions in {languages or 'any language'}.")
    model = train_sentencepiece(captions, vocab_size=vocabulary)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, model)
    # lengths tell which --context-length captions need; a sample of them is enough
    tokens = SentencePieceTokenizer(model, _MAX_TOKENS).encode(captions[:_MEASURED_CAPTIONS])
    lengths = (tokens != SentencePieceTokenizer.pad_token).sum(axis=1)
    return TokenizerSummary(
        tokenizer=str(out),
        captions=len(captions),
        pieces=SentencePieceTokenizer(model).vocab_size,
        longest_caption_tokens=int(lengths.max()),
        mean_caption_tokens=float(lengths.mean()),
    )


def read_captions(shards: Sequence[str], languages: tuple[str, ...]) -> list[str]:
    """All captions of the shards in these languages, and those without a language."""
    plan = SequentialBatches(counts=count_samples(list(shards)), batch_size=_SAMPLES_AT_ONCE)
    captions: list[str] = []
    for batch in stream_batches(plan, shards, EvalCollator(view=None), numbers=range(len(plan))):
        for sample in batch.decoded:
            for language, texts in sample.captions.items():
                if not languages or not language or language in languages:
                    captions += texts
    return captions


def train_sentencepiece(captions: Iterable[str], *, vocab_size: int) -> bytes:
    """A byte-pair SentencePiece model of the captions, case folded; large ones spell unknown characters in bytes.

    Byte pairs, because the unigram model split the few words of small corpora (docs/log.md). The vocabulary is
    smaller than asked when the captions do not hold that many pieces.

    Raises:
        UsageError: the trainer refuses, as where the vocabulary is smaller than the characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=chain.from_iterable(map(_training_lines, captions)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            hard_vocab_limit=False,
            byte_fallback=vocab_size >= 1024,
            # the default leaves rare characters out, which in Chinese are whole words
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UsageError(_training_failure(str(error), vocab_size)) from error
    return model.getvalue()


def _training_lines(caption: str) -> Iterator[str]:
    """The caption, or parts of it that end at spaces where it is longer than the trainer reads.

    SentencePiece leaves longer lines out without a word, and no piece of it reaches over a space.
    """
    # a character has up to four bytes, so most captions need not be encoded to be measured
    if len(caption) * 4 <= _MAX_LINE_BYTES or len(caption.encode(errors="replace")) <= _MAX_LINE_BYTES:
        yield caption
        return
    rest = caption
    longest = _MAX_LINE_BYTES // 4
    while rest:
        cut = len(rest) if len(rest) <= longest else rest.rfind(" ", 1, longest) + 1 or longest
        yield rest[:cut]
        rest = rest[cut:]


def _training_failure(reason: str, vocab_size: int) -> str:
    """What SentencePiece says, with the name of our option where the vocabulary holds not even the characters."""
    smallest = re.search(r"required_chars[^0-9]*\d+ vs (\d+)", reason)
    if smallest:
        return (
            f"A vocabulary of {vocab_size:,} is smaller than the {int(smallest[1]):,} pieces that the characters of "
            "the captions need; give a larger --vocabulary."
        )
    if "sentences_.empty()" in reason or "all_chars_count" in reason:
        return "The captions hold no text to learn a vocabulary from."
    said = " ".join(reason.split())
    return f"SentencePiece cannot learn a vocabulary of {vocab_size:,} from these captions: {said}"
