"""The same properties for NeMo's function and for modern decoders, and what tells them apart."""

from math import sqrt

import pytest
import torch

from model import head
from model.attention import Mask, attend, windows
from model.block_attention import attend_blocks, block_mask
from model.config import ConfigError
from model.retro import causal_mask, document_segments
from model.rotary import rotary_table
from tests.model.test_causality import (
    EOD,
    PAD,
    VOCABULARY,
    K,
    M,
    definition,
    dependencies,
    sample,
    tiny,
)

MODERN = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "rotary_percentage": 1.0,
    "rope_theta": 500000.0,
    "share_embeddings_and_output_weights": False,
    "tokens_head_bias": False,
    "enc_width_ratio": 0.5,
}
FAMILIES = [pytest.param({}, id="nemo"), pytest.param(MODERN, id="modern")]


def run(model, tokens, neighbors, mask):
    return model(tokens, tokens != PAD, neighbors, mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", [1, 2])
def test_chunked_cross_attention_is_the_paper_s_equations_token_by_token(family, version):
    """C_CA(h)_t = sum over the neighbors of chunk (t + 1) // m - 1 of softmax(q k) v."""
    torch.manual_seed(0)
    model = tiny(version=version, **(family | {"enc_width_ratio": 1.0}))
    config, length = model.config, 4 * M + 3
    attention = model.layers[1].feed_forward_half.cross_attention
    tokens, neighbors, mask = sample(length)
    tokens[0] = torch.arange(2, 2 + length) % (VOCABULARY - 2) + 2  # one document, no pads
    seen = {}
    attention.register_forward_hook(lambda _m, given, out: seen.update(x=given[0], out=out))
    model.encoder.register_forward_hook(lambda _m, _given, out: seen.update(encoded=out))
    run(model, tokens, neighbors, mask)
    p, groups = config.head_dim, config.decoder_shape.num_query_groups
    q = attention.query(seen["x"])[0].view(length, -1, p)
    k, v = attention.key_value(seen["encoded"]).view(4, K, 2 * M, groups, 2, p).unbind(4)
    for t in range(length):
        u = (t + 1) // M - 1
        heads = torch.zeros(q.shape[1], p, dtype=q.dtype)
        for h in range(q.shape[1] if u >= 0 else 0):
            g = h * groups // q.shape[1]
            query = turned(q[t, h], t - (u * M + M - 1), config)
            first = -(M - 1) if version == 2 else 0
            pairs = [(n, r) for n in range(K) for r in range(2 * M) if mask[0, u, n, r]]
            keys = torch.stack([turned(k[u, n, r, g], r + first, config) for n, r in pairs])
            weights = torch.softmax(keys @ query / sqrt(p), dim=0)
            heads[h] = sum(w * v[u, n, r, g] for w, (n, r) in zip(weights, pairs, strict=True))
        torch.testing.assert_close(attention.dense(heads.flatten()), seen["out"][0, t])


@pytest.mark.parametrize("version", [1, 2])
def test_dependencies_of_a_modern_decoder_are_exactly_the_definition(version):
    torch.manual_seed(0)
    tokens, neighbors, mask = sample(18)
    found = dependencies(tiny(version=version, **MODERN), tokens, neighbors, mask)
    expected = definition(tokens, mask, reset=True)
    for t in (t for t in range(18) if tokens[0, t] != PAD):
        assert found[t] == expected[t], f"position {t}"


def turned(x, position, config):
    """Rotary positions as products of complex numbers."""
    half = config.rotary_dim // 2
    z = torch.complex(x[:half], x[half : 2 * half])
    k = torch.arange(half, dtype=x.dtype)
    z = z * torch.exp(1j * position * config.rope_theta ** (-2 * k / config.rotary_dim))
    return torch.cat([z.real, z.imag, x[2 * half :]])


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbors_in_any_order_and_more_missing_ones_change_nothing(family):
    model, (tokens, neighbors, mask) = tiny(**family), sample(18)
    expected = run(model, tokens, neighbors, mask)
    missing = torch.zeros_like(neighbors[:, :, :1])
    more = run(
        model,
        tokens,
        torch.cat([neighbors.flip(2), missing], 2),
        torch.cat([mask.flip(2), missing.bool()], 2),
    )
    torch.testing.assert_close(more, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_batch_never_influences_another(family):
    model, (tokens, neighbors, mask) = tiny(**family), sample(16)
    other = torch.randint(2, VOCABULARY, tokens.shape)
    shown = torch.randint(2, VOCABULARY, neighbors.shape)
    both = run(
        model, torch.cat([tokens, other]), torch.cat([neighbors, shown]), torch.cat([mask, mask])
    )
    torch.testing.assert_close(both[:1], run(model, tokens, neighbors, mask))
    torch.testing.assert_close(both[1:], run(model, other, shown, mask))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_pads_and_missing_neighbors_give_numbers_and_gradients(family, dtype):
    model, (tokens, neighbors, mask) = tiny(**family).to(dtype), sample(16)
    tokens = torch.cat([tokens, torch.full_like(tokens, PAD)])
    nothing = torch.zeros_like(mask)
    logits = run(model, tokens, neighbors.repeat(2, 1, 1, 1), torch.cat([mask, nothing]))
    assert torch.isfinite(logits).all()
    logits[:1].float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_sees_only_itself_unless_asked_otherwise(family):
    tokens, _, _ = sample(16)
    other = tokens.clone()
    other[0, 3] = 19
    for reset in (True, False):
        model = tiny(reset_attention_mask=reset, dec_cross_attention=(), **family)
        a, b = (model(t, t != PAD)[0, 8:] for t in (tokens, other))
        assert torch.equal(a, b) == reset


def test_a_closed_gate_is_the_plain_decoder_and_opens_by_training():
    tokens, neighbors, mask = sample(16)
    gated, plain = tiny(cross_attention_gate=True), tiny(dec_cross_attention=())
    found = run(gated, tokens, neighbors, mask)
    torch.testing.assert_close(found, plain(tokens, tokens != PAD))
    found.square().sum().backward()
    assert gated.layers[1].feed_forward_half.cross_attention.gate.grad.abs() > 0


def test_rows_that_fill_the_vocabulary_are_never_predicted():
    padded, exact = (tiny(make_vocab_size_divisible_by=n) for n in (32, 1))
    assert padded.word_embeddings.weight.shape[0] == 32
    tokens, neighbors, mask = sample(16)
    with torch.no_grad():
        for model in (padded, exact):
            for name, p in model.named_parameters():
                p.copy_(dict(padded.named_parameters())[name][: p.shape[0]])
        padded.head.bias[VOCABULARY:] = 100.0
    found = [run(model, tokens, neighbors, mask) for model in (padded, exact)]
    torch.testing.assert_close(*found)
    labels, chosen = tokens.roll(-1, 1), tokens > 1
    losses = [
        model(tokens, tokens != PAD, neighbors, mask, labels, chosen) for model in (padded, exact)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_parts_are_the_losses(family, monkeypatch):
    model, (tokens, neighbors, mask) = tiny(**family), sample(16)
    labels, chosen = tokens.roll(-1, 1), tokens > 1
    results = []
    for cells in (1 << 26, 3 * 128):
        monkeypatch.setattr(head, "_CELLS", cells)
        model.zero_grad()
        losses = model(tokens, tokens != PAD, neighbors, mask, labels, chosen)
        losses.sum().backward()
        results.append((losses, [p.grad.clone() for p in model.parameters()]))
    assert len(results[0][0]) > 6
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_by_blocks_is_attention_by_table(groups):
    """The path of CUDA, here with FlexAttention's own arithmetic on the CPU."""
    torch.manual_seed(0)
    length = 256
    tokens = torch.randint(2, VOCABULARY, (2, length))
    tokens[0, [40, 41, 200]] = EOD
    tokens[1, 100:130] = PAD
    segments, real = document_segments(tokens, EOD), tokens != PAD
    q = torch.randn(2, 4, length, 16)
    k, v = torch.randn(2, 2, groups, length, 16).unbind(0)
    by_table = attend(q, k, v, Mask.of(causal_mask(segments, real), q.dtype), 0.3, 0.0)
    by_blocks = attend_blocks(q, k, v, block_mask(segments, real), 0.3, groups != 4)
    torch.testing.assert_close(by_blocks, by_table, atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_attention_by_blocks_compiles_within_its_layer():
    layer = tiny().float().layers[0]
    segments, real = torch.tensor([[0] * 9 + [1] * 7]), torch.ones(1, 16, dtype=torch.bool)
    table = rotary_table(torch.arange(16), 8, 10000.0)
    arguments = torch.randn(1, 16, 16), table, block_mask(segments, real), None
    expected = layer(*arguments)
    by_table = layer(*arguments[:2], Mask.of(causal_mask(segments, real), torch.float32), None)
    torch.testing.assert_close(expected, by_table, atol=2e-6, rtol=2e-5)
    layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(layer(*arguments), expected)


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only_and_depends_on_the_seed(name):
    model, (tokens, neighbors, mask) = tiny(**{name: 0.5}), sample(16)
    plain = tiny()
    torch.testing.assert_close(
        run(model.eval(), tokens, neighbors, mask), run(plain, tokens, neighbors, mask)
    )
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run(model.train(), tokens, neighbors, mask))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_heads_of_a_group_share_keys_and_values():
    """Grouped-query attention is full attention whose heads have equal keys and values."""
    grouped, full = tiny(num_attention_heads=4, num_query_groups=2), tiny(num_attention_heads=4)
    spread = {}
    for name, p in grouped.named_parameters():
        parts = {"query_key_value": (2, 2), "key_value": (0, 2)}.get(name.split(".")[-2])
        if parts is not None:
            rows = p.unflatten(0, (2, sum(parts), 4))
            own, others = rows[:, : parts[0]], rows[:, parts[0] :]
            others = others[:, None].expand(-1, 2, *others.shape[1:])
            p = torch.cat([own[:, :, None], others], 2) if parts[0] else others
            p = p.flatten(0, 3)
        spread[name] = p
    full.load_state_dict(spread)
    tokens, neighbors, mask = sample(16)
    torch.testing.assert_close(*(run(m, tokens, neighbors, mask) for m in (grouped, full)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_query_groups": 3},
        {"rotary_percentage": 0.1},
        {"rotary_percentage": 1.5},
        {"enc_width_ratio": 0.3},
        {"enc_width_ratio": 0.25},
    ],
    ids=str,
)
def test_widths_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ConfigError):
        tiny(**wrong)


def test_windows_start_at_the_last_token_of_each_chunk():
    x = torch.arange(10.0)[None, :, None]
    assert windows(x, 4)[0, :, :, 0].tolist() == [[3, 4, 5, 6], [7, 8, 9, 0]]
