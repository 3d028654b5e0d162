"""start_gae_ppo_training.sh on machines that lack something: stand-ins for python, uv, apt-get, id and df; no network.

The stand-in python is a shell script: it "makes" a venv by copying itself there, logs each pip call, and fails at the
requirements file that FAIL_AT names.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = [
    "awk",
    "basename",
    "bash",
    "cat",
    "chmod",
    "cp",
    "df",
    "dirname",
    "env",
    "find",
    "flock",
    "mkdir",
    "mv",
    "readlink",
]
TOOLS += ["rm", "sha256sum", "sleep", "tail", "touch"]
REQUIREMENTS = ("requirements.lock", "requirements.txt", "requirements-libero.txt")
EGL_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"

PYTHON = """#!/usr/bin/env bash
[[ $1 == -I ]] && shift
case "$1 $2" in
"-V "*) echo "Python ${PYTHON_VERSION:-3.11.7}" ;;
"-c "*ensurepip*) [[ -z ${NO_ENSUREPIP:-} || -f $CALLS.apt ]] ;;
"-c "*ctypes*) [[ -f $CALLS.apt ]] || echo "${MISSING:-}" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$CALLS" ;;
"-m pip")
    if [[ $3 == --version ]]; then echo "pip 24.0 (python 3.11)"; exit; fi
    if [[ $3 == config ]]; then echo -e "${PIP_CONFIG:-}"; exit; fi
    requirements=$(basename "${!#}")
    options=("${@:7:$#-8}")
    echo "pip ${options[*]}${options:+ }$requirements" >>"$CALLS"
    [[ -z ${SLOW:-} ]] || sleep "$SLOW"
    if [[ ${FAIL_AT:-} == "$requirements" ]]; then echo "ERROR: No matching distribution found"; exit 7; fi ;;
