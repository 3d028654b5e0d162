"""vla-eval's observations become ours and our actions its own, by numbers; over its protocol where vla-eval is installed."""

from __future__ import annotations

import importlib.util
import socket
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from integrations import vla_eval_server
from integrations.vla_eval_server import OpenVLAServer, camera_image, decide, fit_image, is_of_suite, to_observation
from tests.model.policies import make_obs, make_policy, move_adapters
from vla_rl.evaluation.play import evaluation_episodes, sampling_generators
from vla_rl.evaluation.subject import build_subject
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.types import Observation

there = importlib.util.find_spec("vla_eval") is not None
needs_vla_eval = pytest.mark.skipif(not there, reason="optional: pip install -r requirements-vla-eval.txt")


def as_sent(obs: Observation) -> list[dict]:
    """In vla-eval's layout: a dict a row, cameras by name, states in float64."""
    rows = zip(obs.images, obs.proprio, obs.instructions, strict=True)
    return [
        {
            "images": dict(zip(("agentview", "wrist"), images, strict=False)),
            "states": proprio.astype(np.float64),
            "task_description": instruction,
        }
        for images, proprio, instruction in rows
    ]


@pytest.fixture(scope="module")
def policy():
    return make_policy("parallel", "tiny-openvla", lora=None, use_proprio=True)


def subject(*argv: str):
    return vla_eval_server.subject_of(vla_eval_server.parse_args(list(argv)))


# observations and actions


def test_an_observation_in_their_layout_is_ours_again():
    obs = make_obs(3, num_images=2)
    got = to_observation(as_sent(obs), 2, True, 128)
    assert np.array_equal(got.images, obs.images) and got.images.dtype == np.uint8
    assert np.array_equal(got.proprio, obs.proprio) and got.proprio.dtype == np.float32
    assert got.instructions == obs.instructions and got.image_transform is None


def test_a_camera_is_told_by_its_name_not_by_its_place():
    (sent,) = as_sent(make_obs(1, num_images=2))
    sent["images"] = dict(reversed(sent["images"].items()))
    assert np.array_equal(camera_image(sent, "agentview", 128), make_obs(1, num_images=2).images[0, 0])


@pytest.mark.parametrize(
    ("left_out", "said"),
    [("wrist", "send_wrist_image=true"), ("states", "send_state=true"), ("task_description", "the instruction")],
)
def test_what_the_harness_does_not_send_is_named_with_the_way_out(left_out, said):
    (sent,) = as_sent(make_obs(1, num_images=2))
    (sent["images"] if left_out == "wrist" else sent).pop(left_out)
    with pytest.raises(ValueError, match=said):
        to_observation([sent], 2, True, 128)


def test_a_policy_without_proprioception_needs_no_states():
    (sent,) = as_sent(make_obs(1))
    del sent["states"]
    assert np.array_equal(to_observation([sent], 1, False, 128).proprio, np.zeros((1, 8)))


def test_states_of_another_layout_are_refused():
    (sent,) = as_sent(make_obs(1))
    with pytest.raises(ValueError, match=r"states of shape \[9\]; expected \[8\]"):
        to_observation([sent | {"states": np.zeros(9)}], 1, True, 128)


def test_a_larger_image_is_averaged_by_blocks_and_others_pass_or_are_refused():
    # by hand: (1 + 2 + 3 + 4) / 4 = 2.5 and (5 + 5 + 6 + 6) / 4 = 5.5, to the even neighbour; (250 + 3 * 255) / 4 = 253.75
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2, 0], image[2:, :2, 1], image[2:, 2:, 2] = [[1, 2], [3, 4]], [[5, 5], [6, 6]], [[250, 255], [255, 255]]
    small = fit_image(image, 2)
    assert small.dtype == np.uint8 and small.shape == (2, 2, 3)
    assert (small[0, 0].tolist(), small[1, 0].tolist(), small[1, 1].tolist()) == ([2, 0, 0], [0, 6, 0], [0, 0, 254])
    assert fit_image(image, 4) is image
    for side in (3, 8):
        with pytest.raises(ValueError, match=f"4 pixels a side, the policy was trained on {side}"):
            fit_image(image, side)
    with pytest.raises(ValueError, match="square RGB"):
        fit_image(image.astype(np.float32), 2)


def test_a_variant_is_of_its_suite_and_another_suite_is_not():
    assert is_of_suite("libero_spatial", "libero_spatial") and is_of_suite("libero_spatial_swap", "libero_spatial")
    assert not is_of_suite("libero_100", "libero_10") and not is_of_suite("libero_object", "libero_spatial")


