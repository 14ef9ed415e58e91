import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import freeze_decoder
from model.config import ConfigError, RetroConfig
from model.initialization import initialize
from model.retro import Retro, is_retrieval_parameter
from tests.model.test_causality import PAD, K, M, sample, tiny


def test_retrieval_off_is_the_plain_decoder_bit_for_bit():
    model, plain = tiny(), tiny(dec_cross_attention=())
    names = dict(plain.named_parameters())
    own = {n: p for n, p in model.named_parameters() if not is_retrieval_parameter(n)}
    assert own.keys() == names.keys()
    assert all(torch.equal(names[name], p) for name, p in own.items())
    tokens, _, _ = sample(18)
    assert torch.equal(model(tokens, tokens != PAD), plain(tokens, tokens != PAD))


def test_order_of_neighbors_does_not_matter():
    tokens, neighbors, mask = sample(16)
    model = tiny()
    swapped = model(tokens, tokens != PAD, neighbors.flip(2), mask.flip(2))
    torch.testing.assert_close(model(tokens, tokens != PAD, neighbors, mask), swapped)


def test_masked_neighbor_tokens_have_no_effect_and_no_neighbors_give_numbers():
    tokens, neighbors, mask = sample(16)
    model = tiny()
    other = torch.where(mask, neighbors, 7)
    first = model(tokens, tokens != PAD, neighbors, mask)
    assert torch.equal(first, model(tokens, tokens != PAD, other, mask))
    assert torch.isfinite(model(tokens, tokens != PAD, neighbors, torch.zeros_like(mask))).all()


def test_losses_are_cross_entropy_where_the_mask_is():
    tokens, neighbors, mask = sample(16)
    model = tiny()
    labels, chosen = tokens.roll(-1, 1), tokens > 5
    losses = model(tokens, tokens != PAD, neighbors, mask, labels, chosen)
    logits = model(tokens, tokens != PAD, neighbors, mask)[chosen].float()
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels[chosen], reduction="none"))


def test_neighbors_of_another_shape_are_refused():
    tokens, neighbors, mask = sample(16)
    with pytest.raises(ValueError, match=f"need \\[1, 4, K, {2 * M}\\]"):
        tiny()(tokens, tokens != PAD, neighbors[:, :3], mask[:, :3])
    with pytest.raises(ValueError, match="plain decoder"):
        tiny(dec_cross_attention=())(tokens, tokens != PAD, neighbors, mask)


def test_only_retrieval_parts_train_on_a_frozen_decoder():
    tokens, neighbors, mask = sample(16)
    model = tiny()
    freeze_decoder(model)
    model(tokens, tokens != PAD, neighbors, mask).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if is_retrieval_parameter(n)}
    assert neighbors.shape[2] == K


def test_a_weight_depends_on_its_name_and_the_seed_only():
    small, large = tiny(dec_cross_attention=()), tiny(dec_num_layers=4)
    weights = dict(large.named_parameters())
    for name, p in small.named_parameters():
        if "dense.weight" not in name and "4h_to_h.weight" not in name:
            assert torch.equal(p, weights[name]), name
    other = tiny(dec_cross_attention=())
    initialize(other, 1)
    assert not torch.equal(other.word_embeddings.weight, small.word_embeddings.weight)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 15},
        {"dec_cross_attention": (3,)},
        {"enc_cross_attention": (1,)},
        {"enc_num_layers": 0},
        {"vocab_size": 0},
        {"num_attention_heads": 16},
    ],
    ids=str,
)
def test_configurations_that_describe_no_model_are_refused(wrong):
    with pytest.raises(ConfigError):
        tiny(**wrong)


def test_widths_of_heads_can_be_chosen():
    model = tiny(kv_channels=10)
    assert isinstance(model, Retro)
    assert model.layers[0].attention_half.self_attention.dense.weight.shape == (16, 20)
    assert RetroConfig(vocab_size=4, kv_channels=64).rotary_dim == 32


def test_a_text_without_a_whole_chunk_is_the_beginning_of_a_longer_one():
    tokens, neighbors, mask = sample(16)
    model = tiny()
    whole = model(tokens, tokens != PAD, neighbors, mask)[:, : M - 1]
    start = tokens[:, : M - 1]
    torch.testing.assert_close(model(start, start != PAD, neighbors[:, :0], mask[:, :0]), whole)
