import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel, build_network, enable_padding_trim, model_config
from vlm.train.bfloat16 import compute_in_bfloat16
from vlm.train.metrics import FlopCounter
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, LossOptions
from vlm.train.run_config import ModelConfig, ObjectiveConfig
from vlm.train.task import LOSS_TERMS, OUTPUT_HEADS, TrainingTask, build_task, parse_objective

SIZE, LENGTH, PAD = 32, 24, 0
SENTENCES = torch.tensor([[[1, 9, 2, 0], [1, 8, 7, 2]], [[1, 6, 2, 0], [0, 0, 0, 0]], [[1, 5, 4, 2], [1, 3, 2, 0]]])


def model_of(name="micro-coca", **changes) -> Any:
    torch.manual_seed(0)
    config = model_config(name) | changes
    return VisionLanguageModel(
        name=name,
        network=build_network(config),
        config=config,
        view=EvalTransform(size=SIZE),
        tokenizer=open_tokenizer("clip", LENGTH),
    )


def options_of(**changes):
    return LossOptions(config=dataclasses.replace(ObjectiveConfig(), **changes), pad_token=PAD)


def task_of(expression, model=None, **changes):
    return build_task(model or model_of(), parse_objective(expression), options_of(**changes))


def inputs_of(count=3):
    draw = torch.Generator().manual_seed(4)
    tokens = torch.zeros(count, LENGTH, dtype=torch.int64)
    for row in range(count):
        tokens[row, : 4 + row] = torch.tensor([1, *torch.randint(3, 200, (2 + row,), generator=draw), 2])
    return {
        "pixels": torch.randn(count, 3, SIZE, SIZE, generator=draw),
        "tokens": tokens,
        "rows": torch.arange(40, 40 + count),
        "same": torch.arange(1, count + 1)[:, None],
        "sub_tokens": F.pad(SENTENCES[:count], (0, LENGTH - 4)),
        "local_pixels": torch.randn(count, 2, 3, 16, 16, generator=draw),
        "global_target": torch.randn(count, 32, generator=draw),
        "class_label": torch.arange(count) % 2,
        "teacher_image": torch.randn(count, 12, generator=draw),
        "teacher_text": torch.randn(count, 12, generator=draw),
        "text_embedding": torch.randn(count, 12, generator=draw),
        "image_average": torch.full((count,), torch.nan),
        "text_average": torch.full((count,), torch.nan),
        "inner_rate": torch.ones(count),
    }


def loss_of(task, expression, options, inputs):
    outputs = task(inputs)
    total = torch.zeros(())
    for part in parse_objective(expression):
        loss = part.term.batch_level or part.term.sample_level
        assert loss is not None
        total = total + part.weight * loss(outputs, inputs, options)
    return total


def test_every_output_a_term_reads_has_one_maker():
    read = {name for term in LOSS_TERMS.values() for name in term.outputs} - SHARED_OUTPUTS
    made = [name for output_head in OUTPUT_HEADS for name in output_head.provides]
    assert read <= set(made)
    assert len(made) == len(set(made))


def test_a_captioners_outputs_are_open_clips():
    model = model_of()
    task = task_of("clip + caption", model).eval()
    inputs = inputs_of()
    made, wanted = task(inputs), model.network(inputs["pixels"], inputs["tokens"])
    assert torch.equal(made["labels"], wanted["labels"])
    for name in ("image_features", "text_features", "logits", "logit_scale"):
        assert torch.allclose(made[name], wanted[name], atol=1e-6)


def test_a_dual_encoders_outputs_are_open_clips():
    model = model_of("micro")
    made = task_of("siglip", model).eval()(inputs_of())
    images, texts = model.network.encode_image(inputs_of()["pixels"]), model.network.encode_text(inputs_of()["tokens"])
    assert torch.allclose(made["image_features"], F.normalize(images, dim=-1), atol=1e-6)
    assert torch.allclose(made["text_features"], F.normalize(texts, dim=-1), atol=1e-6)
    assert float(made["logit_bias"].detach()) == 0