def test_no_token_gives_a_gripper_between_open_and_closed(policy):
    """0 would hold the fingers here and close them there, where the sign is taken with 0 as positive."""
    first, size = policy.action_tokenizer.first_id, policy.action_tokenizer.vocab_size
    tokens = torch.arange(first, size)[:, None].repeat(1, policy.num_tokens)
    assert set(np.unique(policy.decode_actions(tokens)[..., 6])) == {-1.0, 1.0}


@pytest.mark.libero
def test_what_our_environment_shows_gives_the_chunk_that_the_policy_acts(policy):
    with closing(LiberoEnv("libero_spatial", (0,), chunk_size=8, image_size=128, render="fast")) as env:
        shown, _ = env.reset(options={"episode": evaluation_episodes([0], [0])[0]})
    obs = Observation(shown["images"][None], shown["proprio"][None], (shown["instruction"],))
    chunk = decide(policy, as_sent(obs), 128)
    assert chunk.shape == (1, 8, 7) and np.array_equal(chunk, policy.act(obs, mode="greedy").actions)
    assert np.abs(chunk).max() <= 1 and set(np.unique(chunk[..., 6])) <= {-1.0, 1.0}
    large = [
        obs | {"images": {"agentview": obs["images"]["agentview"].repeat(2, 0).repeat(2, 1)}} for obs in as_sent(obs)
    ]
    assert np.array_equal(decide(policy, large, 128), chunk)


# settings


@pytest.mark.parametrize("lora", [{}, {"target_modules": "language-model", "last_layers": 1}])
def test_a_checkpoint_is_served_as_it_was_trained_with_its_adapter(tmp_path, lora):
    """Which settings that gives, tests/evaluation/test_subject.py shows: it is what vla_rl.evaluate evaluates."""
    trained = make_policy("parallel", "tiny-openvla", lora=LoraConfig(rank=3, alpha=5, **lora), use_proprio=True)
    move_adapters(trained)
    trained.save_adapter(tmp_path)
    served = subject("--checkpoint", "tiny-openvla", "--adapter", str(tmp_path), "--device", "cpu")
    policy, _ = build_subject(served)
    obs = make_obs(2)
    assert np.array_equal(
        decide(policy, as_sent(obs), served.config.env.image_size), trained.act(obs, mode="greedy").actions
    )
    with pytest.raises(ConfigError, match="--adapter goes with --checkpoint"):
        subject("--run", str(tmp_path), "--adapter", "x")


def test_mistakes_end_with_status_2_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(vla_eval_server, "build_subject", None)
    monkeypatch.setattr(vla_eval_server, "PredictModelServer", object)
    assert vla_eval_server.main(["--checkpoint", "tiny-openvla"]) == 2
    assert "pip install -r requirements-vla-eval.txt" in capsys.readouterr().err
    monkeypatch.setattr(vla_eval_server, "PredictModelServer", dict)
    taken = socket.create_server(("127.0.0.1", 0))
    with closing(taken):
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (["--port", port], f"cannot listen at 127.0.0.1:{port}"),
            (["--temperature", "0"], "expected a number above 0"),
            (["--temperature", "0.5"], "says nothing to --mode greedy; give --mode mean_action or sampled"),
            (["--max-batch-size", "0"], "expected 1 or more"),
        ):
            assert vla_eval_server.main(["--checkpoint", "tiny-openvla", *arguments]) == 2
            assert said in capsys.readouterr().err


# over the protocol


def play(server: OpenVLAServer, talk):
    """talk(a connection) of vla-eval's own client, with the server behind it on a free port."""
    import anyio
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    async def connect(url):
        async with Connection(url, timeout=60) as connection:
            return await talk(connection)

    with serve_background(server) as handle:
        return anyio.run(connect, handle.url)


def start(state: int, suite: str = "libero_spatial", task_id: int = 0) -> dict:
    return {"task": {"name": "task", "suite": suite, "task_id": task_id, "episode_idx": state}}


@needs_vla_eval
def test_a_chunk_is_handed_out_action_by_action_and_dropped_at_the_next_episode(policy):
    rows = as_sent(make_obs(2))
    chunks = decide(policy, rows, 128)

    async def talk(connection):
        await connection.start_episode(start(0))
        first = [await connection.act(rows[0])] + [await connection.act(rows[1]) for _ in range(8)]
        await connection.end_episode({})
        await connection.start_episode(start(1))
        return [a["actions"] for a in first], (await connection.act(rows[1]))["actions"], connection.server_info

    first, fresh, info = play(OpenVLAServer(policy, "libero_spatial", 128), talk)
    assert np.array_equal(first[:8], chunks[0]) and np.array_equal(first[8], chunks[1][0])
    assert np.array_equal(fresh, chunks[1][0])
    assert info["observation_params"] == {"env_seed": 0, "quat_no_antipodal": True, "send_state": True}


