"""A model: its network, built from a configuration, and as every stage after training uses it.

A configuration is open_clip's `model_cfg`, which a model folder stores: of our small architectures, those of open_clip,
or networks of our own towers. A text tower that needs no padding can be fed rows cut to the longest caption of a batch
(`enable_padding_trim`), which saves most of its work on short captions. A `VisionLanguageModel` takes images and texts,
and gives embeddings or captions.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from vlm.config import suggest
from vlm.data.tokenizers import Tokenizer, trim_tokens
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.files import compute_fingerprint, content_digest
from vlm.models.caption_search import WrittenCaptions, write_captions
from vlm.models.coca import text_log_likelihoods
from vlm.models.decoding_options import DecodingOptions
from vlm.models.low_rank import LORA, LowRank, add_adapters
from vlm.models.network import Captioner, Network
from vlm.models.patch_features import pool_images
from vlm.tensor_types import Float, Float32, Tensor, UInt8

TEXT_BATCH_SIZE = 256

# sine positions, because learned ones start too weak to be used in a short run; 16 patches see a drawn scene well
# enough; batch normalisation is avoided throughout, since a split batch must equal the whole one
_TINY_VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 192,
    "head_width": 32,
    "layers": 2,
    "pos_embed_type": "sin_cos_2d",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION,
        "text_cfg": {"context_length": 16, "vocab_size": 258, "width": 96, "heads": 3, "layers": 1},
        "custom_text": True,
    },
    "tiny-coca": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION
        | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 16, "output_tokens": True},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 258,
            "width": 128,
            "heads": 4,
            "layers": 1,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {"context_length": 16, "vocab_size": 258, "width": 128, "heads": 4, "layers": 1},
        "custom_text": True,
    },
    "small": {
        "embed_dim": 192,
        "vision_cfg": {
            "timm_model_name": "test_convnext3",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 2050, "width": 192, "heads": 3, "layers": 1},
        "custom_text": True,
    },
}
"""Sizes of towers in open_clip's format; vocabulary and context length follow the tokenizer of the run."""


ModelConfig = dict[str, Any]
"""The `model_cfg` of a model folder: open_clip's format, or with towers of ours (`vlm.models.towers`)."""


def model_config(name: str) -> ModelConfig:
    """The configuration of one of our architectures, of open_clip's, or of IMAGE_TOWER+TEXT_TOWER[@EMBED_DIM].

    Raises:
        UsageError: the name is known to none; the nearest one is named.
    """
    # a copy, since callers fill in the tokenizer's sizes
    if name in ARCHITECTURES:
        return deepcopy(ARCHITECTURES[name])
    if "+" in name:
        # imported late: transformers and timm take seconds
        from vlm.models.towers.tower_registry import parse_towers

        return parse_towers(name)
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UsageError(f"Unknown architecture {name!r}; {suggest(name, [*ARCHITECTURES, *open_clip.list_models()])}")
    return config


