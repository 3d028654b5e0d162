"""Files, overrides and flags become settings; whatever is wrong with them is told in one line, with the way out."""

import errno
import os
from pathlib import Path

import pytest
import yaml

from tests.run.test_settings import flat
from vla_rl.run.load_settings import list_settings, load_config, save_config, settings_help
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=list(overrides))
    return str(caught.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_overrides_and_flags_beat_the_file_and_the_rest_keeps_its_default(tmp_path):
    path = write(tmp_path, "rollout:\n  num_envs: 2\n  n_steps: 32\n  temperature: 1.5\n")
    config = load_config(path, ["rollout.n_steps=33"], {"rollout.temperature": 1.7})
    rollout = config.rollout
    assert (rollout.num_envs, rollout.n_steps, rollout.temperature, rollout.group_size) == (2, 33, 1.7, 8)


def test_a_flag_that_was_not_given_changes_nothing():
    assert load_config(flags={"run.timesteps": None, "logging.wandb": False}).run.timesteps == 100_000


def test_no_file_gives_the_defaults():
    assert load_config() == Config()


@pytest.mark.parametrize(
    ("overrides", "flags", "words"),
    [
        (["run.seed=1", "run.seed=2"], {}, "run.seed is given twice: run.seed=1, and 'run.seed=2'; give it once"),
        (["run.seed=1"], {"run.seed": 2}, "run.seed is given twice: run.seed=1, and 2 of a flag"),
        (["env.task_ids=0-2"], {"env.task_ids": [0, 1]}, "env.task_ids is given twice: env.task_ids='0-2', and [0, 1]"),
        (
            ["policy.lora={rank: 2}", "policy.lora.alpha=3"],
            {},
            "policy.lora.alpha is given twice: policy.lora={'rank': 2}",
        ),
        (["policy.lora.alpha=3", "policy.lora={rank: 2}"], {}, "policy.lora is given twice: policy.lora.alpha=3"),
    ],
)
def test_a_setting_that_is_given_twice_with_different_values_is_refused(overrides, flags, words):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides, flags=flags)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_setting_may_be_given_twice_with_the_same_value(tmp_path):
    overrides = ["run.seed=1", "run.seed=1", "env.task_ids=0-2", f"policy.checkpoint={tmp_path}"]
    config = load_config(
        overrides=overrides,
        flags={"run.seed": 1, "env.task_ids": [0, 1, 2], "policy.checkpoint": str(tmp_path), "rollout.num_envs": None},
    )
    assert (config.run.seed, config.env.task_ids) == (1, [0, 1, 2])


def test_overrides_reach_nested_sections_and_sections_the_file_leaves_empty(tmp_path):
    path = write(tmp_path, "policy:\nrollout:\n  # n_steps: 3\n")
    config = load_config(path, ["policy.lora.rank=4"])
    assert config.policy.lora.rank == 4 and config.policy.lora.alpha == 16.0
    assert config.rollout == Config().rollout


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n")) == Config()


def test_scientific_notation_that_pyyaml_reads_as_a_string_becomes_a_float(tmp_path):
    path = write(tmp_path, "actor:\n  learning_rate: 1e-5\n")
    assert yaml.safe_load(path.read_text())["actor"]["learning_rate"] == "1e-5"  # why this test exists
    learning_rate = load_config(path, ["critic.learning_rate=3e-4"]).actor.learning_rate
    assert type(learning_rate) is float and learning_rate == 0.00001


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.gama=1", "algorithm.gama: unknown setting; did you mean algorithm.gamma?"),
        ("algorthm.gamma=1", "algorthm: unknown setting; did you mean algorithm?"),
        ("policy.lora.rnak=8", "policy.lora.rnak: unknown setting; did you mean policy.lora.rank?"),
        ("policy.loar.rank=8", "policy.loar: unknown setting; did you mean policy.lora?"),
        ("rollout.gamma=1", "rollout.gamma: unknown setting; did you mean algorithm.gamma?"),
        ("actor.lr=1", "actor.lr: unknown setting; actor has learning_rate, weight_decay, beta1, beta2, eps, max_g"),
        ("something.else=1", "something: unknown setting; there are run, policy, value_head, env, rollout, algorithm"),
    ],
)
def test_an_unknown_setting_is_refused_with_what_was_meant(override, words):
    assert words in error_of(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.num_envs=many", "rollout.num_envs: input should be a valid integer"),
        ("rollout.num_envs=2.5", "got 2.5"),
        ("rollout.num_envs=true", "rollout.num_envs: expected another value than true"),
        ("actor.learning_rate=yes", "actor.learning_rate: expected another value than true"),
        ("run.name=on", "quote the word"),
        ("rollout.num_envs=null", "rollout.num_envs: input should be a valid integer, got None"),
        ("logging.wandb=perhaps", "logging.wandb: input should be a valid boolean"),
        ("policy.lora=3", "policy.lora: input should be a valid dictionary"),
        ("policy.lora.rank.more=3", "policy.lora.rank: input should be a valid integer"),
        ("eval.modes=greedy", "eval.modes: input should be a valid list, got 'greedy'"),
        ("env.task_ids=three", "env.task_ids: 'three' is not a list of indices; write it like 0-39,45"),
        ("eval.states=9-3", "eval.states: '9-3' is not a list of indices"),
    ],
)
def test_a_wrong_type_is_refused_with_what_came(override, words):
    assert words in error_of(override)