def test_each_tower_runs_once_however_many_outputs_are_made_of_it():
    model = model_of()
    task = task_of("clip + caption + grouping + sub_captions + local_to_global", model)
    counted = []
    model.network.visual.transformer.register_forward_hook(lambda *_: counted.append("image"))
    model.network.text.transformer.register_forward_hook(lambda *_: counted.append("text"))
    model.network.text_decoder.register_forward_hook(lambda *_: counted.append("decoder"))
    task(inputs_of())
    assert sorted(counted) == [
        "decoder",
        "image",
        "image",
        "text",
        "text",
    ]  # images and crops, captions and sentences


def test_only_the_named_outputs_are_made():
    task = task_of("clip + caption")
    made = task(inputs_of(), frozenset({"image_features", "text_features"}))
    assert set(made) == {"image_features", "text_features", "logit_scale"}


def test_outputs_without_their_inputs_are_left_out():
    task = task_of("clip + local_to_global + cappa")
    assert task.inputs == {"local_pixels", "rows"}
    inputs = {name: tensor for name, tensor in inputs_of().items() if name in ("pixels", "tokens")}
    assert set(task(inputs)) == {"image_features", "text_features", "logit_scale"}


@pytest.mark.parametrize("correct_cls_mask", [False, True])
def test_an_absent_sentence_is_a_row_of_zeros_and_harms_no_gradient(correct_cls_mask):
    model = model_of()
    model.network.text.correct_cls_mask = correct_cls_mask
    task = task_of("sub_captions", model).train()
    model.network.visual.patch_dropout.prob = 0.0
    made = task(inputs_of())["sub_features"]
    assert made.shape == (3, 2, 32)
    assert not made[1, 1].any()
    alone = F.normalize(model.network.encode_text(inputs_of()["sub_tokens"][2]), dim=-1)
    assert torch.allclose(made[2], alone, atol=1e-5)
    made.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.network.text.parameters() if each.grad is not None)


class BagOfWords(nn.Module):
    """A text tower for rows of any length."""

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(300, 16, mode="sum", padding_idx=PAD)

    def forward(self, tokens):
        return self.words(tokens)


def test_sentences_may_be_shorter_or_longer_than_the_captions():
    model = model_of("micro", custom_text=True)
    model.network.text = BagOfWords()
    task = task_of("sub_captions", model).eval()
    inputs = inputs_of()
    whole = task(inputs)["sub_features"]
    short = task(inputs | {"sub_tokens": SENTENCES})["sub_features"]
    longer = task(inputs | {"tokens": inputs["tokens"][:, :7]})["sub_features"]
    assert torch.allclose(short[0], whole[0], atol=1e-5)
    assert torch.allclose(longer, whole, atol=1e-5)


def test_crops_are_read_by_the_image_tower():
    model = model_of()
    inputs = inputs_of() | {"local_pixels": inputs_of()["pixels"][:, None].repeat(1, 2, 1, 1, 1)}
    made = task_of("local_to_global", model).eval()(inputs)["local_features"]
    assert torch.allclose(made[:, 1], model.network.encode_image(inputs["pixels"]), atol=1e-6)
    assert task_of("local_to_global").eval()(inputs_of())["local_features"].shape == (3, 2, 32)


class StoredText(nn.Module):
    """A text tower whose embeddings are computed beforehand."""

    takes_embeddings = True
    embedding_size = 12

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 16)

    def project(self, embedding):
        return self.head(embedding)


def test_stored_embeddings_stand_for_the_captions_where_the_tower_takes_them():
    model = model_of("micro", custom_text=True)
    model.network.text = StoredText()
    task = task_of("clip", model)
    assert task.inputs == {"text_embedding"}
    made = task(inputs_of())["text_features"]
    assert torch.allclose(made, F.normalize(model.network.text.head(inputs_of()["text_embedding"]), dim=-1))


