"""What fits a card is found from few measurements, and memory that runs out in an update changes nothing but its speed.

There is no GPU here: tables stand for its memory, and policies that raise torch's own error for its end.
"""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

from tests.fakes import CHUNK, FakePolicy, WatchedPolicy
from tests.trainers import final_state, make_trainer, training_lines
from vla_rl.learning.memory import (
    MODES,
    Card,
    Choice,
    Meter,
    Probe,
    automatic_sizes,
    check_weights,
    choose,
    fit_line,
    fit_to_card,
    moment_bytes,
    rows_within,
    too_small,
)
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.settings import ConfigError, LoraConfig

MIB, GIB = 2**20, 2**30
# OpenVLA-7B on an H100: mode -> rows -> peak GiB, and (mode, rows) -> rows/s
TODAY = {"none": {4: 28.6, 8: 42.7, 16: 70.6}, "full": {16: 18.5, 32: 22.5}}
TODAY_RATES = {("none", 4): 8.4, ("none", 8): 14.6, ("none", 16): 18.3, ("full", 16): 12.9, ("full", 32): 14.9}
COMPILED = {"none": {16: 44.6, 24: 58.8}, "full": {16: 17.9, 32: 20.8}}  # and LoRA in bfloat16
COMPILED_RATES = {("none", 16): 29.7, ("none", 24): 39.3, ("full", 16): 21.4, ("full", 32): 27.4}


def card_of(total_gib: float) -> Card:
    """Half a GiB is CUDA's, two are the simulators'; 108 M parameters have no moments yet."""
    return Card(int((total_gib - 2.5) * GIB), 8 * 108_000_000)


def table_meter(table, total_gib: float, asked: list | None = None):
    """measure(mode, rows) of a table's lines; memory runs out above the card's."""
    lines = {mode: np.polyfit(list(peaks), list(peaks.values()), 1) for mode, peaks in table.items()}

    def measure(mode: str, rows: int) -> int | None:
        if asked is not None:
            asked.append((mode, rows))
        peak = float(np.polyval(lines[mode], rows))
        return int(peak * GIB) if peak < total_gib - 2.5 else None

    return measure


# the choice


def test_a_line_through_measured_peaks_gives_base_and_slope():
    """By hand: (58.8 - 44.6) / 8 = 1.775 GiB a row, 44.6 - 16 x 1.775 = 16.2."""
    base, slope = fit_line(COMPILED["none"])
    assert (base, slope) == (pytest.approx(16.2), pytest.approx(1.775))
    # least squares of three points that are on no line: rows 0, 1, 2 and 0, 1, 5 have slope 5/2 and base -1/2
    assert fit_line({0: 0, 1: 1, 2: 5}) == (pytest.approx(-0.5), pytest.approx(2.5))
    assert fit_line({2: 30}, at_rest=14) == (14.0, 8.0)


def test_rows_within_a_limit_end_where_the_next_one_does_not_fit():
    assert rows_within((10.0, 2.0), 20.0) == 5 and rows_within((10.0, 2.0), 19.9) == 4
    assert rows_within((10.0, 2.0), 9.0) == 0
    flat = fit_line({4: 100, 8: 100})  # rows that cost nothing
    assert rows_within(flat, 1e6) > 64 and rows_within(flat, 99) == 0


@pytest.mark.parametrize(
    ("most", "minibatch_size", "rows"),
    [
        (24, 64, 24),  # three forwards; of 16 rows they would be four
        (23, 64, 16),
        (60, 64, 32),  # 48 and 32 need two: the even ones
        (64, 64, 64),
        (1000, 64, 64),
        (1000, 128, 64),
        (24, 128, 24),
        (64, 100, 64),
        (20, 24, 12),  # 16 rows are enough for the mode, and 12 + 12 are as many forwards as 16 + 8
        (3, 64, 2),
        (100, 5, 5),
    ],
)
def test_rows_need_the_fewest_forwards_and_divide_the_minibatch_evenly(most, minibatch_size, rows):
    assert choose({"none": most}, automatic_sizes(minibatch_size), minibatch_size) == Choice("none", rows)