def fit_to_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same architecture with the tokenizer's vocabulary, context length and special tokens.

    Raises:
        UsageError: a tower cannot read that many tokens, or cannot tell where the captions of this tokenizer end.
    """
    fitted = deepcopy(config)
    text = fitted["text_cfg"]
    text["context_length"] = tokenizer.context_length
    text["vocab_size"] = tokenizer.vocab_size
    text["pad_id"] = tokenizer.pad_token
    text["eos_id"] = tokenizer.end_token
    # the decoder reads the same tokens as the text tower
    if "multimodal_cfg" in fitted:
        fitted["multimodal_cfg"]["context_length"] = tokenizer.context_length
        fitted["multimodal_cfg"]["vocab_size"] = tokenizer.vocab_size
    if _uses_towers(fitted):
        from vlm.models.towers.tower_registry import resolve_tower_configs

        fitted = resolve_tower_configs(fitted)
    _pool_at_end_token(fitted["text_cfg"], tokenizer)
    return fitted


def build_network(config: ModelConfig) -> Network:
    """A CLIP, CustomTextCLIP or CoCa of open_clip, or a network of towers, with weights from torch's global generator.

    Its forward(images [B, 3, H, W], tokens [B, L]) gives a dict with `image_features` and `text_features` [B, D] of
    unit length, `logit_scale`, `logit_bias` if it has one, and for CoCa `logits` [B, L-1, V] with `labels` [B, L-1].
    With the key `lora` its matrices have adapters (`vlm.models.low_rank`).
    """
    if LORA in config:
        network = build_network({key: value for key, value in config.items() if key != LORA})
        add_adapters(network, LowRank.of(config))
        return network
    if _uses_towers(config):
        from vlm.models.towers.tower_registry import CaptionerNetwork, TowerNetwork

        if "multimodal_cfg" not in config:
            return cast(Network, TowerNetwork(config))
        captioner = cast(Network, CaptionerNetwork(config))
        # a language model's own projection is trained
        if hasattr(captioner.get_submodule("text_decoder"), "text_projection"):
            _initialise_decoder(captioner)
        return captioner
    if "huggingface" in config:
        from vlm.models.huggingface_clip import HuggingFaceDualEncoder

        return cast(Network, HuggingFaceDualEncoder(config))
    network = _build_open_clip(deepcopy(config))
    allow_logit_bias(network)
    return network


def allow_logit_bias(network: Any) -> None:
    """Let an objective register a bias of the logits where open_clip's network has none, only an attribute None."""
    if network.logit_bias is None:
        del network.logit_bias
        network.register_parameter("logit_bias", None)


def _build_open_clip(values: ModelConfig) -> Network:
    from open_clip import CLIP, CoCa, CustomTextCLIP

    # as open_clip.create_model decides it: a Hugging Face tower needs CustomTextCLIP
    is_custom = values.pop("custom_text", False) or "hf_model_name" in values["text_cfg"]
    if "multimodal_cfg" in values:
        network = CoCa(**values, pad_id=values["text_cfg"].get("pad_id", 0))
        _initialise_decoder(network)
        return cast(Network, network)
    return cast(Network, (CustomTextCLIP if is_custom else CLIP)(**values, output_dict=True))


def _pool_at_end_token(text: ModelConfig, tokenizer: Tokenizer) -> None:
    """Make open_clip's transformer look for the end token by its id where that is not the largest (`argmax`)."""
    is_by_largest = text.get("pool_type", "argmax") == "argmax" and not text.get("embed_cls")
    is_other = "tower" in text or "hf_model_name" in text
    if is_other or not is_by_largest or tokenizer.end_token == tokenizer.vocab_size - 1:
        return
    # a text that is too long shows whether the end token survives truncation
    if tokenizer.end_token not in tokenizer.encode(["a " * tokenizer.context_length])[0]:
        raise UsageError(
            "This tokenizer puts no end token after a caption, which open_clip's transformer reads its vector from; "
            "choose a text tower that needs none (hf:, bag, ngram), or another tokenizer."
        )
    text["pool_type"] = "eos"


def _uses_towers(config: ModelConfig) -> bool:
    return any("tower" in config[part] for part in ("vision_cfg", "text_cfg"))


def is_captioner(network: nn.Module) -> bool:
    """Whether the network has a decoder that writes captions."""
    return hasattr(network, "text_decoder")


def _initialise_decoder(network: nn.Module) -> None:
    """Give CoCa's output projection its weights: open_clip 3.3 leaves them as uninitialised memory."""
    projection = network.get_parameter("text_decoder.text_projection")
    with torch.no_grad():
        # as open_clip initialises the projection of its text tower
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


_POOLS_BY_TOKEN = frozenset({"argmax", "eos", "first"})


