"""Several processes give what one gives; what one of them says reaches the others."""

import os

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainers import settings
from vla_rl.run.distributed import BACKENDS, ONE, Ranks, exchanging, joined, share_of, take_one_gpu
from vla_rl.run.settings import ConfigError
from vla_rl.types import ProcessLost, StopTraining


def exchanges(ranks, folder):
    """Every method of Ranks, in two processes."""
    mine = float(ranks.rank + 1)
    tensors = [torch.full((2, 3), mine), torch.tensor([10 * mine])]
    ranks.add(tensors)
    seen, unseen = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    seen.grad = torch.tensor([mine, -mine])
    ranks.add_gradients([seen, unseen])
    replica = torch.full((3,), mine, requires_grad=True)
    ranks.copy_from_first([replica])
    claim, other = ranks.claims(), ranks.claims()
    claims = ranks.gather([claim(7) for _ in range(3)] + [claim(8)])

    def fails():
        raise ConfigError(f"made by rank {ranks.rank}")

    said = []

    def stopped_on_one():
        if ranks.rank == 1:
            raise StopTraining

    for work in (lambda: ranks.by_first(fails), lambda: ranks.all_of(stopped_on_one)):
        try:
            work()
        except (ConfigError, StopTraining) as error:
            said.append(f"{type(error).__name__} {error}".strip())

    before = ranks.stop_asked(False)
    ranks.any(False)  # both have asked before one tells
    ranks.stop_asked(ranks.rank == 1)
    ranks.any(False)
    return {
        "gathered": ranks.gather(ranks.rank),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "largest": ranks.largest(mine),
        "sums": [tensors[0].tolist(), tensors[1].item(), seen.grad.tolist(), unseen.grad],
        "metrics": ranks.add_metrics({"a": mine, "actor/ratio_error": mine, "b": -mine}),
        "replica": replica.tolist(),
        "claims": sorted(claim for part in claims for claim in part[:3]) + sorted(part[3] for part in claims),
        "other": sorted(ranks.gather(other(7))),
        "by_first": ranks.by_first(lambda: f"rank {ranks.rank}"),
        "said": said,
        "stop": [before, ranks.stop_asked(False)],
    }


def test_two_processes_exchange(tmp_path):
    first, second = run_ranks(2, "tests.run.test_distributed:exchanges", tmp_path)
    assert first == second
    assert first["gathered"] == [0, 1] and first["any"] == [True, False] and first["largest"] == 2
    assert first["sums"] == [[[3.0] * 3] * 2, 30.0, [3.0, -3.0], None]
    assert first["metrics"] == {"a": 3, "actor/ratio_error": 2, "b": -3}
    assert first["replica"] == [1.0] * 3
    assert first["claims"] == [0, 1, 2, 3, 4, 5, 0, 1] and first["other"] == [0, 1]
    assert first["by_first"] == "rank 0"
    assert first["said"] == ["ConfigError made by rank 0", "StopTraining"]
    assert first["stop"] == [False, True]


def test_one_process_needs_no_torch_distributed():
    with joined("cuda") as ranks:
        assert ranks is ONE and not torch.distributed.is_initialized()
    assert ONE.gather(3) == [3] and ONE.all_of(lambda: 4) == [4] and ONE.by_first(lambda: 5) == 5
    assert ONE.any(True) and not ONE.any(False) and ONE.largest(2.5) == 2.5
    assert ONE.stop_asked(True) and not ONE.stop_asked(False) and ONE.first and ONE.share(6) == range(6)
    claim = ONE.claims()
    assert [claim(3), claim(3), claim(4)] == [0, 1, 0] and ONE.claims()(3) == 0
    tensor = torch.ones(2)
    ONE.add([tensor])
    ONE.copy_from_first([tensor])
    assert tensor.tolist() == [1, 1] and ONE.add_metrics({"a": 1.0}) == {"a": 1.0}
    with pytest.raises(StopTraining):
        ONE.all_of(lambda: (_ for _ in ()).throw(StopTraining))


def test_environments_are_shared_in_contiguous_equal_parts():
    assert [list(Ranks(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_settings_of_one_of_several_processes():
    config = settings(
        rollout={"num_envs": 8, "n_episodes": 8}, env={"num_workers": 3}, algorithm={"minibatch_size": 15}
    )
    own = share_of(config, 4)
    assert (own.rollout.num_envs, own.eval.num_envs, own.env.num_workers, own.algorithm.minibatch_size) == (2, 1, 1, 4)
    assert own.rollout.n_steps == config.rollout.n_steps and share_of(config, 1) == config
    assert share_of(settings(), 2).env.num_workers is None


@pytest.mark.parametrize(("overlap", "processes", "fitting"), [(False, 3, 6), (False, 8, 8), (True, 4, 8)])
def test_environments_that_cannot_be_shared(overlap, processes, fitting):
    with pytest.raises(ConfigError, match=rf"num_envs=4 .*{processes} processes.*set rollout.num_envs={fitting}$"):
        share_of(settings(rollout={"overlap": overlap}), processes)


@pytest.mark.parametrize(
    ("visible", "local", "expected"), [("2,5", 1, "5"), (None, 2, "2"), ("GPU-a,GPU-b", 0, "GPU-a")]
)
def test_each_process_sees_its_own_gpu(monkeypatch, visible, local, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        ConfigError, match="started 2 processes on this machine, which has 1 GPUs; give --nproc-per-node 1"
    ):
        take_one_gpu()


def test_gpus_exchange_by_nccl_and_the_rest_by_gloo():
    assert BACKENDS == {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def test_a_process_that_does_not_answer_is_told_in_one_line():
    with (
        pytest.raises(ProcessLost, match=r"another process of this run has ended .* \(Connection closed by peer\)"),
        exchanging(),
    ):
        raise RuntimeError("Connection closed\nby peer")
    with pytest.raises(RuntimeError, match="CUDA out of memory"), exchanging():
        raise RuntimeError("CUDA out of memory")