"-m torch.distributed.run") echo "launched:$(printf ' <%s>' "$@")" ;;
*start_gae_ppo_training.py*) shift; echo "training in $PWD with:$(printf ' <%s>' "$@")${PYTHONPATH:-}" ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
# an environment that uv makes without --seed has no pip
UV_PYTHON = PYTHON.replace('"-m pip")', '"-m pip") echo "No module named pip" >&2; exit 1 ;;\n"-m never")')
UV = """#!/usr/bin/env bash
last=${!#}
echo "uv $*" >>"$CALLS"
case "$1 $2" in
"python install") [[ -z ${NO_NETWORK:-} ]] || { echo "error: no network" >&2; exit 2; } ;;
"python find") echo "$UV_PYTHON" ;;
"venv "*) mkdir -p "$last/bin" && cp "$UV_PYTHON" "$last/bin/python" ;;
"pip install")
    echo "${UV_DEFAULT_INDEX:-} ${UV_INDEX:-}" >"$CALLS.indexes"
    if [[ ${FAIL_AT:-} == "$(basename "$last")" ]]; then echo "error: No solution found"; exit 7; fi ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
APT = """#!/usr/bin/env bash
echo "apt-get $* $DEBIAN_FRONTEND" >>"$CALLS"
[[ $1 == install ]] && touch "$CALLS.apt"
exit 0
"""


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder with the script under test, and a PATH that holds nothing but what a test puts there."""

    def __init__(self, folder: Path):
        self.repo = folder / "a repo"  # the space must not matter
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.venv = self.repo / ".venv"
        self.stamp = self.venv / "setup.stamp"
        self.repo.mkdir()
        self.bin.mkdir()
        for name in ("start_gae_ppo_training.sh", *REQUIREMENTS):
            shutil.copy(ROOT / name, self.repo)
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        write_script(self.bin / "python3.11", PYTHON)
        write_script(self.bin / "apt-get", APT)
        self.become(uid=1000)
        self.have_free_disk(gigabytes=100)

    def have_uv(self) -> None:
        write_script(self.bin / "uv", UV)
        write_script(self.bin / "uv's python", UV_PYTHON)

    def become(self, uid: int) -> None:
        write_script(self.bin / "id", f"#!/usr/bin/env bash\necho {uid}\n")

    def have_free_disk(self, gigabytes: int) -> None:
        row = f"/dev/sda 1 1 {gigabytes * 1_000_000} 1% /"
        (self.bin / "df").unlink()
        write_script(self.bin / "df", f"#!/usr/bin/env bash\necho header; echo '{row}'\n")

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "CALLS": str(self.calls), "HOME": "/nowhere"} | {
            "UV_PYTHON": str(self.bin / "uv's python"),
            **variables,
        }

    def start(self, *arguments: str, script: Path | None = None, cwd: Path | None = None, **variables: str):
        command = [str(script or self.repo / "start_gae_ppo_training.sh"), *arguments]
        return subprocess.Popen(
            command,
            cwd=cwd or self.repo,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def logged(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


SETUP = ["venv", "pip --require-hashes requirements.lock"]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_first_run_sets_up_and_then_hands_all_flags_to_the_training(machine):
    result = machine.run("--config", "a b.yaml", "--task-id", "3")
    assert result.returncode == 0, result.stderr
    assert machine.logged() == SETUP
    assert result.stdout == f"training in {machine.repo} with: <--config> <a b.yaml> <--task-id> <3>\n"
    for word in ("step 1 of 2", "step 2 of 2", "LIBERO", "minute", "GB", "step 2 of 2: PyTorch", "done in"):
        assert word in result.stderr


def test_second_run_installs_nothing_and_says_nothing(machine):
    machine.run("--setup-only")
    machine.calls.unlink()
    log = machine.venv / "setup.log"
    log.write_text("what pip said")
    result = machine.run("--setup-only")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert machine.logged() == [] and log.read_text() == "what pip said"


def test_packages_of_a_sourced_ros_stay_out(machine):
    assert machine.run("--x", PYTHONPATH="/opt/ros").stdout.endswith("<--x>\n")


def test_setup_only_does_not_start_the_training(machine):
    assert machine.run("--setup-only").stdout == ""


def test_unlocked_takes_other_builds_of_what_requirements_txt_names(machine):
    result = machine.run("--unlocked", "--x")
    assert result.stdout.endswith("with: <--x>\n")
    assert machine.logged() == [
        "venv",
        "pip --no-deps --require-hashes requirements-libero.txt",
        "pip requirements.txt",
    ]
    machine.calls.unlink()
    assert machine.run("--x").returncode == 0 and machine.logged() == []  # it stays as it is
    with (machine.repo / "requirements.lock").open("a") as file:
        file.write("# newer\n")
    assert machine.run("--x").returncode == 0 and machine.logged()[-1] == "pip requirements.txt"


def test_unlocked_changes_what_was_installed_from_the_lock(machine):
    machine.run("--setup-only")
    machine.calls.unlink()
    assert machine.run("--unlocked", "--setup-only").returncode == 0
    assert machine.logged() == ["pip --no-deps --require-hashes requirements-libero.txt", "pip requirements.txt"]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_changed_requirements_are_installed_into_the_same_environment(machine, name):
    machine.run("--setup-only")
    machine.calls.unlink()
    with (machine.repo / name).open("a") as file:
        file.write("# newer\n")
    assert machine.run("--setup-only").returncode == 0
    assert machine.logged() == SETUP[1:]
    machine.calls.unlink()
    machine.run("--setup-only")
    assert machine.logged() == []


def test_another_python_version_in_the_environment_is_a_change(machine):
    machine.run("--setup-only")
    machine.calls.unlink()
    machine.run("--setup-only", PYTHON_VERSION="3.11.9")
    assert machine.logged() == SETUP[1:]


def test_works_from_another_directory_and_through_a_symlink(machine, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "train"
    link.symlink_to(machine.repo / "start_gae_ppo_training.sh")
    result = machine.run("--x", script=link, cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"training in {elsewhere} with: <--x>\n"  # the user's directory stays
    assert machine.stamp.exists() and not (elsewhere / ".venv").exists()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_failing_installation_names_its_step_and_leaves_no_stamp(machine, name):
    result = machine.run(*([] if name == "requirements.lock" else ["--unlocked"]), FAIL_AT=name)
    assert result.returncode == 7
    assert "training" not in result.stdout
    assert "FAILED (exit status 7) in: step 2 of 2: PyTorch" in result.stderr
    assert f"{machine.venv}/setup.log" in result.stderr
    assert "ERROR: No matching distribution found" in result.stderr  # the end of pip's own output
    assert not machine.stamp.exists()


def test_the_run_after_a_failed_one_starts_from_a_fresh_environment(machine):
    machine.run("--setup-only", FAIL_AT="requirements.lock")
    half_installed = machine.venv / "lib" / "half_installed.py"
    half_installed.parent.mkdir()
    half_installed.touch()
    machine.calls.unlink()
    result = machine.run("--setup-only")
    assert result.returncode == 0, result.stderr
    assert machine.logged() == SETUP
    assert not half_installed.exists() and machine.stamp.exists()


def test_a_killed_setup_is_repaired_even_if_it_was_an_update(machine):
    machine.run("--setup-only")
    with (machine.repo / "requirements.txt").open("a") as file:
        file.write("# newer\n")
    process = machine.start("--setup-only", SLOW="30")
    while len(machine.logged()) < 3:  # until pip runs again
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not machine.stamp.exists()
    machine.calls.unlink()
    assert machine.run("--setup-only").returncode == 0
    assert machine.logged() == SETUP
    assert not (machine.venv / "setup.tmp").exists()


def test_two_first_runs_at_once_install_once(machine):
    first = machine.start("--setup-only", SLOW="0.5")
    while not machine.logged():
        time.sleep(0.02)
    second = machine.run("--setup-only")
    assert first.communicate(timeout=60) and first.returncode == 0
    assert second.returncode == 0 and "another setup is running" in second.stderr
    assert machine.logged() == SETUP


def test_the_training_does_not_hold_the_setup_lock(machine):
    training = PYTHON.replace('echo "training', 'readlink /proc/$$/fd/9 || echo "training')
    write_script(machine.bin / "python3.11", training)
    assert machine.run().stdout.startswith("training")


@pytest.mark.parametrize("status", [65, 69, 71, 127, "always 1"])
def test_without_locks_the_setup_warns_in_one_line_and_goes_on(machine, status):
    (machine.bin / "flock").unlink()
    if status != 127:  # 127: there is no such command
        code = str(status).removeprefix("always ")
        write_script(machine.bin / "flock", f"#!/usr/bin/env bash\necho 'flock: 9: not here' >&2\nexit {code}\n")
    result = machine.run("--setup-only")
    assert result.returncode == 0, result.stderr
    assert machine.logged() == SETUP
    (line,) = [line for line in result.stderr.splitlines() if "flock" in line]
    assert line.startswith(f"setup: no lock on {machine.venv}") and "second setup" in line


def test_only_python_3_12_stops_with_the_reason_and_the_way_out(machine):
    (machine.bin / "python3.11").unlink()
    write_script(machine.bin / "python3", PYTHON)
    result = machine.run("--setup-only", PYTHON_VERSION="3.12.4")
    assert result.returncode == 1
    for words in (
        "Python 3.11 is needed",
        "MuJoCo 2.3.7",
        "python3: Python 3.12.4",
        "python3.11: not here",
        "uv python",
    ):
        assert words in result.stderr
    assert machine.logged() == []


def uv_setup(machine) -> list[str]:
    pip = f"uv pip install --python {machine.venv}/bin/python --index-strategy unsafe-best-match --no-progress"
    return [
        f"uv venv --allow-existing --seed --index-strategy unsafe-best-match --python {machine.bin}/uv's python {machine.venv}",
        f"{pip} --require-hashes -r {machine.repo}/requirements.lock",
    ]


PROVIDE = ["uv python install 3.11", "uv python find --system 3.11"]


@pytest.mark.parametrize("other", [None, "3.12.4"])
def test_where_3_11_is_absent_uv_provides_it_and_installs(machine, other):
    (machine.bin / "python3.11").unlink()
    if other:
        write_script(machine.bin / "python3", PYTHON.replace("3.11.7", other))
    machine.have_uv()
    result = machine.run("--x")
    assert result.returncode == 0, result.stderr
    assert machine.logged() == PROVIDE + uv_setup(machine)
    assert result.stdout.endswith("<--x>\n") and machine.stamp.exists() and "from uv" in result.stderr
    machine.calls.unlink()
    again = machine.run("--setup-only")
    assert (again.returncode, again.stderr, machine.logged()) == (0, "", [])


def test_an_update_goes_into_the_environment_that_uv_made(machine):
    (machine.bin / "python3.11").unlink()
    machine.have_uv()
    machine.run("--setup-only")
    with (machine.repo / "requirements.txt").open("a") as file:
        file.write("# newer\n")
    for provide in (PROVIDE, []):
        machine.calls.unlink()
        assert machine.run("--setup-only").returncode == 0
        assert machine.logged() == provide + uv_setup(machine)[1:]
        write_script(machine.bin / "python3.11", PYTHON)  # comes later, and changes nothing
        machine.stamp.write_text("old")


def test_without_uv_an_environment_that_uv_made_is_made_anew(machine):
    machine.have_uv()
    (machine.bin / "python3.11").rename(machine.bin / "elsewhere")
    machine.run("--setup-only")
    (machine.bin / "elsewhere").rename(machine.bin / "python3.11")
    (machine.bin / "uv").unlink()
    machine.stamp.unlink()
    machine.calls.unlink()
    assert machine.run("--setup-only").returncode == 0
    assert machine.logged() == SETUP


@pytest.mark.parametrize("variables", [{}, {"NO_ENSUREPIP": "1"}], ids=["", "without ensurepip"])
def test_a_python_3_11_of_the_system_is_used_by_uv_where_it_is_there(machine, variables):
    machine.have_uv()
    result = machine.run("--setup-only", **variables)
    assert result.returncode == 0, result.stderr
    first, *rest = uv_setup(machine)
    assert machine.logged() == [first.replace("uv's python", "python3.11"), *rest]


def test_uv_goes_on_in_the_environment_that_pip_made(machine):
    machine.run("--setup-only")
    machine.have_uv()
    machine.stamp.unlink()
    machine.calls.unlink()
    assert machine.run("--setup-only").returncode == 0
    assert machine.logged() == uv_setup(machine)[1:]


def test_uv_that_cannot_provide_3_11_leaves_the_other_ways(machine):
    (machine.bin / "python3.11").unlink()
    machine.have_uv()
    result = machine.run("--setup-only", NO_NETWORK="1")
    assert result.returncode == 1 and "uv: cannot provide it (error: no network)" in result.stderr
    assert "conda create" in result.stderr and machine.logged() == PROVIDE[:1]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_failing_installation_by_uv_is_told_and_repaired_as_pips_is(machine, name):
    (machine.bin / "python3.11").unlink()
    machine.have_uv()
    result = machine.run(*([] if name == "requirements.lock" else ["--unlocked"]), FAIL_AT=name)
    assert result.returncode == 7 and "training" not in result.stdout
    assert "FAILED (exit status 7) in: step" in result.stderr and "error: No solution found" in result.stderr
    assert not machine.stamp.exists()
    machine.calls.unlink()
    assert machine.run("--setup-only").returncode == 0
    assert machine.logged() == PROVIDE + uv_setup(machine) and not (machine.venv / "setup.tmp").exists()


def test_uv_takes_the_indexes_of_pip_unless_it_has_its_own(machine):
    (machine.bin / "python3.11").unlink()
    machine.have_uv()
    pips = {"PIP_INDEX_URL": "https://a", "PIP_EXTRA_INDEX_URL": "https://b https://c"}
    indexes = machine.calls.with_suffix(".indexes")
    machine.run("--setup-only", **pips)
    assert indexes.read_text() == "https://a https://b https://c\n"
    machine.stamp.unlink()
    machine.run("--setup-only", **pips, UV_DEFAULT_INDEX="https://d", UV_INDEX="https://e")
    assert indexes.read_text() == "https://d https://e\n"


def test_uv_takes_the_indexes_of_pips_files_too(machine):
    machine.have_uv()
    config = "global.cert='/c'\\nglobal.extra-index-url='https://b https://c'\\nglobal.index-url='https://a/simple?x=1'"
    machine.run("--setup-only", PIP_CONFIG=config)
    indexes = machine.calls.with_suffix(".indexes")
    assert indexes.read_text() == "https://a/simple?x=1 https://b https://c\n"
    machine.stamp.unlink()
    machine.run("--setup-only", PIP_CONFIG=config, PIP_INDEX_URL="https://d")
    assert indexes.read_text() == "https://d https://b https://c\n"


def test_python3_is_taken_when_it_is_3_11(machine):
    (machine.bin / "python3.11").rename(machine.bin / "python3")
    assert machine.run("--setup-only").returncode == 0


def test_a_broken_python3_11_shim_is_passed_over(machine):
    (machine.bin / "python3.11").rename(machine.bin / "python3")
    write_script(machine.bin / "python3.11", "#!/usr/bin/env bash\necho 'pyenv: not found' >&2\nexit 127\n")
    assert machine.run("--setup-only").returncode == 0


def test_missing_libraries_without_root_print_the_command_before_anything_is_installed(machine):
    result = machine.run("--setup-only", MISSING="libEGL.so.1")
    assert result.returncode == 1
    assert "missing: libEGL.so.1" in result.stderr
    assert f"  sudo apt-get install -y {EGL_PACKAGES}\n" in result.stderr
    assert machine.logged() == []


def test_missing_libraries_are_also_noticed_after_the_setup(machine):
    machine.run("--setup-only")
    result = machine.run(MISSING="libEGL.so.1")
    assert result.returncode == 1 and "training" not in result.stdout
    assert f"sudo apt-get install -y {EGL_PACKAGES}" in result.stderr


def test_osmesa_asks_for_osmesa(machine):
    result = machine.run("--setup-only", MISSING="libOSMesa.so.8", MUJOCO_GL="osmesa")
    assert "sudo apt-get install -y libosmesa6 libgl1 libglib2.0-0" in result.stderr


def test_root_installs_missing_libraries_without_questions(machine):
    machine.become(uid=0)
    result = machine.run("--setup-only", MISSING="libEGL.so.1")
    assert result.returncode == 0, result.stderr
    installs = [line for line in machine.logged() if line.startswith("apt-get install")]
    assert installs == [f"apt-get install -y --no-install-recommends {EGL_PACKAGES} noninteractive"]


def test_a_failing_apt_get_names_its_step(machine):
    machine.become(uid=0)
    write_script(machine.bin / "apt-get", "#!/usr/bin/env bash\necho 'E: Unable to locate package'\nexit 100\n")
    result = machine.run("--setup-only", MISSING="libEGL.so.1")
    assert result.returncode == 100
    assert "FAILED (exit status 100) in: apt-get install libegl1" in result.stderr
    assert "E: Unable to locate package" in result.stderr


def test_libraries_that_stay_missing_stop_the_setup(machine):
    machine.become(uid=0)
    write_script(machine.bin / "apt-get", "#!/usr/bin/env bash\nexit 0\n")
    result = machine.run("--setup-only", MISSING="libEGL.so.1")
    assert result.returncode == 1 and "still missing after the installation: libEGL.so.1" in result.stderr


def test_without_apt_get_the_libraries_are_named(machine):
    (machine.bin / "apt-get").unlink()
    result = machine.run("--setup-only", MISSING="libEGL.so.1")
    assert result.returncode == 1 and "missing: libEGL.so.1" in result.stderr
    assert EGL_PACKAGES in result.stderr and "apt-get" not in result.stderr


def test_a_python_without_ensurepip_without_root_prints_the_command(machine):
    result = machine.run("--setup-only", NO_ENSUREPIP="1")
    assert result.returncode == 1
    assert "  sudo apt-get install -y python3.11-venv\n" in result.stderr
    assert not machine.stamp.exists()


def test_a_python_without_ensurepip_is_completed_as_root(machine):
    machine.become(uid=0)
    assert machine.run("--setup-only", NO_ENSUREPIP="1").returncode == 0
    assert any("python3.11-venv" in line for line in machine.logged())


def test_a_full_disk_stops_before_anything_is_installed(machine):
    machine.have_free_disk(gigabytes=3)
    result = machine.run("--setup-only")
    assert result.returncode == 1 and "3 GB are free" in result.stderr
    assert machine.logged() == []


def test_a_full_disk_does_not_matter_for_an_update(machine):
    machine.run("--setup-only")
    machine.have_free_disk(gigabytes=0)
    with (machine.repo / "requirements.txt").open("a") as file:
        file.write("# newer\n")
    assert machine.run("--setup-only").returncode == 0


def libraries_missing(*changes: tuple[str, str], **variables: str) -> str:
    """What the script's own check, run by a real python, prints on this machine."""
    text = (ROOT / "start_gae_ppo_training.sh").read_text()
    check = text.split("missing_libraries() {", 1)[1].split("-c '\n", 1)[1].split("\n'\n", 1)[0]
    for change in changes:
        assert change[0] in check
        check = check.replace(*change)
    command = [sys.executable, "-I", "-c", check]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()


def test_the_libraries_of_this_machine_are_found():
    assert libraries_missing() == ""  # tests/run.sh would not have come here without them


def test_a_library_that_cannot_be_loaded_is_named():
    assert libraries_missing(("libGL.so.1", "libNo.so.1")) == "libNo.so.1"
    assert libraries_missing(("libOSMesa.so.8", "libNo.so.1"), MUJOCO_GL="osmesa") == "libNo.so.1"


def test_a_missing_egl_driver_is_named():
    changes = ("/usr/lib*/dri", "/nowhere"), ("libEGL_nvidia.so.0", "libNo.so.0")
    assert libraries_missing(*changes, LIBGL_DRIVERS_PATH="/nowhere") == "an EGL driver"


@pytest.mark.parametrize("failing", ["setup", "shellcheck", "ruff check", "ruff format --check", "pytest"])
def test_the_test_script_stops_at_the_first_failing_step_and_names_it(tmp_path, failing):
    repo = tmp_path / "a repo"
    for folder in ("tests", ".ci", ".venv/bin"):
        (repo / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", repo / "tests")
    shutil.copy(ROOT / ".ci" / "run", repo / ".ci")
    steps = {
        "setup": "start_gae_ppo_training.sh",
        "shellcheck": ".venv/bin/shellcheck",
        "ruff check": ".venv/bin/ruff",
        "ruff format --check": ".venv/bin/ruff",
        "pytest": ".venv/bin/python",
    }
    for path in steps.values():
        condition = {"ruff check": "$1 == check", "ruff format --check": "$1 == format"}.get(failing, "x == x")
        fails = f"if [[ {condition} ]]; then exit 5; fi" if path == steps[failing] else ""
        write_script(repo / path, f'#!/usr/bin/env bash\necho "{path} $*"\n{fails}\n')
    result = subprocess.run([repo / ".ci" / "run"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 5
    assert f"FAILED in: {failing} (exit status 5)" in result.stderr
    names = [line.removeprefix("== ") for line in result.stderr.splitlines() if line.startswith("== ")]
    assert names == list(steps)[: list(steps).index(failing) + 1]


def test_the_test_script_hands_its_flags_to_pytest(tmp_path):
    for folder in ("tests", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    for path in ("start_gae_ppo_training.sh", ".venv/bin/shellcheck", ".venv/bin/ruff", ".venv/bin/python"):
        write_script(tmp_path / path, '#!/usr/bin/env bash\nprintf "<%s>" "$@"; echo\n')
    result = subprocess.run(
        [tmp_path / "tests" / "run.sh", "-m", "not libero"], cwd="/", capture_output=True, text=True, check=True
    )
    assert "<format><--check>" in result.stdout.splitlines()
    last = result.stdout.splitlines()[-1]
    assert last.startswith("<-m><pytest><--numprocesses><2>") and last.endswith("<-m><not libero>")


def test_requirements_are_pinned_and_name_no_registry():
    for name in ("requirements.txt", "requirements-libero.txt", "requirements-4bit.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins and all("==" in line for line in pins)
        assert not any("://" in line or line.startswith("-") for line in lines)
        if name == "requirements-libero.txt":
            assert len(pins) == 6 and all("--hash=sha256:" in line for line in pins)
        else:
            assert all(" # " in line for line in pins)  # each with its reason


def test_the_lock_has_what_the_requirements_name_and_a_hash_of_each():
    """It is made anew after a change of theirs; each package of it has hashes, LIBERO's those that are pinned."""
    text = (ROOT / "requirements.lock").read_text()
    entries = [
        entry.replace("\\\n", " ").split("#")[0].split() for entry in re.split(r"\n(?=\S)", text) if "==" in entry
    ]
    locked = {entry[0].lower(): entry[1:] for entry in entries}
    assert len(locked) > 130 and all(any(w.startswith("--hash=sha256:") for w in words) for words in locked.values())
    assert not any("://" in line or line.startswith("-") for line in text.splitlines())
    for name in REQUIREMENTS[1:]:
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                pin, *hashes = line.split(" # ")[0].split()
                assert set(hashes) <= set(locked[re.sub(r"\[.*\]", "", pin).lower().replace("_", "-")]), line


def test_a_number_of_gpus_starts_as_many_processes(machine):
    machine.run("--setup-only")
    for flags in (("--gpus", "3", "--x"), ("--x", "--gpus=3")):
        said = machine.run(*flags).stdout
        assert "<-m> <torch.distributed.run> <--standalone> <--nproc-per-node> <3>" in said and said.endswith(
            "<--x>\n"
        ), said


@pytest.mark.parametrize("flags", [("--gpus",), ("--gpus", "all"), ("--gpus=0",), ("--gpus=",)])
def test_a_number_of_gpus_that_is_none(machine, flags):
    result = machine.run(*flags)
    assert result.returncode == 2 and "--gpus takes the number of GPUs" in result.stderr and machine.logged() == []
