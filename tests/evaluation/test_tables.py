"""Tables say what was measured: rates, intervals, drops, and what changed from a baseline."""

import pytest

from vla_rl.evaluation.results import Key
from vla_rl.evaluation.tables import (
    Rate,
    Table,
    compare,
    compare_modes,
    comparison_table,
    family_table,
    flip_lines,
    points,
    protocol_text,
    ranges,
    rate,
    suite_table,
    summary,
)


def rows(outcomes: dict[tuple, list[int]], length=100) -> dict:
    """(suite, mode, task) -> success of states 0, 1, ..."""
    return {
        Key(*where, state): {"success": bool(success), "length": length + state if success else 220}
        for where, successes in outcomes.items()
        for state, success in enumerate(successes)
    }


SPATIAL = rows(
    {
        ("s", "greedy", 0): [1] * 8 + [0] * 2,
        ("s", "greedy", 1): [0] * 10,
        ("s", "sampled", 0): [1] * 10,
        ("s", "sampled", 1): [0] * 10,
    }
)


def test_a_rate_has_its_interval_and_the_length_of_its_successes():
    found = rate(SPATIAL, task_suite="s", mode="greedy", task_id=0)
    assert found == Rate(8, 10, pytest.approx(103.5))  # 100 to 107
    assert str(found) == "80.0 % (49.0 to 94.3)"  # Wilson, by hand in test_statistics
    assert str(rate(SPATIAL, mode="greedy", task_id=1)) == "0.0 % (0.0 to 27.8)"
    assert str(Rate.of([])) == "-"


def test_the_summary_has_each_suite_and_task_by_mode():
    found = {(row["mode"], row["task_id"]): row for row in summary(SPATIAL)}
    assert list(found) == [(mode, task) for mode in ("greedy", "sampled") for task in (None, 0, 1)]
    whole = found["greedy", None]
    assert (whole["successes"], whole["episodes"], whole["success_rate"]) == (8, 20, 0.4)
    assert found["sampled", 1]["length_of_successes"] is None and found["greedy", 0]["low"] == pytest.approx(
        0.49016, abs=2e-5
    )


def test_a_suite_table_has_a_line_a_task_and_one_of_all():
    table = suite_table(SPATIAL, "s", ["greedy", "sampled"], ["pick", "place"])
    assert table.rows == [
        ["task", "greedy", "steps", "sampled", "steps", "instruction"],
        ["0", "80.0 % (49.0 to 94.3)", "104", "100.0 % (72.2 to 100.0)", "104", "pick"],
        ["1", "0.0 % (0.0 to 27.8)", "-", "0.0 % (0.0 to 27.8)", "-", "place"],
        ["all", "40.0 % (21.9 to 61.3)", "104", "50.0 % (29.9 to 70.1)", "104", ""],
    ]


def test_a_table_is_text_and_markdown():
    table = Table("t", [["a", "bbb"], ["cc", "d"]])
    assert table.text() == "t\n\na   bbb\ncc  d"
    assert table.markdown() == "## t\n\n| a | bbb |\n|---|---|\n| cc | d |"


def test_a_family_tells_the_drop_from_its_base():
    family = rows({("base", "greedy", 0): [1] * 56 + [0] * 14, ("base_swap", "greedy", 0): [1] * 48 + [0] * 32})
    table = family_table(family, ["base", "base_swap"], ["greedy"])
    # Newcombe 1998: 56/70 and 48/80 differ by 0.2, 0.0524 to 0.3339
    assert table.rows[1:] == [
        ["base", "80.0 % (69.2 to 87.7)", ""],
        ["base_swap", "60.0 % (49.0 to 70.0)", "-20.0 (-33.4 to -5.2)"],
    ]


def test_points_have_their_sign():
    assert points(0.125, -0.02, 0.3) == "+12.5 (-2.0 to +30.0)"


def test_states_are_paired_and_the_flipped_ones_named():
    ours = rows({("s", "greedy", 0): [1, 1, 0, 0], ("s", "greedy", 3): [1, 0], ("s", "sampled", 0): [1]})
    theirs = rows({("s", "greedy", 0): [0, 1, 1, 0, 1], ("s", "greedy", 3): [0, 0]})
    (comparison,) = compare(ours, theirs)  # the baseline has nothing sampled
    values = comparison.as_dict()
    assert (comparison.pairs, values["success_rate"], values["baseline_success_rate"]) == (6, 3 / 6, 2 / 6)
    assert values["gained"] == [[0, 0], [3, 0]] and values["lost"] == [[0, 2]]
    assert values["difference"] == pytest.approx(1 / 6) and values["mcnemar_p"] == 1.0  # 2 P(X <= 1 of 3) = 1
    assert values["low"] < 0 < values["high"]
    table = comparison_table([comparison], "old")
    assert table.title == "Against old, the same states paired"
    assert table.rows[1][:5] == ["s", "greedy", "6", "50.0 %", "33.3 %"] and table.rows[1][6:] == ["1", "2", "1"]
    assert flip_lines([comparison]) == [
        "s greedy, gained: task 0 state 0; task 3 state 0",
        "s greedy, lost: task 0 state 2",
    ]


def test_without_a_flip_none_is_named():
    assert flip_lines(compare(SPATIAL, SPATIAL))[:2] == ["s greedy, gained: none", "s greedy, lost: none"]


def test_modes_are_compared_state_by_state_with_the_first():
    played = rows(
        {("s", "greedy", 0): [1, 1, 0, 0], ("s", "mean_action", 0): [1, 0, 1, 1], ("s", "sampled", 0): [0, 1]}
    )
    mean_action, sampled = compare_modes(played, ["greedy", "mean_action", "sampled"])
    assert (mean_action.mode, mean_action.pairs, mean_action.successes, mean_action.baseline_successes) == (
        "mean_action",
        4,
        3,
        2,
    )
    assert [[key.initial_state for key in keys] for keys in (mean_action.gained, mean_action.lost)] == [[2, 3], [1]]
    assert (sampled.mode, sampled.pairs, len(sampled.gained), len(sampled.lost)) == ("sampled", 2, 0, 1)
    assert compare_modes(played, ["greedy"]) == []


def test_the_protocol_says_how_it_was_rendered_and_sampled():
    protocol = {"states": list(range(50)), "max_steps": {"s": 220}, "modes": ["greedy", "sampled"], "temperature": 1.0}
    protocol |= {"render": "fast", "image_size": 128, "settle_steps": 10, "seed": 3}
    text = protocol_text(protocol, {"name": "tiny"}, {"env_steps_per_s": 41.7})
    for words in (
        "tiny",
        "states 0-49",
        "Rendered fast at 128 px",
        "step limit s 220",
        "Temperature of sampled 1.",
        "42 simulator steps",
    ):
        assert words in text
    assert "emperature" not in protocol_text(protocol | {"modes": ["greedy"]}, {"name": "x"}, {"env_steps_per_s": None})


def test_ranges_are_read_as_they_are_written():
    from vla_rl.run.section import parse_indices

    for text in ("0-49", "7", "0-3,7,9-10"):
        assert ranges(parse_indices(text)) == text