@needs_vla_eval
def test_it_declares_what_their_benchmark_declares(policy):
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
    from vla_eval.specs import check_specs

    server = OpenVLAServer(policy, "libero_spatial", 128)
    theirs = LIBEROBenchmark("libero_spatial", **server.get_observation_params())
    specs = (server.get_action_spec(), theirs.get_action_spec())
    assert check_specs(*specs, server.get_observation_spec(), theirs.get_observation_spec()) == []


@needs_vla_eval
def test_an_episode_draws_what_it_draws_in_our_evaluation(policy):
    (row,), obs = as_sent(make_obs(1)), make_obs(1)
    episodes = evaluation_episodes([3], range(2))
    generators = sampling_generators(episodes, 5)
    expected = [policy.act(obs, temperature=1.0, generator=[g]).actions[0, 0] for g in generators]

    async def talk(connection):
        actions = []
        for state in range(2):
            await connection.start_episode(start(state, task_id=3))
            actions.append((await connection.act(row))["actions"])
        return actions

    actions = play(OpenVLAServer(policy, "libero_spatial", 128, mode="sampled", seed=5), talk)
    assert np.array_equal(actions, expected) and not np.array_equal(*actions)


@needs_vla_eval
def test_episodes_of_another_suite_fail_and_later_ones_are_answered_in_order(policy):
    (row,) = as_sent(make_obs(1))

    async def talk(connection):
        await connection.start_episode(start(0, "libero_goal"))
        with pytest.raises(RuntimeError, match="start it with --task-suite libero_goal"):
            await connection.act(row)
        await connection.end_episode({})
        await connection.start_episode(start(0, "libero_spatial_swap"))
        return (await connection.act(row))["actions"]

    assert np.array_equal(play(OpenVLAServer(policy, "libero_spatial", 128), talk), decide(policy, [row], 128)[0, 0])


@needs_vla_eval
def test_sessions_share_forwards_and_each_gets_its_own_action(policy):
    import anyio
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    server = OpenVLAServer(policy, "libero_spatial", 128, mode="sampled", max_batch_size=4)
    server.warm_up()
    rows, actions, sizes = as_sent(make_obs(3)), {}, []
    predict = server.predict_batch
    server.predict_batch = lambda obs, ctx: sizes.append(len(obs)) or predict(obs, ctx)

    async def one(url, index):
        async with Connection(url, timeout=60) as connection:
            await connection.start_episode(start(index))
            actions[index] = [(await connection.act(rows[index]))["actions"] for _ in range(9)][::8]

    async def all_at_once(url):
        async with anyio.create_task_group() as tasks:
            for index in range(3):
                tasks.start_soon(one, url, index)

    with serve_background(server) as handle:
        anyio.run(all_at_once, handle.url)
    assert sum(sizes) == 6  # two decisions of each
    for index, generator in enumerate(sampling_generators(evaluation_episodes([0], range(3)), 0)):
        alone = [decide(policy, [rows[index]], 128, "sampled", 1.0, [generator])[0, 0] for _ in range(2)]
        assert np.allclose(actions[index], alone, atol=1e-6)  # rows beside it change rounding


@needs_vla_eval
@pytest.mark.libero
@pytest.mark.slow
def test_their_benchmark_shows_and_executes_what_ours_does(policy):
    """Their LIBERO class on its own simulator at its 256 pixels: the images, states and what a chunk leads to."""
    import anyio
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

    server = OpenVLAServer(policy, "libero_spatial", 128)
    theirs = LIBEROBenchmark("libero_spatial", **server.get_observation_params())
    task = theirs.get_tasks()[2] | {"episode_idx": 0}
    ours = LiberoEnv("libero_spatial", (2,), chunk_size=8, image_size=256)

    def look():
        sent = theirs.make_obs(theirs._last_result.obs, task)
        shown = ours._observe()
        assert np.array_equal(sent["images"]["agentview"], shown["images"][0])
        assert np.array_equal(sent["states"].astype(np.float32), shown["proprio"])
        assert sent["task_description"] == shown["instruction"]
        return sent

    with closing(ours), closing(SimpleNamespace(close=theirs.cleanup)):
        anyio.run(partial(theirs.start_episode, task))
        ours.reset(options={"episode": evaluation_episodes([2], [0])[0]})
        chunk = server.predict_batch([look()], [SimpleNamespace(session_id="")])[0]["actions"]
        for action in chunk:
            anyio.run(theirs.apply_action, {"actions": action})
        ours.step(chunk)
        look()


def test_the_harness_file_names_a_benchmark_of_theirs():
    import yaml

    wanted = yaml.safe_load(Path("integrations/vla_eval_libero.yaml").read_text())
    (entry,) = wanted["benchmarks"]
    assert entry["benchmark"] == "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark"
    assert wanted["server"]["url"] == "ws://127.0.0.1:8000" and entry["params"]["suite"] == "libero_spatial"
