"""A frozen causal language model: as text tower, whose embeddings can be precomputed (FLAME), and as captioner.

It also writes captions from an image's soft prompt (LiMBeR, Merullo et al. 2022, §3): one linear map, the only thing
trained, takes the image tower's patches to the space of the language model's word embeddings; what it makes of an image
stands before the caption as words would. The language model is no part of the network's weights: a model folder names
its folder and its fingerprint.
"""

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.files import compute_fingerprint
from vlm.models.caption_state import CaptionState
from vlm.models.towers.huggingface import build_hf_config, check_length, load_weights, read_hf_config, weight_files
from vlm.models.towers.tower import TextTower, pool_states, projection, text_mask
from vlm.models.towers.tower_config import TextTowerConfig
from vlm.tensor_types import Bool, Float, Int64, Tensor

_CHUNK = 1 << 24


class LazyLanguageModel:
    """A language model in a folder: loaded at its first use, not part of any network, never copied with one."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._model: Any = None

    # EMA teachers and FLOP counts copy the network; billions of frozen weights must not be copied along
    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyLanguageModel":
        return self

    def states(
        self,
        tokens: Int64[Tensor, "B L"],
        mask: Bool[Tensor, "B L"] | Bool[Tensor, "B L L"],
        positions: Int64[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        """The last hidden states in float32, without gradient.

        mask: which tokens are read, in a causal way; or, with the positions of the tokens, which each token sees.
        """
        model = self._on(tokens.device)
        given: dict[str, Tensor] = {"attention_mask": mask.long()}
        if positions is not None:
            # numbers to add rather than truth values: every kind of attention takes them
            lowest = torch.finfo(torch.float32).min
            added = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)[:, None]
            given = {"attention_mask": added, "position_ids": positions}
        # in float32 whatever the run's precision, so that precomputed and online embeddings are the same
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return model(input_ids=tokens, **given).last_hidden_state

    def takes_any_mask(self, length: int) -> bool:
        """Whether each token of rows this long may be told what it sees, and where it stands.

        Not by models without positions as an argument (ALiBi, recurrent ones), nor where a layer sees a window or all
        before it in compressed form, whatever it is told.
        """
        model = self._read()
        config = model.config
        window = getattr(config, "sliding_window", None)
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        is_windowed = window is not None and window < length
        return (
            "position_ids" in inspect.signature(model.forward).parameters
            and layers <= {"full_attention", "sliding_attention"}
            and not is_windowed
        )

    def _on(self, device: torch.device) -> Any:
        model = self._read()
        if device.type != "meta":
            return model.to(device)
        # FLOPs are counted without data, which the model itself must not lose
        with torch.device("meta"):
            return type(model)(model.config).eval().requires_grad_(False)

    def _read(self) -> Any:
        if self._model is None:
            values, weights = read_language_model(self.folder)
            if lm_fingerprint(self.folder) != self.fingerprint:
                raise UsageError(
                    f"{self.folder} is not the language model this tower was made for; restore that one, or give "
                    "its folder in the text_cfg of the model folder."
                )
            # tensors made in inference mode could never be used in training
            with torch.inference_mode(False):
                self._model = self._load(values, weights).eval().requires_grad_(False)
        return self._model

    def _load(self, values: dict[str, Any], weights: str) -> Any:
        return load_weights(build_hf_config(values, use_cache=False), weights)


class FrozenLanguageTower(TextTower):
    """FLAME (Cao et al. 2024): a frozen language model embeds the text, a head projects it to the joint space.

    The model's weights are not part of the state; a digest of what the embeddings depend on is, so that spaces of
    different models are told apart. embedding_size: E.
    """

    takes_embeddings = True

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.language_model = LazyLanguageModel(config.folder, config.lm_fingerprint)
        self.pad_id = config.pad_id
        self.end_id = config.eos_id
        self.pooling = config.pooling
        self.prompts = config.prompt_tokens
        self.facets = config.facets
        copies = len(self.prompts) if self.prompts and config.facets == "concat" else 1
        self.embedding_size = config.lm_width * copies
        self.norm = nn.LayerNorm(self.embedding_size)
        self.head = projection(self.embedding_size, config.hidden, embed_dim, config.dropout)
        digest = compute_fingerprint(config.lm_fingerprint, repr(self.prompts), config.facets, config.pooling)
        # a buffer, so that it is part of state_dict and of the fingerprint
        self.register_buffer("language_model_digest", torch.tensor(list(digest.encode()), dtype=torch.uint8))

    def embed(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """The language model's embeddings of the texts: the pooled state, or that at the end of each facet prompt.

        A prompt follows the text, whose end token is left out (FLAME, Cao et al. 2024, §3.2). All prompts are read in
        one pass over the shared text: a prompt's tokens see the text and their own prompt alone, at the places they
        would have right after the text (facet-decoupled attention). Models that cannot be told so read each prompt by
        itself, which gives the same.
        """
        mask = text_mask(tokens, self.pad_id)
        if not self.prompts:
            return pool_states(self.language_model.states(tokens, mask), mask, self.pooling)
        lengths = mask.sum(dim=1)
        last = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        # the prompt follows the text itself
        lengths = lengths - (last == self.end_id).long()
        length = tokens.shape[1] + sum(map(len, self.prompts))
        # a single prompt needs no mask of its own
        if len(self.prompts) > 1 and self.language_model.takes_any_mask(length):
            facets = self._facets_in_one_pass(tokens, lengths)
        else:
            facets = [self._facet(tokens, lengths, prompt) for prompt in self.prompts]
        return torch.cat(facets, dim=1) if self.facets == "concat" else torch.stack(facets).mean(dim=0)

    def _facets_in_one_pass(
        self, tokens: Int64[Tensor, "B L"], lengths: Int64[Tensor, " B"]
    ) -> list[Float[Tensor, "B C"]]:
        facet_sizes = torch.tensor([len(prompt) for prompt in self.prompts], device=tokens.device)
        prompt_tokens = [torch.tensor(prompt, device=tokens.device) for prompt in self.prompts]
        rows = torch.cat([tokens, torch.cat(prompt_tokens).expand(len(tokens), -1)], dim=1)
        numbers = torch.arange(rows.shape[1], device=tokens.device)
        # 0 for the text, then the number of the prompt
        facet = torch.zeros_like(numbers)
        facet[tokens.shape[1] :] = torch.repeat_interleave(facet_sizes).add(1)
        starts = tokens.shape[1] + facet_sizes.cumsum(0) - facet_sizes
        offsets = numbers[tokens.shape[1] :] - torch.repeat_interleave(starts, facet_sizes)
        positions = torch.cat([numbers[: tokens.shape[1]].expand(len(tokens), -1), lengths[:, None] + offsets], dim=1)

        is_read = (numbers < lengths[:, None]) | (facet > 0)
        is_shared = (facet == 0) | (facet == facet[:, None])
        sees = is_shared & (numbers <= numbers[:, None])
        # padding sees itself, since a softmax over nothing is not a number
        mask = (sees & is_read[:, None]) | (numbers == numbers[:, None])
        states = self.language_model.states(rows, mask, positions)
        return list(states[:, starts + facet_sizes - 1].unbind(1))

    def _facet(
        self, tokens: Int64[Tensor, "B L"], lengths: Int64[Tensor, " B"], prompt: tuple[int, ...]
    ) -> Float[Tensor, "B C"]:
        added = torch.tensor(prompt, device=tokens.device).expand(len(tokens), -1)
        longer = nn.functional.pad(tokens, (0, len(prompt)), value=self.pad_id)
        # right after each text, whose padding it overwrites
        positions = lengths[:, None] + torch.arange(len(prompt), device=tokens.device)
        longer = longer.scatter(1, positions, added)
        mask = torch.arange(longer.shape[1], device=tokens.device) < (lengths + len(prompt))[:, None]
        return pool_states(self.language_model.states(longer, mask), mask, "last")

    def project(self, embeddings: Float[Tensor, "B E"]) -> Float[Tensor, "B D"]:
        """Embeddings to vectors of the joint space, not normalised."""
        return self.head(self.norm(embeddings.to(self.norm.weight.dtype)))

    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised; reads the language model."""
        return self.project(self.embed(tokens))


