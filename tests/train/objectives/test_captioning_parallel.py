import pytest
import torch
from torch.nn import functional as F

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.coca import mask_width, parallel_logits
from vlm.models.model import VisionLanguageModel, build_network, model_config
from vlm.models.patch_features import run_image_tower
from vlm.train.objectives.captioning import CAPPA, add_mask_embedding, cappa, choose_parallel_captions
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run_config import ObjectiveConfig

OPTIONS = LossOptions(config=ObjectiveConfig(), pad_token=0)
TOKENS = torch.tensor([[1, 9, 8, 7, 2, 0, 0], [1, 30, 2, 0, 0, 0, 0], [1, 11, 12, 13, 14, 15, 2]])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_network(model_config("micro-coca")).double().eval()


def run(network, tokens, is_parallel, mask=None):
    pixels = torch.randn(len(tokens), 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    mask = torch.full((mask_width(network),), 0.1).double() if mask is None else mask
    memory = run_image_tower(network, pixels).memory
    assert memory is not None
    return pixels, *parallel_logits(network, memory, tokens, mask, torch.tensor(is_parallel), pad_token=0)


def test_token_by_token_it_is_open_clips_captioner(network):
    pixels, logits, labels = run(network, TOKENS, [False] * 3)
    made = network(pixels, F.pad(TOKENS, (0, 24 - 7)))
    assert torch.equal(labels, made["labels"])
    assert torch.allclose(logits[labels != 0], made["logits"][labels != 0], atol=1e-10)


def test_gradient_checkpointing_changes_nothing(network):
    _, plain, _ = run(network, TOKENS, [True, False, True])
    network.set_grad_checkpointing(True)
    assert torch.allclose(run(network, TOKENS, [True, False, True])[1], plain, atol=1e-12)


def test_a_caption_predicted_at_once_knows_the_image_alone(network):
    _, logits, _ = run(network, TOKENS, [True, False, True])
    _, others, _ = run(network, TOKENS.flip(1), [True, False, True])
    assert torch.allclose(logits[[0, 2]], others[[0, 2]], atol=1e-12)
    assert not torch.allclose(logits[1], others[1], atol=1e-3)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_nothing_hides_a_later_place_from_an_earlier_one(network):
    """The position of the last place moves the logits of the first, but only where all is predicted at once."""
    _, before, _ = run(network, TOKENS, [True, False, False])
    with torch.no_grad():
        network.text.positional_embedding[20] += torch.randn(32)
    _, after, _ = run(network, TOKENS, [True, False, False])
    assert not torch.allclose(before[0, 0], after[0, 0], atol=1e-4)
    assert torch.allclose(before[1:, :20], after[1:, :20], atol=1e-12)


def test_it_equals_a_decoder_without_causal_masks(network):
    """All rows at once, as open_clip's own modules run when their masks are emptied and the tokens are one word."""
    network.text.cls_emb = None
    network.text.ln_final = torch.nn.Identity()  # which open_clip applies only where there is no class token
    pixels, logits, _ = run(network, TOKENS, [True] * 3, mask=network.text.token_embedding.weight[5].detach())
    network.text.attn_mask = None
    network.text.pool_type = "last"
    network.text_decoder.attn_mask.zero_()
    _, states = network.text(torch.full((3, 23), 5))
    wanted = network.text_decoder(run_image_tower(network, pixels).memory, states)
    assert torch.allclose(logits, wanted, atol=1e-10)


def test_captions_cut_to_the_longest_of_their_batch_give_the_same(network):
    _, short, labels = run(network, TOKENS[1:2, :3], [True])
    _, long, more = run(network, TOKENS[1:2], [True])
    assert torch.equal(short, long)
    assert torch.equal(labels, more)


def test_a_part_draws_what_the_whole_draws():
    rows = torch.arange(1000, 1400)
    whole = choose_parallel_captions(rows, 0.75)
    assert torch.equal(torch.cat([choose_parallel_captions(part, 0.75) for part in rows.split(7)]), whole)
    assert float(whole.double().mean()) == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize(("share", "drawn"), [(0.0, 0), (1.0, 500)])
def test_all_or_none_may_be_predicted_at_once(share, drawn):
    assert int(choose_parallel_captions(torch.arange(500), share).sum()) == drawn


def test_the_loss_is_a_sum_over_tokens_that_are_there():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([[3, 4, 0], [5, 0, 0]])
    outputs = {"parallel_logits": logits, "parallel_labels": labels}
    by_hand = -(logits[0].log_softmax(-1)[[0, 1], [3, 4]].sum() + logits[1].log_softmax(-1)[0, 5])
    assert torch.allclose(cappa(outputs, {}, OPTIONS), by_hand, rtol=0, atol=1e-12)
    assert int(CAPPA.normaliser({"tokens": torch.tensor([[1, 3, 4, 0], [1, 5, 0, 0]])}, OPTIONS)) == 3


def test_a_network_without_a_decoder_is_refused():
    model = VisionLanguageModel(
        name="micro",
        network=build_network(model_config("micro")),
        config=model_config("micro"),
        view=EvalTransform(size=32),
        tokenizer=open_tokenizer("clip", 24),
    )
    with pytest.raises(UsageError, match="tiny-coca"):
        add_mask_embedding(model, OPTIONS)
