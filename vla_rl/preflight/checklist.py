"""A list of checks: small functions that say what they found or raise an error with the remedy; none hides another.

Not here: what is checked (vla_rl.check).
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from vla_rl.run.failures import explain, one_line
from vla_rl.run.logs import OURS
from vla_rl.run.settings import ConfigError

# the remedy of what no setting can cause
BUG = "this is a fault of the program or of a change to it, not of your settings: run tests/run.sh"

V = TypeVar("V")  # what the checks are of, and what one leaves for those that need it


@dataclass(frozen=True)
class Result:
    """Of one check."""

    name: str
    ok: bool | None  # None: not run, since another one failed
    found: str
    remedy: str = ""
    warnings: tuple[str, ...] = ()  # what was logged meanwhile
    stack: str = ""  # of an error that may be a bug


@dataclass(frozen=True)
class Check(Generic[V]):
    name: str
    run: Callable[[V], Result]
    needs: tuple[str, ...] = ()  # names of checks that must have passed


class Checklist(Generic[V]):
    """Checks in the order in which they were added."""

    def __init__(self) -> None:
        self.checks: list[Check[V]] = []

    def add(self, name: str, *needs: str) -> Callable[[Callable[[V], str]], Callable[[V], str]]:
        """Decorates a function that returns what it found, or raises."""

        def register(function: Callable[[V], str]) -> Callable[[V], str]:
            def run(subject: V) -> Result:
                with collected_warnings() as warnings:
                    try:
                        result = Result(name, True, function(subject))
                    except Exception as error:
                        result = failure(name, error)
                return replace(result, warnings=tuple(warnings))

            self.checks.append(Check(name, run, needs))
            return function

        return register

    def run(self, subject: V, names: set[str] | None = None) -> Iterator[Result]:
        """The result of each check as soon as it is known; one whose needs were not met is not run.

        Args:
            names: only these; what they need of others is taken as given.
        """
        bad: set[str] = set()
        for check in self.checks:
            if names is not None and check.name not in names:
                continue
            unmet = [name for name in check.needs if name in bad]
            if unmet:
                result = Result(check.name, None, f"not run: it needs {', '.join(unmet)}, which failed or was not run")
            else:
                result = check.run(subject)
            if not result.ok:
                bad.add(check.name)
            yield result


def failure(name: str, error: Exception) -> Result:
    """What an error says was found, and the remedy; of one that may be a bug the stack too."""
    text = str(error) if isinstance(error, ConfigError) else explain(error)
    if text is not None:
        return Result(name, False, *split_remedy(text))
    stack = "".join(traceback.format_exception(error))
    return Result(name, False, f"{type(error).__name__}: {one_line(error)}", f"{BUG}; its stack is below", stack=stack)


def split_remedy(text: str) -> tuple[str, str]:
    """Our errors say what is wrong, then the way out: behind the first line, or the first semicolon or full stop outside
    brackets."""
    first, _, rest = text.partition("\n")
    if rest:
        return first.rstrip(":"), " ".join(rest.split())
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and re.match(r"; |\. (?=[A-Z])", text[place:]):
            return text[:place], text[place + 2 :]
    return text, "see what it says"


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What our own code warns of inside is collected, one line each, and nothing of it is shown."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(" ".join(record.getMessage().split()))

    handler, loggers = Collector(logging.WARNING), [logging.getLogger(name) for name in OURS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield texts
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def lines_of(result: Result, encoding: str | None) -> list[str]:
    """As it is shown: a mark, the name, what was found, and below it remedy and warnings."""
    shown = marks(encoding)
    width = max(map(len, shown.values()))
    below = f"{'':<{width}} {'':<20}"
    lines = [f"{shown[result.ok]:<{width}} {result.name:<20} {result.found}"]
    lines += [f"{below} remedy: {result.remedy}"] if result.ok is False else []
    return lines + [f"{below} warning: {warning}" for warning in result.warnings]


def marks(encoding: str | None) -> dict[bool | None, str]:
    """ok -> mark; words where the output cannot show the marks."""
    try:
        "✓✗".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return {True: "ok", False: "FAILED", None: "-"}
    return {True: "✓", False: "✗", None: "-"}
