"""A worker's error arrives in the main process: its words, its class where that can be, and its traceback as a note."""

import errno
import os

import gymnasium
import numpy as np
import pytest

from vla_rl import demonstrations
from vla_rl.demonstrations import Disturbance, record_task
from vla_rl.run.failures import explain
from vla_rl.run.settings import ConfigError
from vla_rl.simulation import vector_env
from vla_rl.simulation.libero_env import Simulators
from vla_rl.simulation.vector_env import LiberoVectorEnv
from vla_rl.simulation.worker import Worker
from vla_rl.simulation.worker_errors import WorkerError
from vla_rl.types import Episode, RenderingError

SETTINGS = {"task_suite": "libero_spatial", "chunk_size": 2, "image_size": 16}
WORDS = "100% of {x} %s %d %(no)s é 雪 \\n\nand a second line"


class TwoArguments(Exception):
    """Is pickled, and fails to be built again."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


class NoPickle(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def local_error():
    class Local(Exception):
        pass

    return Local(WORDS)


def nested_error():
    try:
        raise KeyError("100%")
    except KeyError as error:
        chained = ValueError(WORDS)
        chained.__cause__ = error
        return chained


ERRORS = {  # what a worker raises -> class and text that arrive
    "words": (lambda: ValueError(WORDS), ValueError, WORDS),
    "config": (lambda: ConfigError(WORDS), ConfigError, WORDS),
    "rendering": (lambda: RenderingError(WORDS), RenderingError, WORDS),
    "disk": (lambda: OSError(errno.ENOSPC, "No space left on 100%"), OSError, "[Errno 28] No space left on 100%"),
    "text": (lambda: UnicodeDecodeError("utf-8", b"%", 0, 1, "50%"), UnicodeDecodeError, "50%"),
    "end": (lambda: EOFError("100% of a file"), EOFError, "100% of a file"),  # not to be taken for a dead worker
    "connection": (lambda: ConnectionResetError("%s"), ConnectionResetError, "%s"),
    "chained": (nested_error, ValueError, WORDS),
    "empty": (AssertionError, AssertionError, ""),
    "two arguments": (lambda: TwoArguments("50%", "{y}"), RuntimeError, "TwoArguments: 50% at {y}"),
    "no pickle": (lambda: NoPickle("%d"), RuntimeError, "NoPickle: %d"),
    "local": (local_error, RuntimeError, WORDS),
}


class FailingWorker(Worker):
    """Does nothing but fail, in one of its methods."""

    def __init__(self, name, where, *args):
        super().__init__(*args)
        self.name, self.where = name, where

    def reset(self, **_):
        return self.fail("reset") or (self.observations, {"instructions": ()})

    def step(self, action):
        flags = np.zeros((2, self.places), bool)
        infos = {"steps": np.zeros(self.places, int), "success": flags[0], "begun": flags[0]}
        infos |= {"instructions": (), "truncated": ()}
        return self.fail("step") or (self.observations, np.zeros(self.places), *flags, infos)

    def episode_states(self):
        return self.fail("call") or {i: None for i in self.envs}

    def fail(self, where):
        if where == self.where:
            raise ERRORS[self.name][0]()


def make_envs(monkeypatch, name, where):
    pid = os.getpid()

    def make(env_kwargs, indices, places, *_):
        def build():
            if where == "construction" and os.getpid() != pid:
                raise ERRORS[name][0]()
            return FailingWorker(name, where, env_kwargs, indices, places, Simulators())

        return build

    monkeypatch.setattr(vector_env, "MakeWorker", make)
    return LiberoVectorEnv(SETTINGS, num_envs=1, num_workers=1)


def use(envs):
    envs.reset(seed=0)
    envs.step(np.zeros((1, 2, 7), np.float32))
    envs.episode_states()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "step") for name in ERRORS),
        *(("words", w) for w in ("construction", "reset", "call")),
        ("local", "construction"),
    ],
)
def test_a_workers_error_arrives_in_its_own_words(monkeypatch, recwarn, name, where):
    _, kind, text = ERRORS[name]
    with pytest.raises(BaseException) as raised:
        envs = make_envs(monkeypatch, name, where)
        use(envs)
    error = raised.value
    assert type(error) is kind and text in str(error)
    note = "".join(error.__notes__)
    assert note.startswith(
        "In simulator worker 0:\nTraceback (most recent call last)"
    ) and "in fail" in note + "in fail" * (where == "construction")
    assert not list(recwarn)
    if where != "construction":
        assert envs.workers.closed and not any(process.is_alive() for process in envs.processes)
        envs.close()


def test_errors_of_several_workers_are_told_and_all_are_ended(monkeypatch):
    make_envs(monkeypatch, "words", "never").close()
    envs = LiberoVectorEnv(SETTINGS, num_envs=2, num_workers=2)
    for worker in envs.workers.env_fns:
        assert isinstance(worker(), gymnasium.Env)
    envs.workers.call_async("no_such_%s")
    with pytest.raises(AttributeError, match="no_such_%s") as raised:
        envs.workers.call_wait()
    assert [note.split(":")[0] for note in raised.value.__notes__] == [
        "In simulator worker 0",
        "In simulator worker 1, too",
    ]
    envs.close()


@pytest.mark.parametrize("name", ["config", "rendering", "disk"])
def test_what_is_told_in_one_line_is_told_so_from_a_worker_too(monkeypatch, name):
    build, _, _ = ERRORS[name]
    error = WorkerError.of(build()).exception("worker 0")
    assert type(error) is type(build()) and explain(error) == explain(build())
    assert isinstance(error, ConfigError) or explain(error)


def test_a_class_that_this_process_has_not_imported_is_named_and_not_imported():
    told = WorkerError(
        pickled=b"not looked at", module="robosuite.utils.no", kind="RandomizationError", message="%", trace=""
    )
    assert repr(told.exception("x")) == "RuntimeError('RandomizationError: %')"


@pytest.mark.parametrize("name", ERRORS)
def test_the_recorder_tells_a_workers_error(monkeypatch, name):
    build, kind, text = ERRORS[name]

    def fail(recording):
        raise build()

    class Pool:
        def submit(self, function, *args):
            from concurrent.futures import Future
            from multiprocessing.reduction import ForkingPickler

            future = Future()
            future.set_result(ForkingPickler.loads(ForkingPickler.dumps(function(*args))))  # through a pipe
            return future

    monkeypatch.setattr(demonstrations, "make_env", fail)
    monkeypatch.setattr(demonstrations, "RECORDINGS", [None])
    with pytest.raises(kind) as raised:
        list(record_task(Pool(), iter([Episode(0, 0, 0)] * 3), 1, Disturbance(), ahead=1, name="task 0"))
    assert type(raised.value) is kind and text in str(raised.value)
    assert "In a worker that recorded task 0:\nTraceback" in raised.value.__notes__[-1]