def enable_padding_trim(network: nn.Module, *, is_trained: bool = True) -> bool:
    """Let `encode_text` take rows cut to the batch's longest caption, if that gives the same embeddings.

    open_clip's transformer adds its mask of the whole context; here it is cut to the row. In a causal tower nothing
    after the end token has any influence before it, so nothing else changes.

    Returns False, and changes nothing, for captioners, whose class token is at the end of the row; for open_clip's CLIP
    without `custom_text`, which adds the positions of the whole context; for towers that pool a token counted from the
    row's end, or attend to padding, as MobileCLIP's; and, if it is to be trained, where texts pass through dropout,
    since what it drops depends on the length of the row.
    """
    if hasattr(network, "can_trim_padding"):
        return bool(network.can_trim_padding)
    text = getattr(network, "text", None)
    if is_captioner(network) or text is None or (is_trained and _has_dropout(text)):
        return False
    if not hasattr(text, "attn_mask"):
        return True
    attends_to_padding = text.attn_mask is None and not getattr(text, "use_pad_mask", False)
    has_class_token = getattr(text, "cls_emb", None) is not None
    if getattr(text, "pool_type", "") not in _POOLS_BY_TOKEN or attends_to_padding or has_class_token:
        return False
    text.get_submodule("transformer").register_forward_pre_hook(_crop_attention_mask, with_kwargs=True)
    return True


def longest_sequence(network: nn.Module) -> int:
    """The most positions that a tower has an embedding for; 0 if none has any, as towers of convolutions."""
    lengths: list[int] = [0]
    for name, parameter in network.named_parameters():
        if name.endswith(("positional_embedding", "pos_embed")) and parameter.ndim > 1:
            lengths.append(parameter.shape[-2])
    return max(lengths)


def _has_dropout(text: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in text.modules())


