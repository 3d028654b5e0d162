"""The architecture: imports point down, heavy packages have one home, every module is explained and tested."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vla_rl"

LAYERS = [
    {"settings", "types"},
    {"load_settings"},
    {
        "advantages",
        "losses",
        "action_tokenizer",
        "image_transform",
        "value_head",
        "prismatic",
        "metrics",
        "episodes",
        "rollout_buffer",
        "progress",
        "checkpoint",
        "failures",
        "augmentation",
        "optimizer",
        "demonstration_file",
    },
    {
        "policy",
        "tiny_openvla",
        "model_cache",
        "arm_control",
        "rendering",
        "simulator",
        "goals",
        "expert",
        "libero_env",
        "vector_env",
        "shaping",
    },
    {"evaluation", "demonstrations", "sft"},
    {"OpenVLA_PPO"},
    {"start_gae_ppo_training"},
]
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}

# package -> the only modules that may import it
HOMES = {
    "transformers": {"prismatic", "policy"},
    "timm": {"prismatic", "policy"},
    "peft": {"prismatic", "policy"},
    "libero": {"libero_env", "simulator", "tiny_openvla"},  # tiny_openvla: task names
    "robosuite": {"simulator", "arm_control", "rendering"},
    "mujoco": {"simulator", "arm_control", "rendering", "model_cache"},
    "wandb": {"metrics"},
    "h5py": {"demonstration_file"},
    "cv2": {"augmentation"},
    "matplotlib": {"metrics"},
    "tensorflow": set(),
}

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__init__"]
PROGRAMS = [path for path in (ROOT / "OpenVLA_PPO.py", ROOT / "start_gae_ppo_training.py") if path.exists()]


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
    parts = [name.split(".") for name in imports(path)]
    return {next(part for part in p if part in LAYER_OF) for p in parts if p[0] == "vla_rl" or p[0] in LAYER_OF}


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=lambda path: path.stem)
def test_imports_point_down(path):
    assert path.stem in LAYER_OF, f"{path.stem} has no layer; give it one in tests/test_layers.py"
    upward = {name for name in own_imports(path) if LAYER_OF[name] > LAYER_OF[path.stem]}
    assert upward == set()


def test_modules_of_one_layer_do_not_import_in_a_circle():
    beside = {p.stem: {n for n in own_imports(p) if LAYER_OF[n] == LAYER_OF[p.stem]} - {p.stem} for p in MODULES}
    while free := {name for name, needed in beside.items() if not needed}:
        beside = {name: needed - free for name, needed in beside.items() if name not in free}
    assert beside == {}


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_heavy_package_has_one_home(package):
    users = {path.stem for path in MODULES + PROGRAMS if package in {name.split(".")[0] for name in imports(path)}}
    assert users <= HOMES[package]


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=lambda path: path.stem)
def test_a_module_opens_with_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and docstring.splitlines()[0].endswith((".", ":", '"'))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_has_a_test_file_of_its_name(path):
    test = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    assert test.exists() and path.stem in own_imports(test)


def test_the_algorithm_needs_no_network_simulator_or_command_line():
    needed, fresh = set(), {"OpenVLA_PPO"}
    files = {path.stem: path for path in MODULES + PROGRAMS}
    while fresh:
        needed |= fresh
        fresh = {name for module in fresh for name in own_imports(files[module])} - needed
    assert "losses" in needed
    assert not needed & {"policy", "prismatic", "tiny_openvla", "libero_env", "vector_env", "simulator"}


def test_settings_are_checked_before_torch_is_imported():
    code = "import sys, start_gae_ppo_training as start; start.load_config(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "transformers", "gymnasium", "wandb", "matplotlib"}
    assert "pydantic" in loaded.split() and not heavy & set(loaded.split())
