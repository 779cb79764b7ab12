import json
from typing import Any

import numpy as np
import pytest
import torch

import vlm
from tests.random_model import write_random_model
from vlm.cli.main import main
from vlm.data.shards import expand_shards
from vlm.data.tar import ShardReader
from vlm.models.load import load_model
from vlm.train.history import read_metrics


@pytest.fixture
def teacher(tmp_path, scene_tokenizer) -> str:
    """The folder of a small model."""
    return str(write_random_model(tmp_path / "teacher", "micro", scene_tokenizer))


@pytest.fixture
def language_model(tmp_path) -> tuple[str, Any, Any]:
    """A folder with a tiny causal language model, the model and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unk>", "a", "red", "blue", "green", "circle", "square", "small", "large", "and"]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_embd=12, n_layer=2, n_head=2, n_positions=40)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 1, 0
    model = GPT2Model(config).eval()
    folder = tmp_path / "lm"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


def test_a_table_and_the_next_command_are_told(scene_shards, teacher, tmp_path, capsys):
    shards, out = str(scene_shards / "val"), tmp_path / "out"
    words = ["reinforce", shards, str(out), "--teacher", teacher, "--teacher", teacher, "--views", "2", "--flip", "0.5"]
    assert main([*words, "--crop-scale", "0.7", "1"]) == 0
    shown = capsys.readouterr()
    assert "reinforced" in shown.out
    assert "teacher_image" in shown.out
    assert "--arrays teacher_image teacher_text --crop-scale 0.7 1 --flip 0.5" in shown.err
    reader = ShardReader(expand_shards(str(out))[0])
    image = reader.read(0, arrays=("teacher_image",)).arrays["teacher_image"]
    assert image.shape == (2, 32)
    np.testing.assert_array_equal(image[:, :16], image[:, 16:])
    assert main([*words, "--crop-scale", "0.7", "1"]) == 2
    assert "exists already and is complete" in capsys.readouterr().err


def test_the_text_tower_of_a_model_is_stored_for_machines_and_by_the_call(scene_shards, teacher, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["reinforce", str(scene_shards / "val"), str(out), "--text-model", teacher, "--half", "--json"]
    assert main(words) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert {name: summary[name] for name in ("samples", "reinforced", "bad", "shards", "arrays")} == {
        "samples": 40,
        "reinforced": 40,
        "bad": 0,
        "shards": 1,
        "arrays": {"text_embedding": 16},
    }
    sample = ShardReader(expand_shards(str(out))[0]).read(3, arrays=("text_embedding",))
    captions = [text for texts in sample.captions.values() for text in texts]
    expected = load_model(teacher).embed_texts(captions).numpy()
    assert len(sample.captions) > 1
    np.testing.assert_allclose(sample.arrays["text_embedding"], expected, atol=1e-3)
    called = vlm.reinforce([scene_shards / "val"], tmp_path / "called", text_model=teacher, half=True).to_json()
    measured = {"out", "seconds", "samples_per_second"}
    assert {name for name in called if called[name] != summary[name]} <= measured
    assert called.keys() == summary.keys()


@pytest.mark.parametrize(("pooling", "prompts"), [("", ()), ("mean", ()), ("last", ("red circle", "and"))])
def test_a_language_model_is_read_as_transformers_reads_it(
    scene_shards, language_model, tmp_path, capsys, pooling, prompts
):
    folder, model, tokenizer = language_model
    words = ["reinforce", str(scene_shards / "val"), str(tmp_path / "out"), "--text-model", folder]
    options = [*(["--pooling", pooling] if pooling else []), *(word for text in prompts for word in ("--prompt", text))]
    assert main([*words, *options, "--context-length", "24"]) == 0
    sample = ShardReader(expand_shards(str(tmp_path / "out"))[0]).read(5, arrays=("text_embedding",))

    def states(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0]

    for text, row in zip(
        [text for texts in sample.captions.values() for text in texts], sample.arrays["text_embedding"], strict=True
    ):
        ids = tokenizer(text)["input_ids"]
        if prompts:
            added = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
            expected = torch.cat([states(ids[:-1] + each)[-1] for each in added])
        else:
            expected = states(ids).mean(dim=0) if pooling == "mean" else states(ids)[-1]
        torch.testing.assert_close(torch.from_numpy(row), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "give --teacher MODEL, --text-model, or both"),
        (["--teacher", "nobody"], "There is no model 'nobody'"),
        (["--text-model", "nobody"], "There is no model 'nobody'"),
        (["--text-model", "nobody", "--pooling", "mean"], "nobody is not a folder of a language model"),
        (["--teacher", "TEACHER", "--views", "0"], "views = 0"),
        (["--teacher", "TEACHER", "--crop-scale", "1", "0.5"], "crop_scale = 1 0.5"),
        (["--teacher", "TEACHER", "--flip", "2"], "flip = 2 is not a probability"),
        (["--teacher", "TEACHER", "--batch-size", "0"], "batch_size = 0"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(scene_shards, teacher, tmp_path, capsys, options, expected):
    words = [teacher if word == "TEACHER" else word for word in options]
    assert main(["reinforce", str(scene_shards / "val"), str(tmp_path / "out"), *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_something_else_in_the_way_is_left_alone(scene_shards, teacher, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    words = ["reinforce", str(scene_shards / "val"), str(tmp_path / "out"), "--teacher", teacher]
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_run_learns_the_same_from_stored_embeddings_and_from_the_language_model_itself(
    scene_shards, language_model, tmp_path
):
    folder, shards = language_model[0], str(tmp_path / "out")
    prompts = ["--prompt", "red", "--prompt", "small and"]
    assert (
        main(
            ["reinforce", str(scene_shards / "val"), shards, "--text-model", folder, *prompts, "--context-length", "24"]
        )
        == 0
    )
    losses = []
    for name, arrays in (("stored", ["--arrays", "text_embedding"]), ("online", [])):
        words = ["train", f"vit:32x1/16+lm:{folder},prompts=['red','small and']@16", "--tokenizer", folder, *arrays]
        words += ["--context-length", "24", "--data", shards, "--image-size", "32", "--run", str(tmp_path / name)]
        words += ["--steps", "3", "--batch-size", "8", "--workers", "0", "--precision", "fp32", "--log-every", "1"]
        assert main([*words, "--peak-tflops", "1"]) == 0
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_stored_embeddings_of_another_pooling_prompt_or_length_are_refused(
    scene_shards, language_model, tmp_path, capsys
):
    folder = language_model[0]
    shards = str(tmp_path / "out")
    stored = ["--text-model", folder, "--pooling", "mean", "--context-length", "24"]
    assert main(["reinforce", str(scene_shards / "val"), shards, *stored]) == 0
    capsys.readouterr()

    def train(run: str, options: str, length: str) -> str:
        words = ["train", f"vit:32x1/16+lm:{folder}{options}@16", "--tokenizer", folder, "--context-length", length]
        words += ["--data", shards, "--arrays", "text_embedding", "--image-size", "32", "--run", str(tmp_path / run)]
        code = main([*words, "--steps", "1", "--batch-size", "4", "--workers", "0", "--precision", "fp32"])
        assert code in (0, 2)
        return "" if code == 0 else capsys.readouterr().err.strip().splitlines()[-1]

    assert train("same", ",pooling=mean", "24") == ""
    assert "pooling 'mean' there, 'last' here" in train("pooling", "", "24")
    assert "context_length 24 there, 20 here" in train("length", ",pooling=mean", "20")
    assert "prompts [] there, [[4]] here" in train("prompts", ",pooling=mean,prompts=['red']", "24")
    assert [path.name for path in tmp_path.iterdir() if path.name in ("pooling", "length", "prompts")] == []