@pytest.mark.parametrize(
    ("expression", "frozen"),
    [
        ("clip", {"network.text_decoder.ln_final.weight"}),
        ("caption", {"network.logit_scale", "network.visual.proj", "network.text.text_projection"}),
        ("clip + caption", set()),
        ("local_to_global", {"network.text.text_projection", "network.logit_scale"}),
    ],
)
def test_weights_no_term_reads_are_frozen(expression, frozen):
    model = model_of()
    trained = {f"network.{name}" for name, each in model.network.named_parameters() if each.requires_grad}
    task = task_of(expression, model)
    found = trained - {name for name, each in task.named_parameters() if each.requires_grad}
    assert frozen <= found
    assert bool(found) == bool(frozen)
    assert task.training


@pytest.fixture
def alone():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("expression", ["clip", "caption", "clip + cappa", "grouping"])
def test_processes_need_not_search_for_unused_weights(alone, expression):
    """DistributedDataParallel fails in the second step where a trained weight got no gradient in the first."""
    task = task_of(expression)
    wrapped = DistributedDataParallel(task)
    for _ in range(2):
        loss_of(wrapped, expression, task.options, inputs_of()).backward()


@pytest.mark.parametrize("expression", [*LOSS_TERMS, "coca", "dreamlip", "clip + cappa", "clip + local_to_global"])
def test_every_weight_that_is_trained_gets_a_gradient(expression, tmp_path):
    (tmp_path / "classes.json").write_text('["cat", "dog"]', encoding="utf-8")
    options = options_of(text_embedding_size=12, class_field="kind", class_names=str(tmp_path / "classes.json"))
    task = build_task(model_of(), parse_objective(expression), options)
    loss_of(task, expression, options, inputs_of()).backward()
    assert not [name for name, each in task.named_parameters() if each.requires_grad and each.grad is None]


def test_an_objective_the_network_cannot_serve_is_refused_with_the_cure():
    with pytest.raises(UsageError, match=r"reads logits: it needs a network with a decoder, e.g. --architecture"):
        task_of("caption", model_of("micro"))
    with pytest.raises(UsageError, match="image tower with patches"):
        TrainingTask(cast(Any, nn.Identity()), {}, ["patch_features"], options_of(), image_size=SIZE)


def read_value(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.sum().item()


def test_flops_are_those_of_the_width_whatever_is_padding_in_it():
    found: list[float] = []
    for skip_padding in (False, True):
        model = model_of("small")
        assert enable_padding_trim(model.network)
        # what reads a value, as Hugging Face's towers do, is counted on a copy with data
        model.network.get_submodule("text").register_forward_hook(read_value)
        task = build_task(model, parse_objective("clip"), options_of(), skip_padding=skip_padding).train()
        inputs = inputs_of(4)
        inputs["tokens"] = torch.full_like(inputs["tokens"], PAD)
        found.append(FlopCounter(task).of({name: inputs[name] for name in ("pixels", "tokens")}))
    assert found[0] == found[1] > 0


def test_flops_in_bfloat16_are_those_of_a_copy_of_the_network():
    found: list[float] = []
    for is_rounded in (False, True):
        model = model_of("small")
        assert enable_padding_trim(model.network)
        # counted on a copy with data
        model.network.get_submodule("text").register_forward_hook(read_value)
        task = build_task(model, parse_objective("clip"), options_of()).train()
        if is_rounded:
            compute_in_bfloat16(task, torch.device("cpu"), ModelConfig())
        inputs = inputs_of(4)
        found.append(FlopCounter(task).of({name: inputs[name] for name in ("pixels", "tokens")}))
        assert all(weight.grad is None for weight in task.parameters())
    assert found[0] == found[1] > 0


def test_a_captioners_texts_go_together():
    model = model_of("timm:test_vit,image_size=32+cptr:32x2@16")
    assert enable_padding_trim(model.network)
    # else their FLOPs would be counted by length
    assert build_task(model, parse_objective("caption"), options_of(), skip_padding=True).padding is None