def test_many_wrong_items_and_the_branches_of_a_union_make_one_line():
    lines = error_of("env.initial_states=0-60").splitlines()
    assert lines == [
        "settings of the command line:",
        "  env.initial_states: input should be less than 50, got 50 (and 10 more)",
    ]


def test_the_branches_of_a_union_are_joined_where_none_fits():
    line = error_of("env.initial_states=5.5").splitlines()[1]
    assert line == "  env.initial_states: input should be 'random' or a valid list, got 5.5"


def test_two_wrong_settings_are_told_at_once():
    message = error_of("rollout.num_envs=0", "algorithm.gama=1")
    assert len(message.splitlines()) == 3 and "rollout.num_envs" in message and "algorithm.gama" in message


def test_a_long_value_is_cut():
    assert len(error_of("rollout.num_envs=" + "x" * 5000)) < 250


@pytest.mark.parametrize("override", ["actor.learning_rate", "rollout=3", "=3", "seed=1"])
def test_an_override_that_is_not_a_setting_is_refused_with_an_example(override):
    assert "write it like actor.learning_rate=1e-4" in error_of(override)


def test_an_override_whose_value_is_not_yaml_is_refused():
    assert "the value is not YAML" in error_of("env.task_ids=[1, 2")


@pytest.mark.parametrize(
    "text",
    [
        "2024-12-01",
        "2024-13-01",
        "2024-12-01T10:00:00Z",
        "12:30:45",
        "007",
        "1_000",
        "1.50",
        "0x1F",
        "0x_",
        "=",
        "9" * 200,
    ],
)
def test_a_text_stays_as_it_is_written_though_yaml_knows_a_number_or_date_of_that_look(tmp_path, text):
    assert load_config(overrides=[f"run.name={text}"]).run.name == text
    assert load_config(write(tmp_path, f"run:\n  name: {text}\n")).run.name == text


def test_numbers_stay_numbers():
    config = load_config(overrides=["run.seed=0x1F", "env.max_steps=1_0", "actor.learning_rate=2.5e-4"])
    assert (config.run.seed, config.env.max_steps, config.actor.learning_rate) == (31, 10, 0.00025)


