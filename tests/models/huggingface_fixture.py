"""Tiny dual encoders of transformers with random weights, saved as folders with their own tokenizers."""

import io
import json
from pathlib import Path
from typing import Any

import torch

CAPTIONS = [
    "a small red circle on a white background",
    "two large blue stars, and a green square!",
    "Ein Hund läuft über die Wiese.",
    "hello_world under_score snake_case names",
    "the quick brown fox jumps over the lazy dog",
    "",
]


def clip_folder(folder: Path) -> Path:
    """CLIP with OpenAI's BPE, made of what open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    bpe: Any = SimpleTokenizer()
    folder.mkdir(parents=True)
    vocabulary = {piece.replace("<start_of_text>", "<|startoftext|>"): number for piece, number in bpe.encoder.items()}
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in bpe.bpe_ranks]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    config = CLIPConfig(
        text_config=_text(vocab_size=49408, max_position_embeddings=24, eos_token_id=49407),
        vision_config=_vision(image_size=32, patch_size=8),
        projection_dim=12,
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return _save(folder, CLIPModel, config)


def metaclip2_folder(folder: Path) -> Path:
    """MetaCLIP 2 with a multilingual unigram vocabulary, as XLM-R has one."""
    from transformers import CLIPImageProcessor, MetaClip2Config, MetaClip2Model

    tokenizer = _unigram_tokenizer(start=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    config = MetaClip2Config(
        text_config=_text(
            vocab_size=len(tokenizer), max_position_embeddings=24, eos_token_id=2, bos_token_id=0, pad_token_id=1
        ),
        vision_config=_vision(image_size=32, patch_size=8),
        projection_dim=12,
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return _save(folder, MetaClip2Model, config)


def siglip_folder(folder: Path) -> Path:
    """SigLIP with its own tokenizer class over a SentencePiece model with T5's special tokens."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTokenizer

    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(_sentencepiece())
    SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"]).save_pretrained(folder)
    config = SiglipConfig(
        text_config=_text(vocab_size=300, max_position_embeddings=16, projection_size=16),
        vision_config=_vision(image_size=32, patch_size=8),
    )
    processor = SiglipImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    processor.save_pretrained(folder)
    return _save(folder, SiglipModel, config)


def siglip2_folder(folder: Path, *, has_mask: bool = False) -> Path:
    """SigLIP 2 (NaFlex): images as a variable number of patches, texts lower-cased."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    tokenizer = _unigram_tokenizer(start=False)
    if not has_mask:
        tokenizer.model_input_names = ["input_ids"]
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    config = Siglip2Config(
        text_config=_text(vocab_size=len(tokenizer), max_position_embeddings=16, projection_size=16),
        vision_config=_vision(num_patches=16, patch_size=8),
    )
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return _save(folder, Siglip2Model, config)


FOLDERS = {
    "clip": clip_folder,
    "metaclip_2": metaclip2_folder,
    "siglip": siglip_folder,
    "siglip2": siglip2_folder,
}


def _text(**values: Any) -> dict[str, Any]:
    return _sizes() | values


def _vision(**values: Any) -> dict[str, Any]:
    return _sizes() | values


def _sizes() -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _save(folder: Path, model_class: Any, config: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # far enough from the small values of a fresh model that a wrong step shows
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return folder


def _unigram_tokenizer(*, start: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    inner: Any = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC() if start else normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(CAPTIONS * 4, trainer)
    single = "<s> $A </s>" if start else "$A </s>"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, special.index(token)) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )


def _sentencepiece() -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(CAPTIONS * 4),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def sentence_folder(folder: Path) -> Path:
    """A sentence-transformers model: a tiny BERT, the mean of its states, a linear layer."""
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from sentence_transformers.sentence_transformer.modules import (  # pyright: ignore[reportMissingImports]
        Dense,
        Pooling,
        Transformer,
    )
    from transformers import BertConfig, BertModel

    trunk = folder.parent / "trunk"
    trunk.mkdir(parents=True)
    tokenizer = _unigram_tokenizer(start=True)
    tokenizer.save_pretrained(trunk)
    _save(trunk, BertModel, BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **_sizes()))
    layers = [Transformer(str(trunk), max_seq_length=32), Pooling(16, pooling_mode="mean"), Dense(16, 12)]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder))
    return folder
