import json
from typing import Any

import pytest
import torch

from vlm.errors import UsageError
from vlm.models.towers.bag_of_words import hash_ngrams
from vlm.models.towers.language_model import FrozenLanguageTower, complete_lm, lm_fingerprint, read_prompts
from vlm.models.towers.tower import pool_states, text_mask
from vlm.models.towers.tower_config import parse_tower_options, read_text_config
from vlm.models.towers.tower_registry import build_text_tower, resolve_tower_configs
from vlm.train.metrics import FlopCounter

ROWS = torch.tensor([[90, 5, 6, 7, 91, 0, 0, 0], [90, 8, 91, 0, 0, 0, 0, 0], [90, 5, 9, 10, 11, 12, 13, 91]])
IDS: dict[str, Any] = {"context_length": 8, "vocab_size": 100, "pad_id": 0, "eos_id": 91}


def make(tower, *, embed_dim=6, seed=0, **options) -> Any:
    values = resolve_tower_configs(
        {
            "embed_dim": embed_dim,
            "vision_cfg": {"tower": "timm:test_vit"},
            "text_cfg": {"tower": tower, **IDS, **options},
        }
    )
    torch.manual_seed(seed)
    return build_text_tower(values["text_cfg"], embed_dim)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with tiny models of transformers: BERT, GPT-2, Llama and T5."""
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, T5Config

    root = tmp_path_factory.mktemp("models")
    small: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 90, "eos_token_id": 91}
    layers: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    configs = {
        "bert": BertConfig(**layers, vocab_size=100, max_position_embeddings=32),
        "gpt2": GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "llama": LlamaConfig(**small, **layers, max_position_embeddings=32),
        "t5": T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        kind = AutoModelForCausalLM if name in ("gpt2", "llama") else AutoModel
        kind.from_config(config).save_pretrained(root / name)
    return root


def test_text_reaches_from_the_first_to_the_last_token_that_is_no_padding():
    rows = torch.tensor([[0, 3, 0, 4, 0], [0, 0, 0, 0, 0], [5, 0, 0, 0, 0]])
    expected = [[False, True, True, True, False], [False] * 5, [True, False, False, False, False]]
    assert text_mask(rows, 0).tolist() == expected


def test_states_are_pooled_over_the_text_alone():
    states = torch.arange(12.0).reshape(1, 6, 2)
    mask = torch.tensor([[False, True, True, True, False, False]])
    assert pool_states(states, mask, "mean").tolist() == [[4.0, 5.0]]
    assert pool_states(states, mask, "last").tolist() == [[6.0, 7.0]]
    assert pool_states(states, mask, "cls").tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_bag_is_the_mean_or_sum_of_its_entries_projected(reduce):
    tower = make("bag", width=4, reduce=reduce)
    entries = tower.table.weight[[90, 8, 91]]
    pooled = entries.mean(dim=0) if reduce == "mean" else entries.sum(dim=0)
    assert torch.allclose(tower(ROWS)[1], tower.head(pooled), atol=1e-6)


def test_entries_begin_at_the_length_asked_for():
    unit, short = make("bag", width=64), make("bag", width=64, entry_length=0.02)
    assert torch.allclose(short.table.weight, 0.02 * unit.table.weight, rtol=1e-4)
    assert unit.table.weight.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_a_bag_has_no_order_and_n_grams_have():
    swapped = ROWS[:1].clone()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    bag, ngram = make("bag"), make("ngram", table_size=4096)
    assert torch.allclose(bag(ROWS[:1]), bag(swapped), atol=1e-6)
    assert not torch.allclose(ngram(ROWS[:1]), ngram(swapped), atol=1e-3)


def test_n_grams_of_a_row_are_those_of_its_text():
    tower = make("ngram", width=4, orders=(1, 2), table_size=512)

    def place(*tokens):
        hashed = len(tokens)
        for token in tokens:
            hashed = (hashed * 0x9E3779B1 + token + 1) % 2**31
        hashed = ((hashed ^ (hashed >> 15)) * 0x9E3779B1) % 2**31
        return (hashed ^ (hashed >> 13)) % 512

    places = [place(90), place(8), place(91), place(90, 8), place(8, 91)]
    expected = tower.head(tower.table.weight[places].mean(dim=0))
    assert torch.allclose(tower(ROWS)[1], expected, atol=1e-6)


def test_n_grams_are_spread_over_the_table():
    pairs = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    used = hash_ngrams(pairs, 2, 4096)[:, 0].unique().numel()
    assert used == pytest.approx(4096 * (1 - (1 - 1 / 4096) ** 3600), rel=0.03)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bag", "ngram"])
def test_padding_changes_nothing_and_every_trained_weight_has_a_gradient(name, folders):
    tower = make(name if name in ("bag", "ngram") else f"hf:{folders / name}").train()
    longer = torch.nn.functional.pad(ROWS, (0, 4))
    assert torch.allclose(tower(ROWS), tower(longer), atol=1e-5)
    tower(ROWS).square().sum().backward()
    assert not [key for key, each in tower.named_parameters() if each.requires_grad and each.grad is None]


def test_a_causal_model_is_pooled_at_the_last_token_and_an_encoder_by_the_mean(folders):
    from transformers import AutoModel

    trunk: Any = AutoModel.from_pretrained(folders / "gpt2", dtype=torch.float32).eval()
    tower = make(f"hf:{folders / 'gpt2'}").eval()
    with torch.no_grad():
        expected = trunk(input_ids=ROWS[1:2, :3]).last_hidden_state[:, -1]
        assert torch.allclose(tower(ROWS)[1:2], tower.head(expected), atol=1e-5)
    assert make(f"hf:{folders / 'bert'}").pooling == "mean"


def test_a_vocabulary_with_new_tokens_gets_new_entries(folders):
    tower = make(f"hf:{folders / 'gpt2'}", vocab_size=103)
    assert tower.trunk.get_input_embeddings().weight.shape[0] == 103
    assert torch.isfinite(tower(torch.tensor([[90, 102, 91]]))).all()


def test_locking_a_language_model_leaves_its_last_layers_and_the_projection(folders):
    tower = make(f"hf:{folders / 'bert'}")
    tower.lock(1)
    free = [name for name, each in tower.named_parameters() if each.requires_grad]
    assert {name.rpartition(".")[0] for name in free if name.startswith("trunk")}
    assert all(name.startswith(("trunk.encoder.layer.1.", "head.")) for name in free)


def test_dropout_goes_into_the_hidden_layers_and_none_is_there_unasked(folders):
    plain, dropped = (make(f"hf:{folders / 'bert'}", dropout=each).train() for each in (0.0, 0.5))
    assert torch.equal(plain(ROWS), plain(ROWS))
    assert not torch.equal(dropped(ROWS), dropped(ROWS))


def test_a_frozen_language_model_is_no_part_of_the_state(folders):
    tower = make(f"lm:{folders / 'llama'}")
    assert tower.takes_embeddings
    assert set(tower.state_dict()) == {"language_model_digest", "norm.weight", "norm.bias", "head.1.weight"}
    embedded = tower.embed(ROWS)
    assert embedded.shape == (3, 16)
    assert not embedded.requires_grad
    assert torch.equal(tower(ROWS), tower.project(embedded))
    assert len(list(tower.parameters())) == 3


def test_the_embedding_is_the_language_model_s_last_state(folders):
    from transformers import AutoModel

    trunk: Any = AutoModel.from_pretrained(folders / "llama", dtype=torch.float32).eval()
    tower = make(f"lm:{folders / 'llama'}")
    with torch.no_grad():
        expected = trunk(input_ids=ROWS[1:2, :3]).last_hidden_state[:, -1]
    assert torch.allclose(tower.embed(ROWS)[1:2], expected, atol=1e-5)


def test_counting_flops_leaves_the_language_model_its_weights(folders):
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = make(f"lm:{folders / 'llama'}")

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"text_features": self.text(inputs["tokens"])}

    network = Network()
    expected = network.text.embed(ROWS)
    # it is tried without data first
    assert FlopCounter(network).of({"tokens": ROWS}) > 0
    assert torch.equal(network.text.embed(ROWS), expected)


@pytest.mark.parametrize("facets", ["concat", "mean"])
def test_each_facet_prompt_follows_the_text_without_its_end_token(facets, folders):
    from transformers import AutoModel

    prompts = ((40, 41), (50,))
    values = complete_lm({**IDS, "tower": "lm:x", "facets": facets}, str(folders / "llama"))
    tower = FrozenLanguageTower(read_text_config({**values, "prompts": ("a", "b"), "prompt_tokens": prompts}), 6)
    trunk: Any = AutoModel.from_pretrained(folders / "llama", dtype=torch.float32).eval()
    found = tower.embed(ROWS)
    for row, text in zip(found, ([90, 5, 6, 7], [90, 8], [90, 5, 9, 10, 11, 12, 13]), strict=True):
        with torch.no_grad():
            states = [trunk(input_ids=torch.tensor([[*text, *each]])).last_hidden_state[0, -1] for each in prompts]
        expected = torch.cat(states) if facets == "concat" else (states[0] + states[1]) / 2
        assert torch.allclose(row, expected, atol=1e-5)
    assert tower.embedding_size == found.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_prompts_are_read_in_one_pass_over_the_text(name, folders, monkeypatch):
    prompts = ((40, 41), (50,), (7, 8, 9))
    values = complete_lm({**IDS, "tower": "lm:x"}, str(folders / name))
    tower = FrozenLanguageTower(read_text_config({**values, "prompts": ("a", "b", "c"), "prompt_tokens": prompts}), 6)
    passes = []
    read = tower.language_model.states
    monkeypatch.setattr(tower.language_model, "states", lambda *given: passes.append(given) or read(*given))
    in_one = tower.embed(ROWS)
    assert len(passes) == 1
    monkeypatch.setattr(tower.language_model, "takes_any_mask", lambda length: False)
    apart = tower.embed(ROWS)
    assert len(passes) == 4
    assert torch.allclose(in_one, apart, atol=1e-5)
    # a prompt has no part in the states of another
    alone = FrozenLanguageTower(read_text_config({**values, "prompts": ("b",), "prompt_tokens": prompts[1:2]}), 6)
    assert torch.allclose(in_one[:, 16:32], alone.embed(ROWS), atol=1e-5)


def test_a_model_that_sees_a_window_only_reads_each_prompt_by_itself(tmp_path):
    from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

    small: dict[str, Any] = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    windowed = MistralConfig(**small, intermediate_size=24, num_key_value_heads=2, sliding_window=8)
    for name, config in (("windowed", windowed), ("alibi", BloomConfig(vocab_size=100, hidden_size=16, n_head=2))):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    language_model = make(f"lm:{tmp_path / 'windowed'}").language_model
    assert language_model.takes_any_mask(8)
    assert not language_model.takes_any_mask(12)
    # ALiBi counts places in the row, so it cannot be told others
    assert not make(f"lm:{tmp_path / 'alibi'}").language_model.takes_any_mask(8)


@pytest.mark.parametrize(
    ("written", "prompts"),
    [
        ("prompts=The colour is", ["The colour is"]),
        ("prompts=['Red, or (green]', \"it's + 5\"]", ["Red, or (green]", "it's + 5"]),
        ("prompts='Where, and when'", ["Where, and when"]),
        ("prompts=@facets.txt", ["It is, say,", "The place:"]),
    ],
)
def test_prompts_are_written_as_a_shell_user_types_them(written, prompts, tmp_path, monkeypatch):
    (tmp_path / "facets.txt").write_text("It is, say,\n\n The place:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tower, options = parse_tower_options(f"lm:models/o'neil,{written},facets=mean")
    assert (tower, options["facets"]) == ("lm:models/o'neil", "mean")
    assert read_prompts(options["prompts"]) == prompts


@pytest.mark.parametrize("prompts", ["@none.txt", "", 5, [""], [3], {"a": 1}])
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(UsageError, match="prompts"):
        read_prompts(prompts)


def test_the_digest_follows_the_model_and_the_prompts(folders):
    digests = set()
    for name, prompts in (("llama", ()), ("gpt2", ()), ("llama", ((40,),)), ("llama", ((41,),))):
        values = complete_lm({**IDS, "tower": "lm:x"}, str(folders / name))
        tower = FrozenLanguageTower(read_text_config({**values, "prompt_tokens": prompts}), 6)
        digests.add(bytes(tower.get_buffer("language_model_digest").tolist()))
    assert len(digests) == 4


def test_another_model_in_the_folder_is_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "gpt2", tmp_path / "lm")
    tower = make(f"lm:{tmp_path / 'lm'}")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    with pytest.raises(UsageError, match="not the language model this tower was made for"):
        tower.embed(ROWS)


def test_the_fingerprint_reads_the_weights(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "gpt2", tmp_path / "lm")
    before = lm_fingerprint(str(tmp_path / "lm"))
    assert before == lm_fingerprint(str(folders / "gpt2"))
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert lm_fingerprint(str(tmp_path / "lm")) != before


@pytest.mark.parametrize(
    ("tower", "options", "message"),
    [
        ("bagg", {}, "did you mean 'bag'"),
        ("bag:3", {}, "takes no name"),
        ("ngram", {"orders": (9,)}, "longer --context-length"),
        ("ngram", {"orders": (0,)}, "from 1"),
        ("ngram", {"entry_length": 0.0}, "more than 0"),
        ("bag", {"widht": 3}, "did you mean 'width'"),
        ("hf:bertt", {}, "did you mean bert"),
        ("hf:bert", {"context_length": 600}, "--context-length 512"),
        ("lm:gpt2", {}, "holds no language model with weights"),
        ("transformer:250x1", {}, "multiple of 32"),
        ("transformer:big", {}, "WIDTHxDEPTH"),
    ],
)
def test_what_cannot_be_built_is_said(tower, options, message):
    with pytest.raises(UsageError, match=message):
        make(tower, **options)
