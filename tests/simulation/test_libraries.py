"""What LIBERO's libraries find when they are imported: no shared file, a place for compiled functions, honest errors."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vla_rl.run.failures import explain
from vla_rl.simulation import libero_env, libraries
from vla_rl.simulation.libraries import give_numba_a_cache, naming_missing_modules, private_folder

BUILD = "from vla_rl.simulation.libero_env import build_simulator as b; "
BUILD += "b('libero_spatial', 0, (), 16, fast=True, cache_gb=3); "


def run(code, **changes):
    environment = {name: value for name, value in os.environ.items() if name not in changes} | changes
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.libero
def test_no_file_that_users_share_is_opened():
    """robosuite.log belongs to whoever came first: another user's cannot be opened."""
    code = (
        "import sys; opened = []; sys.addaudithook(lambda event, args: event == 'open' and opened.append(str(args[0])));"
        f"{BUILD}import logging, robosuite; print([name for name in opened if 'robosuite.log' in name],"
        "[type(h).__name__ for h in logging.getLogger('robosuite_logs').handlers], robosuite.macros.FILE_LOGGING_LEVEL)"
    )
    done = run(code)
    assert done.stdout.strip() == "[] ['StreamHandler'] None", done.stderr


@pytest.mark.libero
def test_without_a_home_and_a_place_beside_the_sources_it_simply_works(tmp_path):
    """numba may not use __pycache__ here; the second process finds what the first has compiled."""
    code = (
        "from vla_rl.simulation import libraries; writable = libraries.is_writable;"
        "libraries.is_writable = lambda folder: folder.name != '__pycache__' and writable(folder);"
        f"{BUILD}import os; print(os.environ['NUMBA_CACHE_DIR'], os.environ['MPLCONFIGDIR'])"
    )
    changes = {
        "HOME": "/dev/null/none",
        "XDG_CACHE_HOME": "",
        "XDG_CONFIG_HOME": "",
        "NUMBA_CACHE_DIR": "",
        "MPLCONFIGDIR": "",
        "TMPDIR": str(tmp_path),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator,UserWideCacheLocator",
    }
    places = [str(tmp_path / f"vla_rl_{name}_{os.getuid()}") for name in ("numba", "matplotlib")]
    compiled = []
    for _ in range(2):
        done = run(code, **changes)
        assert done.stdout.split() == places, done.stderr
        assert "Matplotlib" not in done.stderr
        compiled.append(sorted(path.name for path in Path(places[0]).rglob("*.nbc")))
    assert compiled[0] == compiled[1] != []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(place).name for place in places)


def test_numba_keeps_the_users_own_folder_and_its_own_where_they_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "mine")
    give_numba_a_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == "mine"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for unwritable in ("", "__pycache__"):
        monkeypatch.setattr(libraries, "is_writable", lambda folder, name=unwritable: folder.name != name)
        give_numba_a_cache()
        assert "NUMBA_CACHE_DIR" not in os.environ


def test_a_private_folder_is_ours_alone(monkeypatch, tmp_path):
    """What numba reads from it is executed: somebody else's folder of that name, or a link, is not used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_folder("x")
    assert folder == tmp_path / f"vla_rl_x_{os.getuid()}" == private_folder("x")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    other = private_folder("x")
    assert other != folder and stat.S_IMODE(other.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert private_folder("x") not in (folder, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/none")
    assert private_folder("x") is None


@pytest.mark.libero
def test_without_any_place_to_write_functions_are_compiled_and_not_kept():
    code = (
        "from vla_rl.simulation import libraries; libraries.is_writable = lambda folder: False;"
        "libraries.private_folder = lambda name: None;"
        f"{BUILD}import robosuite.macros as macros; print(macros.CACHE_NUMBA)"
    )
    done = run(code, NUMBA_CACHE_DIR="")
    assert done.stdout.strip() == "False", done.stderr
    assert "nowhere to keep compiled functions" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bddl", "bddl is not installed; run: pip install -r requirements.txt"),
        (
            "numpy.nothing",
            "the module numpy.nothing is missing: the installed package numpy is not whole; run: pip install --f",
        ),
        ("no_such.thing", "no_such.thing is not installed; run: pip install -r requirements.txt"),
    ],
)
def test_a_missing_module_is_named_with_its_package_and_the_way_out(name, message):
    with pytest.raises(ModuleNotFoundError) as error, naming_missing_modules():
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    assert str(error.value).startswith(message) and error.value.name == name
    assert explain(error.value) == str(error.value)


@pytest.mark.libero
@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "libero.libero.envs.bddl_utils",
            "the module libero.libero.envs.bddl_utils is missing: the installed package libero",
        ),
        ("bddl", "bddl is not installed; run: pip install"),
    ],
)
def test_an_incomplete_installation_is_no_rendering_error(block, message):
    code = (
        "import sys\nclass Hole:\n  def find_spec(self, name, path, target=None):\n"
        f"    if name == {block!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
        f"sys.meta_path.insert(0, Hole())\n{BUILD}"
    )
    done = run(code)
    assert done.stderr.splitlines()[-1].startswith(f"ModuleNotFoundError: {message}"), done.stderr
    assert "cannot render" not in done.stderr


@pytest.mark.parametrize("kind", [PermissionError, RuntimeError, ImportError, AttributeError, OSError])
def test_other_errors_of_an_import_keep_their_words(monkeypatch, kind):
    def fail():
        raise kind("in its own words, and not OpenGL's")

    monkeypatch.setattr(libraries, "prepare_simulator", fail)
    with pytest.raises(kind, match=r"^in its own words, and not OpenGL's$"):
        libero_env.build_simulator("libero_spatial", 0, ["agentview"], 64, fast=False)