def build_lm(config: TextTowerConfig, name: str, embed_dim: int) -> TextTower:
    """`lm:FOLDER`.

    Raises:
        UsageError: the configuration was not completed from the folder (`complete_lm`).
    """
    if not (config.lm_fingerprint and config.lm_width):
        raise UsageError(f"{config.tower}: the language model's fingerprint and width are missing; name its folder.")
    return FrozenLanguageTower(config, embed_dim)


def complete_lm(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The text_cfg of `lm:FOLDER` with what must be known of the folder.

    Raises:
        UsageError: the folder holds no causal language model with weights, or captions and prompts are too long for it.
    """
    hf_config, _ = read_language_model(name)
    config = build_hf_config(hf_config)
    prompts = read_prompts(values.get("prompts", ()))
    tokens = _prompt_tokens(name, prompts)
    longest = max((len(prompt) for prompt in tokens), default=0)
    check_length(f"lm:{name}", config, values.get("context_length", 1) + longest)
    return {
        **values,
        "folder": str(Path(name).resolve()),
        "lm_fingerprint": lm_fingerprint(name),
        "lm_width": int(config.hidden_size),
        "pooling": values.get("pooling") or "last",
        **({"prompts": prompts, "prompt_tokens": tokens} if prompts else {}),
    }


def read_language_model(folder: str) -> tuple[dict[str, Any], str]:
    """Configuration and weights of a language model's folder.

    Raises:
        UsageError: it holds no weights.
    """
    values, weights = read_hf_config(folder)
    if not weights:
        raise UsageError(f"{folder} holds no language model with weights; a frozen one needs them.")
    return values, weights


def lm_fingerprint(folder: str) -> str:
    """Identity of a language model: its configuration and the bytes of its weights."""
    from hashlib import blake2b

    digest = blake2b((Path(folder) / "config.json").read_bytes(), digest_size=16)
    for path in weight_files(Path(folder)):
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def read_prompts(prompts: Any) -> list[str]:
    """Facet prompts as they are written: a list, one text, or `@FILE` with one a line.

    Raises:
        UsageError: the file cannot be read, or a prompt is no text or empty.
    """
    if isinstance(prompts, str) and prompts.startswith("@"):
        try:
            lines = Path(prompts[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The prompts {prompts[1:]!r} cannot be read: {error}.") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UsageError("The file of prompts is empty; write one a line.")
    entries: list[Any] = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
    for text in entries:
        if not isinstance(text, str) or not text.strip():
            raise UsageError(
                f"prompts = {prompts!r} is not a text or a list of texts; write prompts=['The colour is','It shows'], "
                "or prompts=@FILE with one a line."
            )
    return entries


def _prompt_tokens(folder: str, prompts: list[str]) -> list[list[int]]:
    if not prompts:
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no tokenizer for the facet prompts: {error}") from error
    return [list(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts]


LIMBER = "limber"


class LazyWriter(LazyLanguageModel):
    """A causal language model with its output layer, which gradients pass through and do not change."""

    def embed(self, tokens: Int64[Tensor, "*B L"]) -> Float[Tensor, "*B L C"]:
        """Embeddings of words; an id beyond the model's own, the padding, counts as its last."""
        table = self._on(tokens.device).get_input_embeddings()
        return table(tokens.clamp(max=table.num_embeddings - 1))

    def run(self, embeddings: Float[Tensor, "R L C"], past: Any = None) -> Any:
        """The model's output for embeddings of words, after those of a cache if there is one."""
        model = self._on(embeddings.device)
        # trained weights are float32, whatever the map to them is
        return model(inputs_embeds=embeddings.to(model.dtype), past_key_values=past, use_cache=past is not None)

    def _load(self, values: dict[str, Any], weights: str) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{weights} holds no causal language model: {error}") from error


class PromptedTower(TextTower):
    """Words as a frozen language model reads them.

    The text's vector, which LiMBeR has none of, is the projected mean of its words' embeddings.
    """

    cls_emb = None

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.language_model = LazyWriter(config.folder, config.lm_fingerprint)
        self.pad_id = config.pad_id
        self.context_length = config.context_length
        self.head = nn.Linear(config.lm_width, embed_dim, bias=False)
        digest = compute_fingerprint(config.lm_fingerprint, LIMBER)
        # a buffer, so that it is part of state_dict and of the fingerprint
        self.register_buffer("language_model_digest", torch.tensor(list(digest.encode()), dtype=torch.uint8))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Int64[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L C"]]:
        """Vectors of the joint space, not normalised, and the words' embeddings."""
        states = self.language_model.embed(tokens)
        pooled = pool_states(states, text_mask(tokens, self.pad_id), "mean")
        return self.head(pooled.to(self.head.weight.dtype)), states


class SoftPromptDecoder(nn.Module):
    """The language model after a soft prompt."""

    def __init__(self, language_model: LazyWriter, vocab_size: int) -> None:
        super().__init__()
        self._language_model = language_model
        self._vocab_size = vocab_size

    def forward(self, memory: Float[Tensor, "B M C"], states: Float[Tensor, "B L C"]) -> Float[Tensor, "B L V"]:
        """Logits of the next token at each word."""
        words = torch.cat([memory.to(states.dtype), states], dim=1)
        logits = self._language_model.run(words).logits[:, memory.shape[1] :]
        return self.widened(logits)

    def widened(self, logits: Float[Tensor, "*B U"]) -> Float[Tensor, "*B V"]:
        """With ids that the tokenizer has beyond the model's, which are never written."""
        missing = self._vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min) if missing > 0 else logits

    def begin_captions(self, memory: Float[Tensor, "B M C"], text: PromptedTower) -> CaptionState:
        """One empty caption of each image, with the model's own cache."""
        return cast(CaptionState, _PromptedState(self, self._language_model, memory, text))


class _PromptedState:
    """Captions being written by a language model: rows of its cache, those of an image one after the other."""

    attention = None

    def __init__(self, decoder: SoftPromptDecoder, writer: LazyWriter, memory: Tensor, text: PromptedTower) -> None:
        from transformers import DynamicCache

        self._decoder = decoder
        self._writer = writer
        self._text = text
        self._num_rows = 1
        self._past = DynamicCache()
        writer.run(memory, self._past)

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        words = self._writer.embed(tokens.flatten()[:, None])
        logits = self._writer.run(words, self._past).logits[:, -1]
        return self._decoder.widened(logits.float()).unflatten(0, tokens.shape)

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        self._past.batch_select_indices((images[:, None] * self._num_rows + rows).flatten())
        self._num_rows = rows.shape[1]


def complete_limber(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The text_cfg of `limber:FOLDER` with what must be known of the language model.

    Raises:
        UsageError: the folder holds no causal language model with weights.
    """
    return values if values.get("lm_fingerprint") else complete_lm(values, name)


def build_limber(config: TextTowerConfig, name: str, embed_dim: int) -> PromptedTower:
    """`limber:FOLDER` without its decoder."""
    return PromptedTower(config, embed_dim)
