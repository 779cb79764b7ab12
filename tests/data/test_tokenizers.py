import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlm.data.tokenizer_training import train_sentencepiece
from vlm.data.tokenizers import (
    ClipTokenizer,
    SentencePieceTokenizer,
    cut_texts,
    open_tokenizer,
    trim_tokens,
)
from vlm.errors import UsageError

CAPTIONS = [
    "a small red circle",
    "two large blue squares on a white background",
    "ein roter Kreis",
    "一个红色的圆",
] * 20


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceTokenizer(train_sentencepiece(CAPTIONS, vocab_size=120), context_length=24)


def test_rows_begin_with_start_end_with_end_and_are_padded_with_zero(pieces):
    rows = pieces.encode(["a small red circle", ""])
    assert rows.shape == (2, 24)
    assert (rows[:, 0] == pieces.start_token).all()
    assert rows[1].tolist() == [pieces.start_token, pieces.end_token] + [0] * 22
    assert pieces.encode([]).shape == (0, 24)


def test_the_end_token_is_the_largest_id_for_argmax_pooling(pieces):
    rows = pieces.encode(CAPTIONS)
    assert (rows[np.arange(len(rows)), rows.argmax(axis=1)] == pieces.end_token).all()


@pytest.mark.parametrize("text", ["two large blue squares", "ein roter kreis", "一个红色的圆"])
def test_decode_gives_back_what_was_encoded(pieces, text):
    assert pieces.decode(pieces.encode([text])[0].tolist()) == text


def test_a_long_caption_is_cut_but_keeps_its_end(pieces):
    row = pieces.encode(["circle " * 100])[0]
    assert row[-1] == pieces.end_token


def test_rows_are_trimmed_to_the_longest_in_steps_of_eight(pieces):
    rows = pieces.encode(["a", "a small red circle " * 2])
    used = int((rows != pieces.pad_token).sum(axis=1).max())
    cut = trim_tokens(rows, pieces)
    assert cut.shape == (2, -(-used // 8) * 8)
    assert (rows[:, : cut.shape[1]] == cut).all()
    assert trim_tokens(pieces.encode(["circle " * 100]), pieces).shape == (1, 24)
    assert trim_tokens(np.zeros((2, 3, 24), np.int64), pieces).shape == (2, 3, 8)


def test_an_end_token_that_is_also_padding_is_not_trimmed_away():
    tokenizer: Any = SimpleNamespace(pad_token=5, end_token=5)
    rows = np.full((1, 20), 5)
    rows[0, :8] = range(10, 18)
    assert trim_tokens(rows, tokenizer).shape == (1, 16)
    assert trim_tokens(rows[:, ::-1], tokenizer).shape == (1, 20)


@pytest.mark.parametrize("kind", ["clip", "sentencepiece"])
def test_a_saved_tokenizer_opens_as_the_same(tmp_path, pieces, kind):
    tokenizer = pieces if kind == "sentencepiece" else ClipTokenizer(20)
    tokenizer.save(tmp_path)
    again = open_tokenizer(str(tmp_path))
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.encode(CAPTIONS) == tokenizer.encode(CAPTIONS)).all()


ODD = [
    "it's a dog's, can't won't I'LL o'clock 's 't",
    "a  b\tc",
    "<br> x <|endoftext|> hi a<start_of_text>b foo<end_of_text>",
    "don't1234 5.5% a_b--c...",
    "A&amp;B",
    "‘quote’ café",
    "\x1b[31mred",
    "x" * 400,
    "",
    " ".join(["word"] * 100),
    "http://a.b/c?d=e#f",
]


def test_clip_encodes_as_open_clip_does_also_what_it_has_met_before():
    import open_clip

    ours, theirs = ClipTokenizer(), open_clip.get_tokenizer("ViT-B-32")
    for texts in (CAPTIONS, ODD, [text.upper() for text in ODD], ODD):
        assert (ours.encode(texts) == theirs(texts).numpy()).all()
    assert ClipTokenizer().decode(ClipTokenizer().encode(["a small red circle"])[0].tolist()) == "a small red circle"


def test_clip_leaves_whole_what_its_vocabulary_has_whole():
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    whole = [piece.removesuffix("</w>") for piece in theirs.encoder if piece.endswith("</w>")]
    assert len(whole) > 30_000
    assert [word for word in whole if word and theirs.bpe(word) != f"{word}</w>"] == []


def test_clip_encodes_words_it_has_never_met_as_open_clip_does():
    import open_clip

    rng = np.random.default_rng(0)
    signs = [chr(code) for code in range(32, 127)] + ["the", "dogs", "'s", "<end_of_text>", "ing", "xylo"]
    texts = ["".join(rng.choice(signs, 30)) for _ in range(400)]
    assert (ClipTokenizer().encode(texts) == open_clip.get_tokenizer("ViT-B-32")(texts).numpy()).all()


SCRIPTS = (
    *("naïve", "İstanbul", "ſ's", "ﬁne", "ǅ", "ẞ", "ΑΣ", "日本語", "犬の写真", "😀", "👨‍👩‍👧", "½²Ⅷ", "١٢٣", "…", "’s"),
    *("e\u0301", "\u200b", "\u00a0", "\u2028", "\ufeff", "\x00", "\x7f", "\n", "&amp;lt;", "&#128512;", "ÃƒÂ¡", "“q”"),
    *("dog", "don't", "<start_of_text>", "C++", "a_b", "--", "antidisestablishmentarianism", " ", "  "),
)


def test_clip_encodes_any_script_and_decodes_it_as_open_clip_does():
    from open_clip.tokenizer import SimpleTokenizer

    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(SCRIPTS, rng.integers(1, 7))) for _ in range(1500)]
    # and characters of any plane, but no half of a surrogate pair, which is no Unicode text
    codes = [*rng.integers(0x80, 0xD800, 1500), *rng.integers(0xE000, 0x20000, 500)]
    texts += [f"a{chr(code)} {chr(code)}b" for code in codes]
    ours, theirs = ClipTokenizer(400), SimpleTokenizer()
    for text in texts:
        pieces = theirs.encode(text)
        row = ours.encode([text])[0].tolist()
        assert row[1 : len(pieces) + 1] == pieces
        plain = [piece for piece in pieces if piece < ours.start_token]
        assert ours.decode([ours.start_token, *plain, ours.end_token]) == theirs.decode(plain).strip()