def test_choices_fit_and_no_size_that_fits_needs_fewer_forwards():
    rng = random.Random(0)
    for _ in range(500):
        minibatch_size, sizes = rng.randint(1, 200), None
        sizes = automatic_sizes(minibatch_size)
        most = {mode: rng.randint(1, 80) for mode in MODES}
        choice = choose(most, sizes, minibatch_size)
        assert choice.rows <= min(most[choice.mode], minibatch_size) and choice.rows in sizes
        fitting = [size for size in sizes if size <= most[choice.mode]]
        assert -(-minibatch_size // choice.rows) == min(-(-minibatch_size // size) for size in fitting)


def test_the_first_mode_with_enough_rows_is_taken_else_the_one_with_most():
    sizes = automatic_sizes(64)
    assert choose({"none": 16, "selective": 64, "full": 64}, sizes, 64) == Choice("none", 16)
    assert choose({"none": 15, "selective": 17, "full": 64}, sizes, 64) == Choice("selective", 16)
    assert choose({"none": 2, "selective": 5, "full": 13}, sizes, 64) == Choice("full", 12)
    assert choose({"none": 4, "selective": 5, "full": 5}, sizes, 64) == Choice("none", 4)  # what recomputes least
    assert choose({"none": 0, "selective": 0, "full": 0}, sizes, 64) is None
    assert choose({"none": 5, "full": 64}, automatic_sizes(4), 4) == Choice("none", 4)  # a whole minibatch is enough
    assert choose({"none": 17, "full": 64}, (20,), 64) == Choice("full", 20)  # the rows are given


@pytest.mark.parametrize(("table", "rates"), [(TODAY, TODAY_RATES), (COMPILED, COMPILED_RATES)])
@pytest.mark.parametrize("minibatch_size", [64, 128])
def test_on_80_gb_the_choice_is_the_fastest_of_what_was_measured(table, rates, minibatch_size):
    probe = Probe(table_meter(table, 79.1), ("none", "full"), automatic_sizes(minibatch_size), minibatch_size, 0)
    choice = probe.choose(card_of(79.1).comfortable)
    assert (choice.mode, choice.rows) == max(rates, key=rates.get)


@pytest.mark.parametrize("table", [TODAY, COMPILED])
def test_on_24_gb_the_choice_is_full_checkpointing_of_16_rows(table):
    probe = Probe(table_meter(table, 23.6), ("none", "full"), automatic_sizes(64), 64, 0)
    assert probe.choose(card_of(23.6).comfortable) == Choice("full", 16)


def test_few_measurements_are_made_and_each_once():
    asked = []
    probe = Probe(table_meter(COMPILED, 79.1, asked), ("none", "full"), automatic_sizes(64), 64, 0)
    limit = card_of(79.1).comfortable
    assert probe.choose(limit) == probe.choose(limit)
    assert asked == [("none", 4), ("none", 8), ("none", 24)]


def test_given_settings_are_tried_and_nothing_else():
    asked = []
    probe = Probe(table_meter(COMPILED, 79.1, asked), ("full",), (10,), 64, 0)
    assert probe.choose(card_of(79.1).usable) == Choice("full", 10) and asked == [("full", 10)]


def test_a_choice_that_does_not_run_steps_down_until_one_does():
    """The line says 24; in truth memory runs out above 12, and the mode has too few rows then."""
    asked = []
    line = table_meter(COMPILED, 79.1, asked)

    def measure(mode, rows):
        peak = line(mode, rows)
        return None if mode == "none" and rows > 12 else peak

    probe = Probe(measure, ("none", "full"), automatic_sizes(64), 64, 0)
    choice = probe.choose(card_of(79.1).comfortable)
    assert asked[:4] == [("none", 4), ("none", 8), ("none", 24), ("none", 16)]
    assert choice.mode == "full" and asked[-1] == ("full", choice.rows)


def test_a_choice_that_runs_but_leaves_no_room_steps_down_too():
    limit = 40

    def measure(mode, rows):  # 2 a row by the line of 4 and 8, twice as much above 16
        return 10 + 2 * rows + max(0, rows - 12) * 2

    probe = Probe(measure, ("full",), automatic_sizes(16), 16, 0)
    assert [measure("full", rows) for rows in (8, 12, 16)] == [26, 34, 50]
    assert probe.choose(limit) == Choice("full", 8)  # 8 + 8 are as many forwards as 12 + 4
    assert probe.choose(20) == Choice("full", 4)


@pytest.mark.parametrize(("fitting", "expected"), [(7, 4), (3, 2), (1, 1), (0, None)])
def test_a_card_for_a_few_rows_is_used_by_the_mode_that_needs_least(fitting, expected):
    asked = []

    def measure(mode, rows):
        asked.append((mode, rows))
        return 10 + rows if mode == "full" and rows <= fitting else None

    choice = Probe(measure, MODES, automatic_sizes(64), 64, 0).choose(1000)
    assert (choice.rows if choice else None) == expected
    assert [a for a in asked if a[0] != "full"] == [("none", 4), ("selective", 4)]


# the refusal


def refusal(asked: Choice, modes, table=TODAY, total_gib=79.1) -> str:
    table = table | {"selective": table.get("selective", table["none"])}
    card = card_of(total_gib)
    probe = Probe(table_meter(table, total_gib), modes, (asked.rows,), 64, int(14.5 * GIB))
    assert probe.choose(card.usable) is None
    return str(too_small(probe, card, asked))


def test_a_card_too_small_is_told_what_the_settings_need_and_which_would_fit():
    """None with 32 rows: 14.6 + 3.5 x 32 = 126.6, and 0.8 for moments; with 16 rows 71.4."""
    text = refusal(Choice("none", 32), ("none",))
    assert "policy.gradient_checkpointing=none with algorithm.micro_batch_size=32 needs 127." in text
    assert "the card has 76.6 GiB" in text and "nvidia-smi" in text and "\n" not in text
    assert (
        "what fits: algorithm.micro_batch_size=16, or policy.gradient_checkpointing=selective with algorithm.micro_batch_"
        in text
    )
    assert "size=16, or policy.gradient_checkpointing=full, or auto for both" in text


def test_rows_that_only_checkpointing_makes_fit_are_told_so():
    """24 GB: without checkpointing 14.6 + 3.5 rows; one fits of 21.1 - 0.8."""
    text = refusal(Choice("none", 16), ("none",), total_gib=23.6)
    assert "what fits: algorithm.micro_batch_size=1, or " in text
    assert "policy.gradient_checkpointing=full, or auto" in text


def test_a_card_on_which_nothing_fits_is_told_the_least_and_other_settings():
    text = refusal(Choice("full", 1), MODES, total_gib=17.1)
    assert "not one row of the update fits" in text and "14.5 GiB of it the model alone" in text
    assert "the card has 14.6 GiB" in text and "policy.quantization=nf4" in text


def test_weights_that_the_card_has_no_room_for_are_refused_before_they_are_loaded():
    check_weights(14 * GIB, 15 * GIB, 16 * GIB, "bfloat16")
    words = r"weights take 14.0 GiB in bfloat16, and 11.5 GiB of the card's 79.1 are free \(nvidia-smi .* take policy.quantization"
    with pytest.raises(ConfigError, match=words):
        check_weights(14 * GIB, int(11.5 * GIB), int(79.1 * GIB), "bfloat16")
    with pytest.raises(ConfigError, match=r"take policy.dtype=bfloat16, "):
        check_weights(28 * GIB, 15 * GIB, 16 * GIB, "float32")


# the measurement


class FakeMeter(Meter):
    """Runs the trainer's passes; what memory they take is of a function, not of a card."""

    def __init__(self, trainer, gradients=lambda mode, rows: rows, acting=lambda rows: rows, room=10**12):
        super().__init__(trainer, ["do", "do task 0", "do it"])
        self.tables, self.room, self.asked = (gradients, acting), room, []

    def available(self):
        return self.room + moment_bytes(self.trainer)

    def at_rest(self):
        return 1

    def peak_of(self, run):
        run()
        return self.taken

    def gradients(self, mode, rows):
        self.taken = self.tables[0](mode, rows)
        self.asked.append((mode, rows))
        return super().gradients(mode, rows)

    def acting(self, rows):
        self.taken = self.tables[1](rows)
        self.asked.append(("act", rows))
        return super().acting(rows)


def automatic(trainer, mode="auto"):
    """The trainer with policy.gradient_checkpointing=auto."""
    policy = trainer.config.policy.model_copy(update={"gradient_checkpointing": mode})
    trainer.config = trainer.config.model_copy(update={"policy": policy})
    trainer.policy.set_gradient_checkpointing("none" if mode == "auto" else mode)
    return trainer


AUTO = {"micro_batch_size": "auto"}


def test_without_a_gpu_nothing_is_measured_and_auto_is_a_minibatch_of_at_most_64_rows(tmp_path):
    for minibatch_size, rows in ((16, 16), (100, 64)):
        algorithm = AUTO | {"minibatch_size": minibatch_size}
        trainer = make_trainer(tmp_path / str(rows), algorithm=algorithm, rollout={"n_steps": 32})
        fit_to_card(trainer, ["do task 0"])
        assert trainer.policy.forwards == 0
        assert trainer.micro_batches.choice == Choice("none", rows)


def test_the_measured_passes_are_the_updates_own_with_two_micro_batches(tmp_path):
    trainer = automatic(make_trainer(tmp_path, policy=WatchedPolicy(), algorithm=AUTO, evaluate=True))
    meter = FakeMeter(trainer)
    fit_to_card(trainer, [], meter)
    assert meter.asked == [("act", 4), ("act", 2), ("none", 4), ("none", 8), ("none", 16)]
    assert trainer.policy.scored == [("none", rows, second) for rows in (4, 8) for second in (False, True)] + [
        ("none", 16, False)  # the whole minibatch
    ]
    obs = trainer.policy.acted[0]
    assert obs.images.shape == (4, 1, 8, 8, 3) and obs.instructions == ("do task 0",) * 4
    assert trainer.micro_batches.choice == Choice("none", 16)


@pytest.mark.parametrize("changes", [{"estimator": "grpo"}, {"kl_coef": 0.1}, {"logprob_level": "chunk"}])
def test_every_kind_of_update_can_be_measured(tmp_path, changes):
    policy = FakePolicy(gives_hidden="estimator" in changes)
    trainer = automatic(make_trainer(tmp_path, policy=policy, algorithm=AUTO | changes))
    fit_to_card(trainer, [], FakeMeter(trainer, gradients=lambda mode, rows: 10 * rows, room=100))
    assert trainer.micro_batches.choice == Choice("none", 8)
    assert all(p.grad is None for p in [*trainer.actor_parameters, *trainer.critic_parameters])


def by_mode(mode, rows):
    """Of 1000 MiB 3, 11 and 30 rows, and of 950 MiB, without the margin, 2, 10 and 28."""
    return (100 + {"none": 300, "selective": 80, "full": 30}[mode] * rows) * MIB


@pytest.mark.parametrize(
    ("mode", "rows", "expected"),
    [
        ("auto", "auto", Choice("full", 16)),
        ("none", "auto", Choice("none", 2)),
        ("auto", 8, Choice("selective", 8)),
        ("selective", 4, Choice("selective", 4)),
    ],
)
def test_what_is_given_stays_and_what_is_auto_is_chosen(tmp_path, caplog, mode, rows, expected):
    trainer = automatic(make_trainer(tmp_path, algorithm={"micro_batch_size": rows}), mode)
    caplog.set_level(logging.INFO)
    fit_to_card(trainer, [], FakeMeter(trainer, by_mode, room=1000 * MIB))
    assert trainer.micro_batches.choice == expected
    (record,) = [r for r in caplog.records if "AdamW" in r.getMessage()]
    assert record.getMessage().startswith(f"{expected}: ") and "\n" not in record.getMessage()


def test_five_percent_of_the_card_are_left_free(tmp_path):
    """16 rows of 100 MiB are within 1650 MiB, but not within 1567; two forwards of 8 are."""
    trainer = automatic(make_trainer(tmp_path, algorithm=AUTO))
    fit_to_card(trainer, [], FakeMeter(trainer, lambda mode, rows: 100 * rows * MIB, room=1650 * MIB))
    assert trainer.micro_batches.choice == Choice("none", 8)


def test_settings_that_fit_without_the_margin_only_are_accepted(tmp_path):
    trainer = automatic(make_trainer(tmp_path, algorithm={"micro_batch_size": 8}), "none")
    reserved = moment_bytes(trainer)
    peak = 100 * reserved
    meter = FakeMeter(trainer, lambda mode, rows: peak, room=peak)
    assert peak > Card(meter.available(), reserved).comfortable
    fit_to_card(trainer, [], meter)
    assert trainer.micro_batches.choice == Choice("none", 8)


def test_settings_that_do_not_fit_are_refused_and_the_trainer_stays_as_it_was(tmp_path):
    trainer = automatic(make_trainer(tmp_path, algorithm={"micro_batch_size": 16}), "none")
    with pytest.raises(
        ConfigError, match=r"=none with algorithm.micro_batch_size=16 needs .*micro_batch_size=2, or "
    ) as error:
        fit_to_card(trainer, [], FakeMeter(trainer, by_mode, room=1000 * MIB))
    assert "policy.gradient_checkpointing=selective with algorithm.micro_batch_size=8, or " in str(error.value)
    assert "policy.gradient_checkpointing=full, or auto" in str(error.value)
    assert trainer.micro_batches.choice == Choice("none", 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"num_envs": 8}}, "8 rows in one forward do not fit the card, 4 do; set rollout.overlap=true"),
        (
            {"rollout": {"num_envs": 16, "overlap": True}},
            "8 rows in one forward do not fit .* rollout.num_envs=8 with more",
        ),
        ({"eval": {"states": "0-49", "num_envs": 8}}, "8 rows in one forward do not fit .* set eval.num_envs=4"),
    ],
)
def test_more_environments_than_one_forward_can_have_are_refused_with_the_number_that_fits(tmp_path, changes, words):
    trainer = automatic(make_trainer(tmp_path, evaluate=True, algorithm=AUTO, **changes))
    with pytest.raises(ConfigError, match=words):
        fit_to_card(trainer, [], FakeMeter(trainer, acting=lambda rows: 10 * rows, room=50))
    with pytest.raises(ConfigError, match="one row of a forward without gradients does not fit"):
        fit_to_card(trainer, [], FakeMeter(trainer, acting=lambda rows: 10 * rows, room=5))


