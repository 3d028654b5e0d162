"""Checks, none of which hides another, and how they are shown."""

import logging

import pytest

from vla_rl.preflight.checklist import Checklist, Result, lines_of, split_remedy


def test_a_failing_check_hides_no_other_and_a_bug_shows_its_stack():
    checks: Checklist[None] = Checklist()

    @checks.add("breaks")
    def breaks(_):
        raise KeyError("oops")

    @checks.add("needs it", "breaks")
    def needs(_):
        return "never"

    @checks.add("needs that", "needs it")
    def needs_more(_):
        return "never"

    @checks.add("alone")
    def alone(_):
        logging.getLogger("vla_rl.x").warning("two\nlines")
        return "fine"

    first, second, third, last = checks.run(None)
    assert (first.ok, second.ok, third.ok, last.ok) == (False, None, None, True)
    assert "KeyError" in first.found and "run tests/run.sh" in first.remedy and 'KeyError("oops")' in first.stack
    assert "needs it" in third.found
    assert last.warnings == ("two lines",) and "warning: two lines" in lines_of(last, "utf-8")[-1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1 (b; c) is wrong; use a=2; or b", ("a=1 (b; c) is wrong", "use a=2; or b")),
        ("no GPU (x. Y). Use another", ("no GPU (x. Y)", "Use another")),
        ("cannot render: x\n  install y\n  or z", ("cannot render: x", "install y or z")),
        ("nothing else", ("nothing else", "see what it says")),
        ("version 2.3.7 is wrong; mend it", ("version 2.3.7 is wrong", "mend it")),
    ],
)
def test_an_error_is_taken_apart_into_what_was_found_and_the_remedy(text, parts):
    assert split_remedy(text) == parts


def test_marks_are_letters_where_the_output_has_no_ticks():
    results = [Result("a", True, "x"), Result("b", False, "y", "do z"), Result("c", None, "not run")]
    assert [line[0] for r in results for line in lines_of(r, "utf-8")] == ["✓", "✗", " ", "-"]
    for encoding in ("ascii", "latin-1", None, "no-such"):
        lines = [line for r in results for line in lines_of(r, encoding)]
        assert [line.split()[0] for line in lines] == ["ok", "FAILED", "remedy:", "-"]
        assert all(line.isascii() for line in lines)


def test_only_some_of_the_checks_are_run_where_they_are_named():
    checks: Checklist[None] = Checklist()
    for name, needs in (("a", ()), ("b", ("a",)), ("c", ("b",))):
        checks.add(name, *needs)(lambda _: "fine")
    assert [(result.name, result.ok) for result in checks.run(None, {"b", "c"})] == [("b", True), ("c", True)]
