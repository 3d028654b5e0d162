"""Why token-by-token decoding and scoring differ in bfloat16, and what would make them agree; on a CPU, 3 minutes.

    python docs/experiments/rounding.py [--layers N]

A random Llama of OpenVLA's depth (32 layers of width 512) decodes 7 tokens after 290 others, and scores the same tokens in
one forward. Printed: mean and largest |ratio - 1| of the 256 action ids, for the first token (whose past is the same) and
for the others. Results: docs/algorithm.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vla_rl.model.prismatic import Prismatic, Prompt
from vla_rl.model.prismatic_config import read_config

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEADS, ROWS, PROMPT, TOKENS = 512, 8, 4, 290, 7


def make_network(layers: int) -> Prismatic:
    config = read_config(ROOT / "tests/data/tiny_openvla")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1376, "num_hidden_layers": layers, "head_dim": WIDTH // HEADS}
    llama = config.llama | sizes | {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    network = Prismatic(replace(config, llama=llama)).eval()
    with torch.no_grad():
        for name, weight in network.language_model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed_tokens" in name else WIDTH**-0.5)
    network.to(torch.bfloat16).language_model.model.rotary_emb.float()
    return network


def exact_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """In float64, so that its result does not depend on the kernel's blocks."""
    scores = q.double() @ k.double().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return (scores.softmax(dim=-1) @ v.double()).to(q.dtype)


def keep_the_residual_in_float32(network: Prismatic) -> None:
    def forward_of(layer):
        def forward(x, attention_mask, position_embeddings, past_key_values, is_causal):
            rotary = tuple(part.to(torch.bfloat16) for part in position_embeddings)
            options = {"past_key_values": past_key_values, "is_causal": is_causal}
            normed = layer.input_layernorm(x.float()).to(torch.bfloat16)
            x = x.float() + layer.self_attn(normed, rotary, attention_mask, **options)[0].float()
            return x + layer.mlp(layer.post_attention_layernorm(x).to(torch.bfloat16)).float()

        return forward

    for layer in network.language_model.model.layers:
        layer.forward = forward_of(layer)


@torch.no_grad()
def report(name: str, network: Prismatic, nudged: bool = False) -> None:
    """nudged: compare two scorings instead, one of which has one number of one prompt token one bfloat16 step off."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(ROWS, PROMPT, WIDTH, generator=generator).to(torch.bfloat16)
    ids = torch.randint(network.config.vocab_size, (ROWS, TOKENS), generator=generator)
    scored = network.forward_tokens(Prompt(embeddings, None), ids[:, :-1])
    if nudged:
        embeddings[:, 0, 0] *= 1 + 2**-7
        other = network.forward_tokens(Prompt(embeddings, None), ids[:, :-1])
    else:
        _, other = network.decode(Prompt(embeddings, None), TOKENS, lambda k, hidden: ids[:, k])
    logprobs = [torch.log_softmax(network.action_logits(hidden), dim=-1) for hidden in (scored, other)]
    error = ((logprobs[1] - logprobs[0]).exp() - 1).abs()
    first, rest = error[:, :1], error[:, 1:]
    print(f"{name:<52} first token {first.mean():.4f}, others {rest.mean():.4f} (max {rest.max():.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    torch.manual_seed(0)
    network, attention = make_network(layers), F.scaled_dot_product_attention
    report("decoding against scoring", network)
    report("two scorings, one bfloat16 step in one number apart", network, nudged=True)
    F.scaled_dot_product_attention = exact_attention
    report("decoding against scoring, attention in float64", network)
    F.scaled_dot_product_attention = attention
    keep_the_residual_in_float32(network)
    report("decoding against scoring, residual in float32", network)
    report("two scorings, one step apart, residual in float32", network, nudged=True)


if __name__ == "__main__":
    main()
