"""A base that two processes share computes what a whole one does, and keeps them in step."""

from functools import partial

import pytest
import torch

from tests.model.policies import make_obs, make_policy, move_adapters
from tests.ranks import run_ranks
from tests.trainers import settings
from vla_rl.learning.sharding import check_sharding, shard
from vla_rl.run.settings import ConfigError


def numbers(policy):
    """What a policy says and learns of three rows, as lists."""
    output = policy.act(make_obs(), temperature=1.5, generator=torch.Generator().manual_seed(3))
    evaluation = policy.evaluate_actions(output.inputs, output.action_tokens, temperature=1.5)
    (evaluation.logprobs.sum() + evaluation.hidden.square().sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])
    hidden = policy.compute_hidden(output.inputs)
    return [x.double().flatten().tolist() for x in (output.action_tokens, output.logprobs, gradient, hidden)]


def policies():
    for mode in ("none", "full"):
        policy = make_policy(gradient_checkpointing=mode)
        move_adapters(policy)
        yield policy


def decide(policy, times):
    return [policy.act(make_obs(), mode="greedy").hidden.tolist() for _ in range(times)]


def run_sharded(ranks, folder):
    results = []
    for policy in policies():
        whole = sum(p.numel() for p in policy.network.parameters())
        fingerprint = policy.fingerprint()
        shard(policy, ranks, torch.device("cpu"))
        kept = [
            whole,
            sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in policy.network.parameters()),
        ]
        assert policy.fingerprint() == fingerprint
        # process 1 has nothing to do while process 0 decides twice
        played = ranks.all_of(partial(decide, policy, 2 - 2 * ranks.rank))
        results.append([numbers(policy), played[0]])
    return [results, kept]


def test_it_computes_the_same_and_keeps_its_part(tmp_path):
    (first, kept), (second, _) = run_ranks(2, "tests.learning.test_sharding:run_sharded", tmp_path)
    assert first == second
    for (shared, played), policy in zip(first, policies(), strict=True):
        assert shared == numbers(policy)
        assert played == decide(policy, 2)
    whole, own = kept
    assert own < 0.75 * whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": {"decoder": "autoregressive", "chunk_size": 1}}, "decoder=autoregressive"),
        ({"policy": {"quantization": "nf4"}}, "quantization=nf4"),
        ({"policy": {"compile": True}}, "compile=true"),
        ({"run": {"device": "cuda"}}, "micro_batch_size=auto"),
        ({}, None),
    ],
)
def test_what_a_base_in_parts_cannot_do(changes, said):
    config = settings(**changes | {"algorithm": {"micro_batch_size": "auto"}})
    if said is None:
        return check_sharding(config)
    with pytest.raises(ConfigError, match=f"distributed.shard=true with .*{said}.*; set another value"):
        check_sharding(config)
