"""On a CUDA device, decoding computes what full forward passes compute on a CPU."""

import copy

import numpy as np
import pytest
import torch

from model.decoding import Decoder
from model.decoding_pass import ChunkNeighbors
from model.generate_config import GenerateConfig
from model.incremental import IncrementalRetro
from tests.model.plain_decoding import ByContent
from tests.model.test_causality import EOD, tiny
from tests.model.test_cuda import VOCABULARY, M, build
from tests.model.test_families import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

K, LENGTH, PROMPTS = 2, 120, (1, 17, 50, 64)


def forced(decoder, tokens, neighbors):
    """[rows, steps, V] on the CPU: logits after each prompt and each further token."""
    ask = [[ChunkNeighbors(*chunk) for chunk in row] for row in neighbors]
    found = []
    for row, prompt, chunks in zip(tokens, PROMPTS, ask, strict=True):
        place = decoder.cache.add_row(0, True)
        chunks = chunks[: prompt // M]
        found.append([decoder.read_prompt(place, row[:prompt].tolist(), chunks)])
    for step in range(LENGTH - max(PROMPTS)):
        places = [prompt + step for prompt in PROMPTS]
        shown = [
            ask[i][(p + 1) // M - 1] if (p + 1) % M == 0 else None for i, p in enumerate(places)
        ]
        logits = decoder.step([int(tokens[i, p]) for i, p in enumerate(places)], shown)
        for row, own in zip(found, logits, strict=True):
            row.append(own)
    return torch.stack([torch.stack(row) for row in found]).float().cpu()


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_each_step_is_the_full_forward_on_the_cpu(family, dtype, atol):
    random = np.random.default_rng(0)
    tokens = random.integers(2, VOCABULARY, (len(PROMPTS), LENGTH))
    tokens[1, 20], tokens[2, 70] = EOD, EOD
    shape = (len(PROMPTS), LENGTH // M, K, 2 * M)
    ids, mask = random.integers(2, VOCABULARY, shape), random.random(shape) < 0.8
    model = build(**family).to(dtype)
    decoder = IncrementalRetro(copy.deepcopy(model).cuda(), len(PROMPTS), LENGTH, K)
    found = forced(decoder, tokens, [list(zip(*row, strict=True)) for row in zip(ids, mask)])
    rows = torch.from_numpy(tokens)
    given = (rows, torch.ones_like(rows).bool(), torch.from_numpy(ids), torch.from_numpy(mask))
    full = model.float()(*given)
    for row, prompt, expected in zip(found, PROMPTS, full, strict=True):
        own = expected[prompt - 1 : prompt - 1 + len(row)]
        torch.testing.assert_close(row, own, atol=atol, rtol=0)


def test_a_decoder_gives_the_tokens_of_the_cpu():
    config = GenerateConfig(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=1)
    results = []
    for device in ("cpu", "cuda"):
        engine = Decoder(tiny().float().to(device), 3, 40)
        sequences = [engine.start(p, config, ByContent()) for p in ([2, 3], [4] * 9, [5, EOD, 6])]
        while engine.running:
            engine.step()
        results.append([sequence.tokens for sequence in sequences])
    assert results[0] == results[1]