def _crop_attention_mask(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    mask = named.get("attn_mask")
    length = arguments[0].shape[1]
    # without asking whether it is larger, which an exported graph would take for settled by its example
    if mask is not None:
        named = named | {"attn_mask": mask[..., :length, :length]}
    return arguments, named


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedCaption:
    """A caption that a model wrote.

    log_likelihood: mean of its tokens, the end among them and the prompt not, in nats.
    tokens: start token, prompt, what was written, and the end token unless it was cut.
    attention: of each token when it was written, over the image's M tokens, mean over layers and heads; zeros for the
        prompt; None unless it was asked for.
    """

    text: str
    log_likelihood: float
    tokens: tuple[int, ...]
    attention: Float32[Tensor, "L M"] | None = None

    def attention_by_word(self, tokenizer: Tokenizer) -> list[tuple[str, Float32[Tensor, " M"]]]:
        """Each word of the caption, the prompt's too, with the mean attention of its tokens.

        A word is what spaces separate; a text without spaces is one.

        Raises:
            ValueError: the caption was written without attention.
        """
        if self.attention is None:
            raise ValueError("This caption has no attention; write it with has_attention=True.")
        words = self.text.split()
        rows: list[list[Tensor]] = [[] for _ in words]
        for place in range(1, len(self.tokens)):
            # a token belongs to the last word of the text that ends with it; it may begin one, or be only a part
            number = len(tokenizer.decode(self.tokens[: place + 1]).split()) - 1
            if 0 <= number < len(words) and self.tokens[place] != tokenizer.end_token:
                rows[number].append(self.attention[place])
        nothing = torch.zeros(self.attention.shape[1])
        by_word: list[tuple[str, Tensor]] = []
        for word, maps in zip(words, rows, strict=True):
            by_word.append((word, torch.stack(maps).mean(dim=0) if maps else nothing))
        return by_word


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedImages:
    """Captions of each image, the best first, and the unit vectors of the images from the same pass, on the CPU."""

    captions: list[list[DecodedCaption]]
    embeddings: Float32[Tensor, "B D"]


@dataclass(kw_only=True)
class VisionLanguageModel:
    """A dual encoder with the view and the tokenizer it was trained with.

    name: where it was loaded from, for people; the identity is `fingerprint`.
    trims_padding: rows of tokens are cut to the longest text (`enable_padding_trim` says whether the network can).
    """

    name: str
    network: Network
    config: ModelConfig
    view: EvalTransform
    tokenizer: Tokenizer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32
    trims_padding: bool = False
    _fingerprint: str = field(default="", init=False, repr=False)

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space: weights, view and tokenizer; computed once, so not while training."""
        self._fingerprint = self._fingerprint or space_fingerprint(self.network, self.view, self.tokenizer)
        return self._fingerprint

    @property
    def derived_from(self) -> str:
        """The MODEL from whose embeddings this one derives its own; empty if they are the network's."""
        return ""

    @property
    def embedding_size(self) -> int:
        """D, the length of an embedding."""
        return int(self.config["embed_dim"])

    @property
    def embeds_images(self) -> bool:
        """Whether there is an image tower; a sentence-transformers model has none."""
        return getattr(self.network, "embeds_images", True)

    @property
    def can_caption(self) -> bool:
        """Whether the model has a caption decoder."""
        return is_captioner(self.network)

    @torch.inference_mode()
    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of images as `view` gives them, on the CPU."""
        with self._inference():
            features = self.network.encode_image(self._pixels(images))
        # normalised in float32: half precision would move the result by 1e-3
        return nn.functional.normalize(features.float(), dim=-1).cpu()

    @torch.inference_mode()
    def pool_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B F"]:
        """Features of images before the projection into the joint space, not normalised, on the CPU.

        Raises:
            UsageError: the image tower has none.
        """
        with self._inference():
            features = pool_images(self.network, self._pixels(images))
        return features.float().cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts, on the CPU."""
        parts: list[Tensor] = []
        # in batches, since a caller may pass all captions of a data set
        for first in range(0, len(texts), TEXT_BATCH_SIZE):
            tokens = self.tokenizer.encode(list(texts[first : first + TEXT_BATCH_SIZE]))
            if self.trims_padding:
                tokens = trim_tokens(tokens, self.tokenizer)
            rows = torch.from_numpy(tokens).to(self.device)
            with self._inference():
                features = self.network.encode_text(rows)
            parts.append(nn.functional.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.embedding_size)

    def caption_images(self, images: UInt8[Tensor, "B 3 H W"], prompt: str = "") -> list[str]:
        """A caption for each image, written greedily, beginning with the prompt.

        Raises:
            UsageError: the model has no decoder.
        """
        written = self.decode_captions(images, DecodingOptions(prompt=prompt))
        return [captions[0].text for captions in written.captions]

    @torch.inference_mode()
    def decode_captions(
        self, images: UInt8[Tensor, "B 3 H W"], options: DecodingOptions, *, has_attention: bool = False
    ) -> CaptionedImages:
        """Captions of each image, and its embedding. Sampled captions depend on the image and `options.seed` alone.

        Raises:
            UsageError: the model has no decoder, or a length or the prompt does not fit it; see `write_captions`.
        """
        captioner = self._captioner()
        if not len(images):
            return CaptionedImages(captions=[], embeddings=torch.zeros(0, self.embedding_size))
        with self._inference():
            written = write_captions(
                captioner,
                self._pixels(images),
                self.tokenizer,
                options,
                seeds=_image_seeds(images, options.seed) if options.sample else (),
                has_attention=has_attention,
            )
        # normalised again in float32, as `embed_images` does
        embeddings = nn.functional.normalize(written.image_embeddings.float(), dim=-1).cpu()
        return CaptionedImages(captions=_decoded(written, self.tokenizer), embeddings=embeddings)

    @torch.inference_mode()
    def text_log_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        """Mean log-likelihood of each text's tokens given each image, in nats, on the CPU.

        Raises:
            UsageError: the model has no decoder.
        """
        captioner = self._captioner()
        tokens = torch.from_numpy(self.tokenizer.encode(list(texts))).to(self.device)
        with self._inference():
            # whole rows: the decoder's class token is at their end
            return text_log_likelihoods(captioner, self._pixels(images), tokens, pad_token=self.tokenizer.pad_token)

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits."""
        return float(self.network.get_parameter("logit_scale").detach().exp())

    def check_can_caption(self) -> None:
        """Before images are read for it.

        Raises:
            UsageError: the model has no caption decoder.
        """
        if not self.can_caption:
            raise UsageError(f"{self.name} has no caption decoder; train one, e.g. vlm train tiny-coca.")

    def _captioner(self) -> Captioner:
        self.check_can_caption()
        return cast(Captioner, self.network)

    def _pixels(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return normalise(images.to(self.device, non_blocking=True), self.view)

    def _inference(self) -> torch.autocast:
        return autocast_to(self.precision, self.device)


def _decoded(written: WrittenCaptions, tokenizer: Tokenizer) -> list[list[DecodedCaption]]:
    lengths = written.lengths.tolist()
    values = written.log_likelihoods.tolist()
    captions: list[list[DecodedCaption]] = []
    for image, rows in enumerate(written.tokens.tolist()):
        of_image: list[DecodedCaption] = []
        for number, row in enumerate(rows):
            tokens = row[: lengths[image][number]]
            attention = None
            if written.attention is not None:
                attention = written.attention[image, number, : len(tokens)].float().cpu()
            caption = DecodedCaption(
                text=tokenizer.decode(tokens),
                log_likelihood=values[image][number],
                tokens=tuple(tokens),
                attention=attention,
            )
            of_image.append(caption)
        captions.append(of_image)
    return captions


def _image_seeds(images: UInt8[Tensor, "B 3 H W"], seed: int) -> list[int]:
    """A number of 64 bits of each image's pixels and the seed, so that neither order nor batch has an influence."""
    seeds: list[int] = []
    for image in images.cpu():
        digest = content_digest(str(seed).encode() + image.contiguous().numpy().tobytes(), size=8)
        seeds.append(int.from_bytes(digest, "little"))
    return seeds


def autocast_to(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast for a lower precision; float32 disables it."""
    is_lower = precision != torch.float32
    return torch.autocast(device.type, dtype=precision if is_lower else None, enabled=is_lower)


def normalise(images: UInt8[Tensor, "B 3 H W"], view: EvalTransform) -> Float32[Tensor, "B 3 H W"]:
    """Bytes of colour to the floats the network was trained on: (x / 255 - mean) / std."""
    mean = torch.tensor(view.mean, device=images.device)
    std = torch.tensor(view.std, device=images.device)
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return _scaled(images, mean.view(3, 1, 1), std.view(3, 1, 1))
    # by whole rows of an image: with three values at a time a CPU's vector units would be almost empty
    width = images.shape[3]
    rows = images.permute(0, 2, 3, 1).flatten(2)
    return _scaled(rows, mean.repeat(width), std.repeat(width)).unflatten(2, (width, 3)).permute(0, 3, 1, 2)


def _scaled(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.float().div_(255).sub_(mean).div_(std)


# open_clip's, and that of Hugging Face's transformers
_QUICK_ACTIVATIONS = frozenset({"QuickGELU", "QuickGELUActivation"})


def space_fingerprint(network: nn.Module, view: EvalTransform, tokenizer: Tokenizer) -> str:
    """Identity of an embedding space, the same wherever and however its weights are stored."""
    return weights_fingerprint(network, view.identity(), tokenizer.fingerprint())


def weights_fingerprint(network: nn.Module, *inputs: bytes | str) -> str:
    """Identity of what weights make of their inputs. inputs: the identities of what prepares them."""
    parts: list[bytes | str] = [*inputs]
    for name, tensor in sorted(network.state_dict().items()):  # sorted, since the order depends on how it was built
        values = tensor.detach().cpu().contiguous()
        parts += [
            name,
            str(values.dtype),
            str(tuple(values.shape)),
            values.flatten().view(torch.uint8).numpy().tobytes(),
        ]
    # the same weights embed otherwise under another activation; nothing is added for GELU, so that fingerprints last
    if any(type(module).__name__ in _QUICK_ACTIVATIONS for module in network.modules()):
        parts.append("QuickGELU")
    return compute_fingerprint(*parts)