def test_moments_are_reserved_until_they_are_there(tmp_path):
    """Adapter 16 x 16, head 16 x 32 + 32 + 32 x 1 + 1 parameters: 8 bytes each."""
    trainer = make_trainer(tmp_path)
    assert sum(p.numel() for p in trainer.critic_parameters) == 577
    assert moment_bytes(trainer) == 8 * (256 + 577)
    trainer.update(trainer.compute_advantages(trainer.collect_rollout()[0])[0])
    assert moment_bytes(trainer) == 0


def test_simulators_are_there_when_it_is_measured_and_episodes_under_way_go_on(tmp_path):
    trainer = automatic(make_trainer(tmp_path, evaluate=True, algorithm=AUTO, env={"task_ids": "0-2"}))
    meter = FakeMeter(trainer)
    fit_to_card(trainer, [], meter)
    tasks = [[env.episode.task_id for env in envs.envs] for envs in (trainer.envs, trainer.eval_envs)]
    assert tasks == [[0, 1, 2, 0], [0, 1]] and trainer.obs is None
    trainer.train_iteration()
    before, obs = trainer.envs.episode_states(), trainer.obs
    fit_to_card(trainer, [], meter)
    after = trainer.envs.episode_states()
    assert [state["episode"] for state in after] == [state["episode"] for state in before] and trainer.obs is obs


