"""The calls of sentence-transformers, transformers and open_clip over our models, without these libraries' models."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import vlm
from vlm.adaptors.huggingface_features import HuggingFaceStyle
from vlm.adaptors.open_clip_tokenizer import get_tokenizer
from vlm.adaptors.sentence_transformer import SentenceTransformerStyle
from vlm.data.tokenizers import open_tokenizer

TEXTS = ["a red circle", "a blue star", ""]


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


class TestSentenceTransformerStyle:
    def test_texts_and_images_may_be_mixed(self, model):
        rows = SentenceTransformerStyle(model).encode(["a red circle", image(), "a blue star", image(1)])
        assert np.allclose(rows[[0, 2]], model.embed_texts(TEXTS[:2]), atol=1e-6)
        assert np.allclose(rows[[1, 3]], model.embed_images([image(), image(1)]), atol=1e-6)

    def test_one_input_is_one_vector(self, model):
        style = SentenceTransformerStyle(model)
        assert style.encode("a red circle").shape == (model.embedding_size,)
        assert style.encode_query(image()).shape == (style.get_embedding_dimension(),)
        assert style.encode([], convert_to_tensor=True).shape == (0, model.embedding_size)

    def test_tensors_and_prompts(self, model):
        rows = SentenceTransformerStyle(model).encode(["circle"], convert_to_tensor=True, prompt="a red ")
        assert isinstance(rows, torch.Tensor)
        assert torch.allclose(rows, torch.from_numpy(model.embed_texts("a red circle")))

    def test_similarity(self, model):
        style = SentenceTransformerStyle(model)
        found = style.similarity(style.encode(TEXTS), style.encode(image()))
        assert np.allclose(found.numpy(), model.similarity(image(), TEXTS).T, atol=1e-6)

    def test_misuse_is_said(self, model):
        with pytest.raises(vlm.UsageError, match="texts and PIL images"):
            SentenceTransformerStyle(model).encode([3])
        with pytest.raises(vlm.UsageError, match="no option trancate_dim"):
            SentenceTransformerStyle(model).encode("a", trancate_dim=3)


class TestHuggingFaceStyle:
    def test_its_features_are_the_embeddings_before_they_are_normalised(self, model):
        module = HuggingFaceStyle(model)
        inputs = module.processor(text=TEXTS, images=[image(), image(1)])
        with torch.inference_mode():
            texts = module.get_text_features(input_ids=inputs["input_ids"])
            images = module.get_image_features(pixel_values=inputs["pixel_values"])
            outputs = module(**inputs)
        normalised = torch.nn.functional.normalize
        assert np.allclose(normalised(texts, dim=-1).numpy(), model.embed_texts(TEXTS), atol=1e-5)
        assert np.allclose(normalised(images, dim=-1).numpy(), model.embed_images([image(), image(1)]), atol=1e-5)
        cosines = model.similarity([image(), image(1)], TEXTS)
        assert np.allclose(outputs["logits_per_image"].numpy(), model.logit_scale * cosines, atol=1e-4)
        assert torch.equal(outputs["logits_per_text"], outputs["logits_per_image"].T)

    def test_it_can_be_trained(self, model):
        module = HuggingFaceStyle(model)
        inputs = module.processor(text="a red circle", images=image())
        module(**inputs)["logits_per_image"].sum().backward()
        assert any(parameter.grad is not None for parameter in module.parameters())
        module.zero_grad()

    def test_misuse_is_said(self, model, folder):
        with pytest.raises(vlm.UsageError, match="Give text, images, or both"):
            HuggingFaceStyle(model).processor()
        with pytest.raises(vlm.UsageError, match="has no network of its own"):
            HuggingFaceStyle(vlm.load(f"{folder}#8", device="cpu"))


class TestOpenClipTokenizer:
    def test_it_is_called_as_open_clips(self, folder, model):
        tokenizer = get_tokenizer(f"local-dir:{folder}")
        assert tokenizer("a red circle").shape == (1, 24)
        assert tokenizer("a red circle").dtype == torch.long
        assert np.array_equal(tokenizer(TEXTS).numpy(), model.tokenizer.encode(TEXTS))
        assert tokenizer.decode(tokenizer("a red circle")[0]) == "a red circle"
        assert (tokenizer.context_length, tokenizer.vocab_size) == (24, model.tokenizer.vocab_size)

    def test_another_length_keeps_the_end_token(self, folder):
        tokenizer = get_tokenizer(folder)
        short = tokenizer(["a red circle and a blue star on a white background"], context_length=5)
        assert short.shape == (1, 5)
        assert short[0, -1] == tokenizer.eot_token_id
        assert short[0, 0] == tokenizer.sot_token_id
        assert tokenizer("a", context_length=40).shape == (1, 40)

    def test_clips_own_has_the_same_ids(self, tmp_path):
        open_tokenizer("clip", 77).save(tmp_path)
        theirs = open_clip.get_tokenizer("ViT-B-32")
        assert torch.equal(get_tokenizer(tmp_path)(TEXTS), theirs(TEXTS))
        assert torch.equal(get_tokenizer(tmp_path)(TEXTS, context_length=6), theirs(TEXTS, context_length=6))

    def test_a_folder_without_one_is_named(self, tmp_path):
        with pytest.raises(vlm.UsageError, match="tokenizer"):
            get_tokenizer(tmp_path)
