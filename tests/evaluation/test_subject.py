"""What is evaluated is what was trained, used as it was trained; anything else is an error before anything heavy."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vla_rl.evaluation.protocol import measured
from vla_rl.evaluation.subject import (
    TRAINED_AS,
    build_subject,
    check_subject,
    check_suite,
    family_of,
    fingerprint,
    of_checkpoint,
    of_run,
)
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.adapter import lora_of
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.run.checkpoint import find_saved, save_tensors, write_checkpoint
from vla_rl.run.load_settings import load_config, save_config
from vla_rl.run.settings import ConfigError

SUITE = {"env.task_suite": "libero_spatial"}
LORA = ["policy.lora.rank=2", "policy.lora.alpha=4"]


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def write_run(folder: Path, *overrides: str, iterations=(1, 3)) -> Path:
    """A run folder with checkpoints of a trained adapter and value head."""
    given = {override.partition("=")[0] for override in overrides}
    small = [o for o in (*LORA, "value_head.hidden_sizes=[4]") if o.partition("=")[0] not in given]
    config = load_config("configs/tiny_gae_ppo.yaml", [*small, *overrides])
    policy, head = build_policy(config), build_value_head(config, 128)

    def write(checkpoint: Path) -> None:
        policy.save_adapter(checkpoint / "adapter")
        save_config(config, checkpoint / "config.yaml")
        if head is not None:
            save_tensors(head.state_dict(), checkpoint / "value_head.safetensors")

    folder.mkdir(parents=True, exist_ok=True)
    for iteration in iterations:
        with torch.no_grad():
            for number, parameter in enumerate(policy.trainable_parameters()):
                parameter.fill_(0.01 * (iteration + number % 3))
            if head is not None:
                head.mlp[-1].bias.fill_(iteration)
        write_checkpoint(folder / "checkpoints", f"iteration-{iteration:06d}", policy.fingerprint(), write, keep=9)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one")


# a run


def test_a_run_is_its_newest_checkpoint_with_its_own_settings(run):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    subject = of_run(str(run), [], {})
    assert subject.name == "one/iteration-000003" and subject.run == run
    assert subject.config.eval.render == "fast" and subject.config.policy.lora.rank == 2
    check_subject(subject, ["libero_spatial"])
    policy, head = build_subject(subject)
    assert {round(p.flatten()[0].item(), 6) for p in policy.trainable_parameters()} == {0.03, 0.04, 0.05}
    assert head.mlp[-1].bias.item() == 3
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before  # nothing is written


def test_an_earlier_checkpoint_can_be_named(run):
    subject = of_run(str(run / "checkpoints/iteration-000001"), [], {})
    assert subject.name == "one/iteration-000001" and build_subject(subject)[1].mlp[-1].bias.item() == 1


def test_a_run_in_the_midst_of_a_renaming_is_left_alone(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints/iteration-000003").rename(copy / "checkpoints/.iteration-000003.old")
    assert find_saved(copy, "--run ").name == "iteration-000001"
    assert (copy / "checkpoints/.iteration-000003.old").is_dir()


def test_grpo_has_no_value_head(tmp_path):
    subject = of_run(
        str(write_run(tmp_path / "g", "algorithm.estimator=grpo", "algorithm.gamma=1", iterations=[2])), [], {}
    )
    assert build_subject(subject)[1] is None


def test_where_there_is_no_gpu_a_run_of_one_is_evaluated_in_float32_on_the_cpu(tmp_path):
    run = write_run(tmp_path / "r", iterations=[1])
    path = run / "checkpoints/iteration-000001/config.yaml"
    manifest = path.with_name("manifest.json")
    entry = json.loads(manifest.read_text())
    path.write_text(
        path.read_text().replace("device: cpu", "device: cuda").replace("dtype: float32", "dtype: bfloat16")
    )
    del entry["files"]["config.yaml"]  # it was changed here
    manifest.write_text(json.dumps(entry))
    config = of_run(str(run), [], {}).config
    assert (config.run.device, config.policy.dtype) == ("cpu", "float32")
    assert of_run(str(run), ["policy.dtype=bfloat16"], {}).config.policy.dtype == "bfloat16"


def test_another_suite_keeps_the_units_that_the_run_was_trained_in(run):
    subject = of_run(str(run), [], {"env.task_suite": "libero_object", "env.task_ids": [9]})
    assert subject.config.policy.unnorm_key == "libero_spatial"
    check_subject(subject, ["libero_object"])
    assert subject.config.max_episode_steps(evaluation=True) == 280


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.chunk_size=4"], "policy.chunk_size (8 -> 4) cannot differ from the run's"),
        (["policy.lora.rank=8"], "policy.lora.rank (2 -> 8)"),
        (["eval.modes=[best]"], "eval.modes"),
        (["eval.sates=0"], "did you mean eval.states?"),
    ],
)
def test_another_policy_than_the_runs_is_refused(run, overrides, words):
    with pytest.raises(ConfigError) as error:
        of_run(str(run), overrides, {})
    assert words in str(error.value)


def test_what_is_no_run_or_has_no_whole_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        of_run(str(tmp_path / "nowhere"), [], {})
    with pytest.raises(ConfigError, match=r"has no checkpoint in .*checkpoints yet$"):
        of_run(str(tmp_path), [], {})
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"it has a fine-tuned model: .*/model"):
        of_run(str(tmp_path), [], {})
    copy = shutil.copytree(run, tmp_path / "torn")
    weights = copy / "checkpoints/iteration-000003/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"is torn: .*; take the one before: --run .*iteration-000001"):
        of_run(str(copy), [], {})
    with pytest.raises(ConfigError, match="is torn"):
        of_run(str(weights.parent.parent), [], {})


def test_a_base_that_was_moved_is_told_where_it_is(run):
    subject = of_run(str(run), [], {"policy.checkpoint": "/nowhere"})
    with pytest.raises(ConfigError, match=r"/nowhere.*if it was moved, .*policy.checkpoint="):
        check_subject(subject, ["libero_spatial"])
    assert of_run(str(run), [], {"policy.checkpoint": str(TRAINED)}).config.policy.checkpoint == str(TRAINED)


def test_states_that_a_run_trained_on_are_refused_in_their_own_task_only(tmp_path):
    run = str(
        write_run(tmp_path / "r", "env.initial_states=0-39", "eval.states=40-49", "env.task_ids=[0,5]", iterations=[1])
    )
    check_subject(of_run(run, [], {}), ["libero_spatial"])
    with pytest.raises(ConfigError, match=r"libero_spatial task 0, 5 from the fixed states \[38, 39\].*--states 40,41"):
        check_subject(of_run(run, [], {"eval.states": "38-41"}), ["libero_spatial"])
    check_subject(of_run(run, [], {"eval.states": "0-49", "env.task_ids": [1, 2]}), ["libero_spatial"])
    check_subject(of_run(run, [], {"eval.states": "0-49", "env.task_suite": "libero_goal"}), ["libero_goal"])


# a model


def test_a_model_is_used_as_it_was_trained(caplog):
    subject = of_checkpoint("tiny-openvla", None, [], SUITE)
    policy, evaluation, env = subject.config.policy, subject.config.eval, subject.config.env
    assert (policy.use_proprio, policy.chunk_size, policy.decoder, policy.dtype) == (True, 8, "parallel", "float32")
    assert (evaluation.render, env.render, env.image_size, subject.config.run.device) == ("fast", "fast", 128, "cpu")
    check_subject(subject, ["libero_spatial"])
    assert caplog.text == "" and subject.name == "tiny-openvla" and subject.adapter is subject.value_head is None
    built, head = build_subject(subject)
    assert head is None and built.adapter is None
    assert set(json.loads((TRAINED / "trained_as.json").read_text())) == {*TRAINED_AS, "head"}


def test_a_model_that_does_not_tell_is_taken_as_the_settings_of_the_7b_model(tmp_path, caplog):
    model = shutil.copytree(TRAINED, tmp_path / "model")
    (model / "trained_as.json").unlink()
    with caplog.at_level("INFO"):
        config = of_checkpoint(str(model), None, [], SUITE).config
    assert "does not tell how it was trained" in caplog.text and "policy.decoder=autoregressive" in caplog.text
    seven = load_config("configs/gae_ppo_config.yaml")
    for name in ("decoder", "chunk_size", "num_images", "use_proprio", "center_crop", "quantization"):
        assert getattr(config.policy, name) == getattr(seven.policy, name)
    assert config.env.image_size == seven.env.image_size and config.eval.render == seven.eval.render


def test_a_model_with_an_l1_head_acts_through_it_unless_told_otherwise(tmp_path, caplog):
    model = shutil.copytree(TRAINED, tmp_path / "model")
    head = ActionHead(128)
    path = save_action_head(head, model, 9)
    subject = of_checkpoint(str(model), None, [], SUITE)
    assert subject.config.policy.head == "l1" and measured(subject.config, 1.0, ["libero_spatial"], 2)["head"] == "l1"
    tokens = of_checkpoint("tiny-openvla", None, [], SUITE)
    assert "head" not in measured(tokens.config, 1.0, ["libero_spatial"], 2)
    check_subject(subject, ["libero_spatial"])
    policy, _ = build_subject(subject)
    first = fingerprint(policy)
    policy.action_head.model["fc2"].bias += 1
    assert policy.head == "l1" and fingerprint(policy) != first
    with pytest.raises(ConfigError, match=r"has an L1 action head \(action_head--9.*policy.as_trained=false"):
        check_subject(of_checkpoint(str(model), None, ["policy.head=tokens"], SUITE), ["libero_spatial"])
    check_subject(
        of_checkpoint(str(model), None, ["policy.head=tokens", "policy.as_trained=false"], SUITE), ["libero_spatial"]
    )
    path.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="is cut off"):
        check_subject(subject, ["libero_spatial"])


def test_another_use_than_in_training_is_an_error_unless_it_is_meant():
    with pytest.raises(ConfigError, match="trained with 8"):
        check_subject(of_checkpoint("tiny-openvla", None, ["policy.chunk_size=4"], SUITE), ["libero_spatial"])
    check_subject(
        of_checkpoint("tiny-openvla", None, ["policy.chunk_size=4", "policy.as_trained=false"], SUITE),
        ["libero_spatial"],
    )


def test_an_adapter_brings_its_rank_and_layers(run, tmp_path):
    adapter = run / "checkpoints/iteration-000003/adapter"
    subject = of_checkpoint("tiny-openvla", str(adapter), [], SUITE)
    assert (subject.config.policy.lora.rank, subject.config.policy.lora.alpha) == (2, 4)
    policy, _ = build_subject(subject)
    assert fingerprint(policy) == fingerprint(build_subject(of_run(str(run), [], {}))[0])
    config = load_config(
        "configs/tiny_gae_ppo.yaml", ["policy.lora.target_modules=language-model", "policy.lora.last_layers=2"]
    )
    build_policy(config).save_adapter(tmp_path / "last")
    assert lora_of(tmp_path / "last", TRAINED) == {
        **{"rank": 8, "alpha": 16, "target_modules": "language-model"},
        "last_layers": 2,
    }
    build_subject(of_checkpoint("tiny-openvla", str(tmp_path / "last"), [], SUITE))


@pytest.mark.parametrize("place", ["", "checkpoints/iteration-000003", "checkpoints/iteration-000003/adapter"])
@pytest.mark.parametrize("as_setting", [False, True])
def test_an_adapter_is_a_run_or_its_checkpoint_or_a_folder_in_peft_s_format(run, place, as_setting):
    given = str(run / place)
    flag, overrides = (None, [f"policy.adapter={given}"]) if as_setting else (given, [])
    subject = of_checkpoint("tiny-openvla", flag, overrides, SUITE)
    assert subject.adapter == run / "checkpoints/iteration-000003/adapter" and subject.value_head is None
    assert subject.name == "tiny-openvla+one-iteration-000003" and subject.config.policy.lora.rank == 2


@pytest.mark.parametrize("as_setting", [False, True])
def test_a_run_can_be_evaluated_with_other_lora_weights_of_any_rank(run, tmp_path, as_setting):
    other = write_run(tmp_path / "two", "policy.lora.rank=3", "policy.lora.alpha=6", iterations=[2])
    overrides, flags = ([f"policy.adapter={other}"], {}) if as_setting else ([], {"policy.adapter": str(other)})
    subject = of_run(str(run), overrides, flags)
    assert subject.name == "one/iteration-000003+two-iteration-000002" and subject.value_head is None
    assert subject.adapter == other / "checkpoints/iteration-000002/adapter"
    assert (subject.config.policy.lora.rank, subject.config.policy.lora.alpha) == (3, 6)
    expected, _ = build_subject(of_run(str(other), [], {}))
    assert fingerprint(build_subject(subject)[0]) == fingerprint(expected)


def test_a_run_is_evaluated_with_what_it_learned_not_with_what_it_began_with(run, tmp_path):
    began = run / "checkpoints/iteration-000001/adapter"
    later = write_run(tmp_path / "later", f"policy.adapter={began}", iterations=[2])
    subject = of_run(str(later), [], {})
    assert subject.adapter == later / "checkpoints/iteration-000002/adapter" and subject.value_head is not None
    policy, _ = build_subject(subject)
    assert {round(p.flatten()[0].item(), 6) for p in policy.trainable_parameters()} == {0.02, 0.03, 0.04}


def test_a_torn_or_absent_adapter_or_one_of_another_base_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"has no adapter_config.json; give a run, .* or a folder in peft's format"):
        of_checkpoint("tiny-openvla", str(tmp_path), [], SUITE)
    adapter = shutil.copytree(run / "checkpoints/iteration-000003/adapter", tmp_path / "adapter")
    other = of_checkpoint("tiny-openvla-random", str(adapter), ["policy.use_proprio=true"], SUITE)
    with pytest.raises(ConfigError, match="was trained on another base than this one"):
        build_subject(other)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cut off or no safetensors"):
        of_checkpoint("tiny-openvla", str(adapter), [], SUITE)


def test_the_weights_of_an_adapter_are_in_the_fingerprint_and_a_name_is_not(run):
    last, first = (
        fingerprint(build_subject(of_run(str(run / f"checkpoints/iteration-00000{n}"), [], {}))[0]) for n in (3, 1)
    )
    bare = fingerprint(build_subject(of_checkpoint("tiny-openvla", None, [], SUITE))[0])
    assert len({last, first, bare}) == 3
    assert bare == fingerprint(build_subject(of_checkpoint(str(TRAINED), None, [], SUITE))[0])


def test_statistics_that_are_missing_are_listed():
    subject = of_checkpoint("tiny-openvla", None, [], {"env.task_suite": "libero_goal"})
    with pytest.raises(ConfigError, match=r"unnorm_key=libero_goal: the statistics of .* have libero_spatial"):
        check_subject(subject, ["libero_goal"])


def test_an_empty_or_torn_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config.json"):
        of_checkpoint(str(tmp_path / "empty"), None, [], SUITE)
    model = shutil.copytree(TRAINED, tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights in"):
        of_checkpoint(str(model), None, [], SUITE)


# the protocol


def test_a_report_is_sampled_at_temperature_1_unless_it_is_given():
    overrides = ["rollout.temperature=1.5"]
    assert of_checkpoint("tiny-openvla", None, overrides, SUITE).temperature == 1.0
    assert of_checkpoint("tiny-openvla", None, [*overrides, "eval.temperature=1.3"], SUITE).temperature == 1.3


def test_a_suite_that_is_none_has_its_neighbour_named():
    assert check_suite("libero_goal") == "libero_goal"
    with pytest.raises(ConfigError, match=r"no task suite 'libero_spacial'; did you mean libero_spatial\?"):
        check_suite("libero_spacial")
    with pytest.raises(ConfigError, match=r"there are libero_\{spatial"):
        check_suite("bridge")


def test_a_family_is_a_suite_and_its_four_perturbations():
    assert family_of("libero_goal") == ["libero_goal", *(f"libero_goal_{k}" for k in ("lan", "object", "swap", "task"))]
    with pytest.raises(ConfigError, match="did you mean libero_spatial"):
        family_of("libero_spatal")
    for base in ("libero_90", "libero_goal_lan"):
        with pytest.raises(
            ConfigError, match=f"--suite-family {base} has no perturbed suites.*choose one of libero_spatial"
        ):
            family_of(base)