def run(folder, measure: bool, **kwargs):
    """A training of three iterations; its measurement ends with the rows that the settings would have without it."""
    trainer = automatic(make_trainer(folder, algorithm={"micro_batch_size": "auto"}, **kwargs))
    torch.manual_seed(5)
    if measure:
        fit_to_card(trainer, [], FakeMeter(trainer, by_mode, room=1000 * MIB))  # in all modes
        assert trainer.micro_batches.choice == Choice("full", 16)
        meter = FakeMeter(trainer)
        fit_to_card(trainer, [], meter)
        assert len(meter.asked) > 3
    assert trainer.micro_batches.choice == Choice("none", 16)
    drawn = torch.rand(3)
    trainer.train()
    return trainer, drawn


def test_a_measurement_leaves_no_trace_in_the_run(tmp_path):
    runs = [run(tmp_path / str(measure), measure, evaluate=True) for measure in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*(final_state(trainer) for trainer, _ in runs), strict=True))
    assert torch.equal(runs[0][1], runs[1][1])
    assert training_lines(tmp_path / "False") == training_lines(tmp_path / "True")


def test_a_measurement_of_the_shipped_policy_leaves_no_trace_in_the_run(tmp_path):
    states = []
    for measure in (False, True):
        torch.manual_seed(0)
        policy = OpenVLAPolicy.from_checkpoint(
            "tiny-openvla-random", "parallel", lora=LoraConfig(rank=4), chunk_size=CHUNK, unnorm_key="libero_spatial"
        )
        trainer, _ = run(tmp_path / str(measure), measure, policy=policy, run={"timesteps": 1})
        states.append(final_state(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
