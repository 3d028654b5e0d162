"""A trainer that was stopped, killed or broken goes on from the state after its last finished iteration."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes import CHUNK
from tests.trainers import final_state, make_trainer, training_lines
from vla_rl.learning.trainer_state import TrainerState
from vla_rl.run.checkpoint import CheckpointError, find_checkpoint, find_saved, list_checkpoints, load_trainer_state
from vla_rl.types import SimulatorDied


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, estimator):
    """Stopped in the middle of the third rollout; max_steps makes episodes span iterations."""
    changes = {
        "algorithm": {"estimator": estimator, "n_epochs": 2},
        "run": {"timesteps": 5 * 4 * 8 * CHUNK},
        "max_steps": 11 * CHUNK,
        "evaluate": True,
        "eval": {"interval": 2},
        "logging": {"checkpoint_interval": 100},
    }
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()

    stopped = make_trainer(tmp_path / "stopped", **changes)
    act, calls = stopped.policy.act, []

    def act_and_stop(*args, **kwargs):
        calls.append(1)
        if stopped.iteration == 2 and stopped.evaluated_iteration == 2 and len(calls) % 3 == 0:
            stopped.request_stop()
        return act(*args, **kwargs)

    stopped.policy.act = act_and_stop
    stopped.train()
    assert stopped.iteration == 2

    checkpoint = find_checkpoint(tmp_path / "stopped")
    resumed = make_trainer(tmp_path / "stopped", **changes)
    resumed.load_checkpoint(checkpoint)
    resumed.train()
    assert resumed.iteration == whole.iteration
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), final_state(whole), strict=True))
    assert training_lines(tmp_path / "stopped") == training_lines(tmp_path / "whole")


def test_stop_in_the_middle_of_an_update_saves_the_state_before_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    expected = final_state(trainer)
    steps = trainer.optimizer_steps

    def step_and_stop(*args):
        trainer.request_stop()
        return steps(*args)

    trainer.optimizer_steps = step_and_stop
    trainer.evaluated_iteration = 1
    trainer.train()
    assert trainer.iteration == 1
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), expected, strict=True))


def test_resume_takes_the_learning_rate_of_the_settings_not_of_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    trainer.save_checkpoint()
    resumed = make_trainer(tmp_path, actor={"learning_rate": 1e-6, "weight_decay": 0.1}, critic={"beta1": 0.5})
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    (actor,), (critic,) = resumed.actor_optimizer.param_groups, resumed.critic_optimizer.param_groups
    assert (actor["lr"], actor["weight_decay"], critic["betas"]) == (1e-6, 0.1, (0.5, 0.999))
    moments = resumed.actor_optimizer.state[resumed.policy.adapter]["exp_avg"]
    assert torch.equal(moments, trainer.actor_optimizer.state[trainer.policy.adapter]["exp_avg"])


def test_run_stopped_in_its_first_iteration_does_not_repeat_the_first_evaluation(tmp_path):
    changes = {"evaluate": True, "run": {"timesteps": 4 * 8 * CHUNK}}
    stopped = make_trainer(tmp_path / "stopped", **changes)
    step = stopped.envs.step_async
    stopped.envs.step_async = lambda *args: (stopped.request_stop(), step(*args))[1]
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", **changes)
    resumed.load_checkpoint(find_checkpoint(tmp_path / "stopped"))
    resumed.train()
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    assert training_lines(tmp_path / "stopped") == training_lines(tmp_path / "whole")


def test_checkpoint_of_another_model_or_estimator_is_refused(tmp_path):
    make_trainer(tmp_path).save_checkpoint()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        make_trainer(tmp_path / "b", value_head={"hidden_sizes": [16]}).load_checkpoint(find_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        make_trainer(tmp_path / "c", algorithm={"estimator": "grpo"}).load_checkpoint(find_checkpoint(tmp_path))


def test_any_failure_saves_the_last_good_state(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    good = final_state(trainer)
    trainer.evaluated_iteration = 1

    def dies(actions, active, episodes):
        with torch.no_grad():  # what lives on the device is lost, as after a CUDA error: only the copy is sound
            trainer.policy.adapter.fill_(torch.nan)
        trainer.actor_optimizer.state.clear()
        raise SimulatorDied("simulator worker 2 died")

    trainer.envs.step_async = dies
    with pytest.raises(SimulatorDied, match="worker 2 died"):
        trainer.train()
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), good, strict=True))


def test_error_after_a_stop_was_asked_for_is_still_an_error_but_for_simulators_that_got_the_signal_too(tmp_path):
    for error, raised in ((ValueError("a bug"), True), (SimulatorDied("worker 0 died"), False)):
        trainer = make_trainer(tmp_path / type(error).__name__)

        def dies(actions, active, episodes, trainer=trainer, error=error):
            trainer.request_stop()
            raise error

        trainer.envs.step_async = dies
        if raised:
            with pytest.raises(ValueError, match="a bug"):
                trainer.train()
        else:
            trainer.train()
        assert find_checkpoint(tmp_path / type(error).__name__).name == "iteration-000000"


def test_failing_save_does_not_hide_what_went_wrong(tmp_path, caplog):
    trainer = make_trainer(tmp_path)

    def no_room(folder, values=None):
        raise OSError(28, "No space left on device")

    def disk_and_simulator_fail(actions, active, episodes):
        trainer.policy.save_adapter = no_room
        raise ZeroDivisionError

    trainer.envs.step_async = disk_and_simulator_fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "could not be saved" in caplog.text
    saved = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert saved == ["iteration-000000"]  # before the first iteration; nothing half written stays


def test_a_disk_that_is_full_for_a_while_costs_no_training_and_no_line(tmp_path, caplog):
    """Iterations 1 to 3 of 5 cannot be saved; the run ends as one that never had that, and says so once."""
    changes = {"run": {"timesteps": 5 * 4 * 8 * CHUNK}, "logging": {"keep_checkpoints": 2}}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    trainer = make_trainer(tmp_path / "full", **changes)
    fsync = os.fsync

    def full(descriptor):
        if 0 <= trainer.iteration <= 3 and trainer.evaluated_iteration == 0:
            assert find_checkpoint(tmp_path / "full").name == "iteration-000000"  # as it was
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert trainer.train()
    assert training_lines(tmp_path / "full") == training_lines(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(final_state(trainer), final_state(whole), strict=True))
    saved = [path.name for path in sorted((tmp_path / "full/checkpoints").iterdir())]
    assert saved == ["iteration-000004", "iteration-000005"]
    assert caplog.text.count("checkpoints cannot be written (No space left") == 1
    assert caplog.text.count("checkpoints are written again") == 1


def test_a_checkpoint_is_never_later_than_the_metrics_before_it(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, logging={"checkpoint_interval": 9})
    write = trainer.logger.lines.write

    def full():
        raise OSError(28, "No space left on device")

    trainer.logger.lines.write = full
    trainer.train_iteration()
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint()
    assert not list_checkpoints(tmp_path / "checkpoints")
    trainer.logger.lines.write = write
    trainer.save_checkpoint()
    assert [line["iteration"] for line in training_lines(tmp_path)] == [1]


def test_a_run_that_cannot_be_saved_ends_at_its_start_and_at_its_end(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    never = make_trainer(tmp_path / "never")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", full)
        never.train()
    assert never.iteration == 0
    from_one_on = make_trainer(tmp_path / "from_one_on")
    from_one_on.evaluate_saved()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", full)
        from_one_on.train()
    assert from_one_on.iteration == 3 and find_checkpoint(tmp_path / "from_one_on").name == "iteration-000000"


def test_a_stop_that_no_step_obeys_is_saved_by_another_thread(tmp_path):
    trainer = make_trainer(tmp_path, run={"timesteps": 9 * 4 * 8 * CHUNK})
    saved = []
    act = trainer.policy.act

    def act_while_saved(*args, **kwargs):
        if trainer.iteration == 2 and not saved:
            thread = threading.Thread(target=lambda: saved.append(trainer.save_checkpoint()))
            thread.start()
            thread.join()
            trainer.request_stop()
        return act(*args, **kwargs)

    trainer.policy.act = act_while_saved
    assert not trainer.train()
    assert saved == [tmp_path / "checkpoints/iteration-000002"] and find_checkpoint(tmp_path) == saved[0]


def test_settings_that_have_trained_nothing_do_not_change_a_checkpoint(tmp_path):
    """--resume RUN --timesteps 0 would leave a run without a plan."""
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    trainer.save_checkpoint()
    before = (find_checkpoint(tmp_path) / "config.yaml").read_text()
    resumed = make_trainer(tmp_path, run={"timesteps": 0}, evaluate=True)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    resumed.train()
    assert find_checkpoint(tmp_path).name == "iteration-000001"
    assert (find_checkpoint(tmp_path) / "config.yaml").read_text() == before
    longer = make_trainer(tmp_path, run={"timesteps": resumed.timesteps + 1})
    longer.load_checkpoint(find_checkpoint(tmp_path))
    longer.train()
    assert f"timesteps: {resumed.timesteps + 1}\n" in (find_checkpoint(tmp_path) / "config.yaml").read_text()


def test_checkpoints_and_curves_come_at_their_intervals_and_only_the_newest_are_kept(tmp_path):
    logging_settings = {"checkpoint_interval": 2, "keep_checkpoints": 2, "curves_interval": 3}
    trainer = make_trainer(tmp_path, run={"timesteps": 7 * 4 * 8 * CHUNK}, logging=logging_settings)
    drawn = []
    trainer.logger.draw_curves = lambda: drawn.append(trainer.iteration)
    trainer.train()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["iteration-000006", "iteration-000007"]
    assert drawn == [3, 6, 7]


@pytest.mark.parametrize("every", [1, 10])
def test_a_run_that_is_killed_in_an_evaluation_has_its_iteration_saved(tmp_path, every):
    changes = {"evaluate": True, "eval": {"interval": 1}, "logging": {"checkpoint_interval": every}}
    trainer = make_trainer(tmp_path, **changes)

    def killed():
        raise KeyboardInterrupt  # and nothing is written any more

    trainer.evaluate = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train_iteration()
    resumed = make_trainer(tmp_path, **changes)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert resumed.iteration == 1 and resumed.evaluation_due()
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train_iteration()
    assert find_checkpoint(tmp_path / "whole").name == "iteration-000001"
    again = make_trainer(tmp_path / "whole", **changes)
    again.load_checkpoint(find_checkpoint(tmp_path / "whole"))
    assert not again.evaluation_due()


def test_an_evaluation_that_no_checkpoint_knows_of_is_logged_once(tmp_path):
    """Killed after the line was written and before the checkpoint that says so."""
    changes = {"evaluate": True, "eval": {"interval": 1}, "logging": {"checkpoint_interval": 1}}
    trainer = make_trainer(tmp_path, **changes)
    save, saves = trainer.save_checkpoint, []
    trainer.save_checkpoint = lambda: saves.append(1) or (save() if len(saves) == 1 else None)
    trainer.train_iteration()
    resumed = make_trainer(tmp_path, **changes)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    resumed.train()
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train_iteration()
    whole.train()
    assert training_lines(tmp_path) == training_lines(tmp_path / "whole")


def test_the_best_of_a_runs_evaluations_is_kept(tmp_path):
    """Success in 0, 3, 2 and 3 of 4 states: the last, of equals. A resume knows it."""
    changes = {"evaluate": True, "eval": {"interval": 1, "modes": ["greedy"]}}
    logging_settings = {"keep_checkpoints": 1, "curves_interval": 100}
    trainer = make_trainer(tmp_path, logging=logging_settings, **changes)
    rates = iter([0.0, 0.75, 0.5, 0.75, 0.25])
    measured = {"eval/render": "exact"}
    play = lambda *args, **kwargs: measured | rates_of(next(rates))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("OpenVLA_PPO.evaluate_modes", play)
        trainer.train()
        assert best_of(tmp_path) == ["best-iteration-000003"]
        best = find_saved(tmp_path / "checkpoints/best", "--run ")
        weights = load_file(best / "adapter/adapter.safetensors")["adapter"]
        assert torch.equal(weights, trainer.policy.adapter)
        longer = {"run": {"timesteps": trainer.timesteps + 1}}
        resumed = make_trainer(tmp_path, logging=logging_settings, **changes | longer)
        resumed.load_checkpoint(find_checkpoint(tmp_path))
        resumed.train()
    assert find_checkpoint(tmp_path).name == "iteration-000004" and best_of(tmp_path) == ["best-iteration-000003"]


def rates_of(rate: float) -> dict[str, float]:
    key = "eval/success_rate_greedy"
    return {key: rate, f"{key}_low": 0.0, f"{key}_high": 1.0, "eval/episodes_greedy": 4}


def best_of(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*best*"))


def test_no_best_is_kept_where_it_is_not_wanted(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=True, logging={"keep_best": False})
    trainer.evaluate_saved()
    assert best_of(tmp_path) == []


def test_later_checkpoints_stay_where_an_earlier_one_cannot_be_restored(tmp_path):
    trainer = make_trainer(tmp_path, run={"timesteps": 3 * 4 * 8 * CHUNK})
    trainer.train()
    before = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    lines = training_lines(tmp_path)
    resumed = make_trainer(tmp_path)

    def broken(states):
        raise SimulatorDied("simulator worker 0 died")

    resumed.envs.restore_episodes = broken
    with pytest.raises(SimulatorDied):
        resumed.load_checkpoint(tmp_path / "checkpoints" / "iteration-000001")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == before
    assert training_lines(tmp_path) == lines


def test_the_state_is_a_copy_that_later_steps_do_not_touch(tmp_path):
    trainer = make_trainer(tmp_path)
    state = TrainerState(trainer)
    adapter = state.values["adapter"][0].clone()
    trainer.train_iteration()
    assert torch.equal(state.values["adapter"][0], adapter) and state.timesteps == 0
    assert not torch.equal(trainer.policy.adapter, adapter)


def test_trainer_file_that_lacks_something_is_told_by_name(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.save_checkpoint()
    monkeypatch.setattr("vla_rl.learning.trainer_state.load_trainer_state", lambda folder: {"iteration": 0})
    with pytest.raises(CheckpointError, match=r"torn: trainer\.pt lacks actor_optimizer, .*timesteps"):
        make_trainer(tmp_path).load_checkpoint(find_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("iteration", None, "iteration: Input should be a valid integer, got None"),
        ("timesteps", True, "timesteps: Input should be a valid integer, got True"),
        ("evaluated_iteration", -2, "evaluated_iteration: Input should be greater than or equal to -1"),
        ("episodes_played", [0], "episodes_played has 1 entries, expected 4"),
        ("running_returns", torch.zeros(3), r"running_returns has \[3\] entries, expected 4"),
        ("running_lengths", torch.zeros(4), "expected floats and whole numbers"),
        ("sampling_generators", [torch.zeros(1)] * 4, "trainer.pt cannot be loaded"),
        ("schedule", {"reward_seen": 1}, "schedule.reward_seen: Input should be a valid boolean"),
        ("actor_optimizer", {}, "an optimizer's state is {}, expected the moments of 1 parameters"),
        ("signal_watch", 3, "signal_watch: Input should be a valid dictionary"),
        (
            "episodes_under_way",
            [
                {
                    "episode": {"task_id": 7, "initial_state": None, "seed": 0, "resets": 1},
                    "actions": torch.zeros(1, 2, 7),
                }
            ]
            * 4,
            "an episode of task 7 with 1 actions is none of this run's",
        ),
    ],
)
def test_a_value_that_no_run_has_is_told_by_name_before_anything_is_set_aside(
    tmp_path, monkeypatch, name, value, words
):
    trainer = make_trainer(tmp_path)
    folder = trainer.save_checkpoint()
    values = load_trainer_state(folder) | {name: value}
    monkeypatch.setattr("vla_rl.learning.trainer_state.load_trainer_state", lambda folder: values)
    with pytest.raises(CheckpointError, match=f"is torn: trainer.pt cannot be loaded.*{words}|{words}") as error:
        make_trainer(tmp_path).load_checkpoint(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