DEEP = "[" * 5000
LISTS = (
    "&a [1,1,1,1,1,1,1,1,1]",
    *(f"&{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)),
)
BOMB = f"[{','.join(LISTS)}]"
# merges double at each level, which PyYAML does while it reads
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("2024-13-01", "input should be a valid integer, unable to parse string as an integer, got '2024-13-01'"),
        ("2024-12-01", "got '2024-12-01'"),
        ("12:30:45", "got '12:30:45'"),
        ("9" * 5000, "exceeded maximum size"),
        ("-" + "9" * 5000, "exceeded maximum size"),
        ("0x" + "f" * 5000, "input should be a valid integer"),
        ("0x_", "invalid literal"),
        (DEEP, "it is nested too deeply"),
        (BOMB, "it has more than 10,000 values, its aliases written out"),
        ("&a [*a]", "it has more than 10,000 values, its aliases written out"),
        ("&a {b: *a}", "it has more than 10,000 values, its aliases written out"),
        ("[" + "1," * 10_000 + "]", "it has more than 10,000 values, its aliases written out"),
        ("*a", "found undefined alias 'a' in line 1, column 1"),
        ("!!int x", "a ! begins a YAML tag; quote the text"),
        ("!!python/object:os.system x", "a ! begins a YAML tag"),
        ("{1: 2}", "'1' is not the name of a section or setting"),
        ("\tx", "cannot start any token"),
        ("a\0b", "unacceptable character #x0000"),
        ("\udcff", "unacceptable character #xdcff"),
        ("", "has no value; write run.seed=null for none"),
        ("#1", "has no value"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_in_a_line(value, words):
    error = error_of(f"run.seed={value}")
    assert words in error and len(error) < 400
    assert len(error.splitlines()) == (2 if error.startswith("settings of") else 1)


@pytest.mark.parametrize("override", ["run..name=1", ".name=1", "run.=1", "run.na me=1", "run.\0=1"])
def test_what_is_no_name_of_a_setting_is_refused_with_an_example(override):
    assert "write it like actor.learning_rate=1e-4" in error_of(override)


def test_an_override_below_a_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rollout is a value, not a section"):
        load_config(write(tmp_path, "rollout: 3\n"), ["rollout.num_envs=1"])


def test_a_missing_file_is_refused_with_the_files_that_there_are(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no settings file .*tpyo\.yaml; there are .*settings\.yaml"):
        load_config(tmp_path / "tpyo.yaml")
    with pytest.raises(ConfigError, match="no settings file"):
        load_config(tmp_path / "nowhere" / "settings.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rollout: [1, 2\n", "cannot be read as YAML"),
        ("rollout:\n  a: 1\n b: 2\n", "cannot be read as YAML"),
        ("- rollout\n", "expected sections such as 'rollout:', got list"),
        ("just words\n", "got str"),
        ("run:\n  seed: 1\nrun:\n  name: b\n", "run is there twice"),
        ("run:\n  seed: 1\n  seed: 2\n", "seed is there twice"),
        ("1: 2\n", "'1' is not the name of a section or setting in line 1, column 1"),
        ("null: 1\n", "'null' is not the name"),
        ("run:\n  true: 1\n", "'true' is not the name of a section or setting in line 2, column 3"),
        ("2024-01-01: 1\n", "'2024-01-01' is not the name"),
        ("? [a]\n: b\n", "'a sequence' is not the name"),
        ("? {a: 1}\n: b\n", "'a mapping' is not the name"),
        ("run: 3\n", "run: input should be a valid dictionary"),
        ("run: [seed]\n", "run: input should be a valid dictionary"),
        ("run: true\n", "run: expected another value than true"),
        ("run:\n\tseed: 1\n", "cannot start any token in line 2"),
        ("run:\n  name: a\0b\n", "unacceptable character #x0000"),
        (b"run:\n  name: \xff\n", "save it as UTF-8"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}\n", "another document in line 2"),
        ("run: {name: " + DEEP, "nested too deeply"),
        (f"run: {{seed: {BOMB}}}\n", "it has more than 10,000 values, its aliases written out"),
        ("run: &a {name: *a}\n", "it has more than 10,000 values, its aliases written out"),
        (MERGES, "it has more than 10,000 values, its aliases written out"),
        ("a: &a {<<: *a}\n", "it has more than 10,000 values, its aliases written out"),
        ("run: {seed: " + "9" * 5000 + "}\n", "exceeded maximum size"),
        ("run: !!omap [a: 1]\n", "a ! begins a YAML tag"),
        ("actor: {<<: 3}\n", "expected a mapping or list of mappings for merging"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    error = str(caught.value)
    assert words in error and "settings.yaml" in error and len(error) < 500
    assert len(error.splitlines()) == (2 if error.startswith("settings of") else 1)


def test_what_is_no_settings_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path, words in [
        ("/dev/zero", "is a device or pipe"),
        (tmp_path / "pipe.yaml", "is a device or pipe"),
        (tmp_path / "model.safetensors", "has more than 100,000 bytes"),
        (tmp_path / "loop.yaml", "no settings file"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("a\0b.yaml", "no settings file"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            load_config(path)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = write(tmp_path, "run: {seed: 1}\n")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ConfigError, match=r"settings\.yaml cannot be read: Permission denied; give a file"):
        load_config(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes("\ufeffrun:\r\n  name: ü\r\n".encode())
    assert load_config(path).run.name == "ü"


def test_anchors_are_read_and_an_override_reaches_one_section_only(tmp_path):
    path = write(tmp_path, "actor: &adam {learning_rate: 1e-3, beta1: 0.8}\ncritic: {<<: *adam, beta1: 0.7}\n")
    config = load_config(path, ["actor.learning_rate=0.5"])
    assert (config.actor.learning_rate, config.critic.learning_rate, config.critic.beta1) == (0.5, 0.001, 0.7)
    config = load_config(write(tmp_path, "actor: &a {beta1: 0.8}\ncritic: *a\n"), ["actor.beta1=0.6"])
    assert (config.actor.beta1, config.critic.beta1) == (0.6, 0.8)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"settings of .*settings\.yaml:\n  rollout\.num_evns: unknown"):
        load_config(write(tmp_path, "rollout:\n  num_evns: 2\n"))


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home folder and the current one, with a folder `base`, a file `d.hdf5`, and $PLACE for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "openvla").mkdir()
    (tmp_path / "tiny-openvla").mkdir()
    (tmp_path / "d.hdf5").write_text("")
    return tmp_path


@pytest.mark.parametrize("written", ["base", "./base", "~/base", "$HOME/base", "${PLACE}/base", "/base"])
@pytest.mark.parametrize("key", ["policy.checkpoint", "run.output_dir", "data.files"])
def test_a_path_is_expanded_and_kept_absolute(home, key, written):
    section, leaf = key.split(".")
    written, expected = (f"{home}/base" if written == "/base" else written), str(home / "base")
    needed = {"data": {"files": [written], "name": "n"}}
    kind, given = (SftConfig, [written]) if section == "data" else (Config, written)
    file = write(home, yaml.safe_dump(needed if section == "data" else {section: {leaf: given}}))
    more = ["data.name=n"] if section == "data" else []
    for config in (
        load_config(file, kind=kind),
        load_config(overrides=[f"{key}={given}", *more], kind=kind),
        load_config(overrides=more, flags={key: given}, kind=kind),
    ):
        value = getattr(getattr(config, section), leaf)
        assert value == ([expected] if section == "data" else expected)


def test_a_link_stays_one_but_before_two_dots(home):
    (home / "far" / "inner").mkdir(parents=True)
    (home / "link").symlink_to(home / "far" / "inner")
    assert load_config(overrides=["policy.checkpoint=link"]).policy.checkpoint == str(home / "link")
    assert load_config(overrides=["run.output_dir=link/../runs"]).run.output_dir == str(home / "far" / "runs")


def test_a_name_or_a_hub_id_is_no_path(home):
    for name in ("tiny-openvla", "tiny-openvla-random", "openvla/openvla-7b", "no/such/folder"):
        assert load_config(overrides=[f"policy.checkpoint={name}"]).policy.checkpoint == name
    (home / "openvla" / "mine").mkdir()
    assert load_config(overrides=["policy.checkpoint=openvla/mine"]).policy.checkpoint == str(home / "openvla/mine")


def test_home_alone_is_home_though_yaml_reads_null(home):
    assert load_config(overrides=["run.output_dir=~"]).run.output_dir == str(home)
    assert (
        load_config(write(home, "run: {output_dir: ~, name: ~}\n")).run
        == load_config(flags={"run.output_dir": str(home)}).run
    )


@pytest.mark.parametrize("key", ["policy.checkpoint", "run.output_dir"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NO_SUCH/x", "=$NO_SUCH/x: the variable NO_SUCH is not set; set it, or write the path out"),
        ("/a/${NO_SUCH}", "the variable NO_SUCH is not set"),
        ("~nobody_here/x", "there is no home folder ~nobody_here; write ./~nobody_here/x for a folder of that name"),
        ("''", "='' is no path"),
        ("$EMPTY", "is no path"),
        (r'"a\0b"', "is no path"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused_with_what_is_missing(home, monkeypatch, key, path, words):
    monkeypatch.setenv("EMPTY", "")
    error = error_of(f"{key}={path}")
    assert error.startswith(key) and words in error and len(error.splitlines()) == 1


def test_lists_in_lists_are_no_paths():
    deep = "[" * 300 + "]" * 300
    with pytest.raises(ConfigError):
        load_config(overrides=["data.name=n", f"data.files={deep}"], kind=SftConfig)
    assert "policy.checkpoint: input should be a valid string" in error_of("policy.checkpoint=[[a], b, 1]")


def test_saved_settings_load_as_the_same_settings(tmp_path):
    config = load_config(
        overrides=["env.initial_states=0-9", "eval.states=40-49", "actor.learning_rate=1e-5", "run.name=a b"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml").model_dump() == config.model_dump()


def test_the_saved_file_has_every_setting_defaults_included(tmp_path):
    save_config(Config(), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["policy"]["lora"]["rank"] == 32 and saved["algorithm"]["target_kl"] is None
    assert len(flat(saved)) == len([key for key in list_settings() if "." in key])


def test_help_lists_every_setting_with_its_default():
    lines = settings_help().splitlines()
    defaults = flat(Config().model_dump())
    assert len(defaults) > 60
    for key, default in defaults.items():
        shown = [line.strip() for line in lines if line.startswith(f"  {key}=")]
        assert len(shown) == 1, key
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            assert shown[0].split("=")[1].split(" ")[0] == str(default)
    assert "  policy.dtype=bfloat16 {float32, bfloat16}" in lines
    assert "  logging.wandb=false" in lines and "  algorithm.target_kl=null" in lines


def test_every_setting_says_what_it_means():
    assert not [key for key, field in list_settings().items() if "." in key and not field.description]
