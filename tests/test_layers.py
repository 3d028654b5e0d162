"""The architecture: imports point down, heavy packages have one home, every module is explained and tested."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vla_rl"

# what a wing, a command or a program may import: itself, and what is on a floor below it; not what stands beside it
FLOORS = [
    {"types"},
    {"run"},
    {"reports", "simulation", "model"},
    {"learning"},
    {"fine_tuning", "preflight"},
    {"evaluation"},
    {"OpenVLA_PPO"},
    {"commands"},
    {"start_gae_ppo_training"},
    {"integrations"},
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}

# package -> the wing or the only modules that may import it
HOMES = {
    "transformers": {"model/prismatic"},
    "timm": {"model/prismatic"},
    "peft": {"model/adapter", "model/lora_linear"},
    "bitsandbytes": {"model/quantization"},
    "huggingface_hub": {"model/checkpoint_folder"},
    "libero": {"simulation/suites", "simulation/simulator"},
    "robosuite": {"simulation/simulator", "simulation/arm_control", "simulation/rendering"},
    "mujoco": {"simulation/simulator", "simulation/arm_control", "simulation/rendering", "simulation/model_cache"},
    "wandb": {"reports/weights_and_biases"},
    "tensorboardX": {"reports/tensorboard"},
    "matplotlib": {"reports/drawing"},
    "jinja2": {"reports/report"},
    "h5py": {"fine_tuning/demonstration_file"},
    "cv2": {"fine_tuning/augmentation"},
    "vla_eval": {"integrations/vla_eval_server"},
    "tensorflow": set(),
}

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__init__"]
PROGRAMS = [path for path in (ROOT / "OpenVLA_PPO.py", ROOT / "start_gae_ppo_training.py") if path.exists()]
INTEGRATIONS = [path for path in sorted((ROOT / "integrations").glob("*.py")) if path.stem != "__init__"]


def name_of(path: Path) -> str:
    """ "run/settings", "sft", "OpenVLA_PPO"."""
    return str((path.relative_to(PACKAGE) if PACKAGE in path.parents else path.relative_to(ROOT)).with_suffix(""))


NAMES = {name_of(path): path for path in MODULES + PROGRAMS + INTEGRATIONS}


def part_of(name: str) -> str:
    """The wing of a module; "commands" for a file directly in vla_rl, which is a command that a person runs."""
    wing, slash, _ = name.rpartition("/")
    return wing if slash else name if name in FLOOR_OF else "commands"


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports anywhere in it, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import; write vla_rl.NAME"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Modules of this project that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.removeprefix("vla_rl.").split(".")
        found |= {"/".join(parts[:n]) for n in (1, 2)} & NAMES.keys()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down_or_stay_in_the_wing(name):
    own, above = part_of(name), []
    for other in own_imports(NAMES[name]) - {name}:
        if FLOOR_OF[part_of(other)] >= FLOOR_OF[own] and part_of(other) != own:
            above.append(other)
    assert above == []


@pytest.mark.parametrize("part", sorted(FLOOR_OF))
def test_modules_of_one_part_do_not_import_in_a_circle(part):
    beside = {n: {o for o in own_imports(path) if part_of(o) == part} - {n} for n, path in NAMES.items()}
    beside = {name: needed for name, needed in beside.items() if part_of(name) == part}
    assert beside
    while free := {name for name, needed in beside.items() if not needed}:
        beside = {name: needed - free for name, needed in beside.items() if name not in free}
    assert beside == {}


def test_every_folder_of_the_package_is_a_wing_that_says_what_it_holds():
    wings = {path.parent.name: ast.get_docstring(ast.parse(path.read_text())) for path in PACKAGE.glob("*/__init__.py")}
    assert set(wings) == {part for part in FLOOR_OF if (PACKAGE / part).is_dir()} and all(wings.values())
    assert len(wings) == 8 and all(len(list((PACKAGE / wing).glob("*.py"))) <= 18 for wing in wings)


@pytest.mark.parametrize("name", [name for name in NAMES if part_of(name) == "commands"])
def test_a_file_directly_in_the_package_is_a_command(name):
    text = NAMES[name].read_text()
    assert name == "types" or ('if __name__ == "__main__":' in text and f"python -m vla_rl.{name}" in text)


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_heavy_package_has_one_home(package):
    users = {n for n, path in NAMES.items() if package in {name.split(".")[0] for name in imports(path)}}
    assert users <= HOMES[package]


def test_the_simulation_knows_no_torch():
    assert not [n for n, path in NAMES.items() if part_of(n) == "simulation" and "torch" in imports(path)]


def test_no_file_is_longer_than_500_lines():
    too_long = {name for name, path in NAMES.items() if len(path.read_text().splitlines()) > 500}
    assert too_long <= {"OpenVLA_PPO"}  # about 550


@pytest.mark.parametrize("path", MODULES + PROGRAMS + INTEGRATIONS, ids=lambda path: path.stem)
def test_a_module_opens_with_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and docstring.splitlines()[0].endswith((".", ":", '"'))


@pytest.mark.parametrize("path", MODULES + INTEGRATIONS, ids=lambda path: path.stem)
def test_a_module_has_a_test_file_of_its_name_in_the_same_wing(path):
    inside = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)
    test = ROOT / "tests" / inside.with_name(f"test_{path.name}")
    assert test.exists() and name_of(path) in own_imports(test)


def test_the_algorithm_needs_no_network_simulator_or_command_line():
    needed, fresh = set(), {"OpenVLA_PPO"}
    while fresh:
        needed |= fresh
        fresh = {name for module in fresh for name in own_imports(NAMES[module])} - needed
    assert "learning/losses" in needed
    assert {part_of(name) for name in needed - {"model/value_head"}} == {
        *("types", "run", "reports", "learning", "evaluation", "OpenVLA_PPO"),
    }


def test_settings_are_checked_before_torch_is_imported():
    code = "import sys, start_gae_ppo_training as start; start.settings_from(start.parse_args([])); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "transformers", "gymnasium", "wandb", "matplotlib"}
    assert "pydantic" in loaded.split() and not heavy & set(loaded.split())