def test_clip_needs_no_torch_and_no_open_clip():
    code = (
        "import sys; from vlm.data.tokenizers import ClipTokenizer; ClipTokenizer().encode(['a dog', 'a naïve café'])\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "open_clip", "transformers"} & set(done.stdout.split())


def test_a_hugging_face_folder_is_read(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "red", "circle"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    tokenizer = open_tokenizer(str(tmp_path), 8)
    assert tokenizer.encode(["red circle"]).shape == (1, 8)
    assert tokenizer.decode(tokenizer.encode(["red circle"])[0].tolist()) == "red circle"


def test_an_unknown_tokenizer_is_refused_with_what_would_do():
    with pytest.raises(UsageError, match="give clip, a SentencePiece"):
        open_tokenizer("nowhere.model")
    for length in (-3, 2):
        with pytest.raises(UsageError, match=rf"context_length = {length} holds no piece .* give 3 or more"):
            open_tokenizer("clip", length)


def test_a_sentencepiece_model_with_other_padding_is_refused(tmp_path):
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(UsageError, match="pad_id=0"):
        SentencePieceTokenizer(model.getvalue())


def test_captions_longer_than_the_trainers_lines_are_learned_from():
    long = ["γάτα στο σπίτι " * 400, "狗在草地上" * 1500]
    model = SentencePieceTokenizer(train_sentencepiece([*long, "a dog"], vocab_size=80))
    assert model.decode(model.encode(["γάτα στο σπίτι 狗在草地上"])[0].tolist()) == "γάτα στο σπίτι 狗在草地上"


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["abcdefghijklmnopqrstuvwxyz"], "A vocabulary of 10 is smaller than the 29 pieces .*--vocabulary"),
        ([], "hold no text"),
        (["  "], "hold no text"),
    ],
)
def test_what_the_trainer_refuses_is_one_sentence(captions, message):
    with pytest.raises(UsageError, match=message):
        train_sentencepiece(captions, vocab_size=10)


def test_texts_longer_than_the_context_are_named():
    tokenizer = ClipTokenizer(8)
    fitting = "a jug on a red table"
    assert cut_texts(tokenizer, [fitting, f"{fitting} indoors", "", "jug"]) == [f"{fitting} indoors"]
    assert cut_texts(tokenizer, []) == []
