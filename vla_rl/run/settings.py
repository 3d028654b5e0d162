"""Settings: one frozen model per YAML section, each field with its range and meaning, and the rules that join two settings.

Not here: what the settings do; how they are read from files and the command line (vla_rl.run.load_settings).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from vla_rl.run.section import ActionDims, Indices, Mode, ProgressConfig, RunFolderConfig, Section, States
from vla_rl.run.task_suites import base_suite, check_states, check_suite, suite_size


class ConfigError(ValueError):
    """A user's mistake in the settings; the message names the setting, what was expected, what came, the way out."""


class RunConfig(RunFolderConfig):
    """One training run."""

    timesteps: int = Field(
        100_000, ge=0, le=10**12, description="simulator steps to train for, all environments together (20 Hz)"
    )
    stop_without_signal: int | None = Field(
        None, ge=1, le=10**9, description="ends after that many episodes without a reward"
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), the only weights of the policy that are trained. Dropout is always 0."""

    rank: int = Field(32, ge=1, le=8192, description="rank r of each adapter")
    alpha: float = Field(16.0, gt=0, le=1e6, description="the adapter's output is scaled by alpha / rank")
    target_modules: Literal["all-linear", "language-model"] = Field(
        "all-linear", description="all linear layers except the LM head, or those of the language model only"
    )
    last_layers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="of the language model, only this many last layers (language-model); null adapts all",
    )

    @model_validator(mode="after")
    def check_layers(self) -> LoraConfig:
        if self.last_layers is not None and self.target_modules != "language-model":
            raise ValueError(
                f"last_layers={self.last_layers} with target_modules={self.target_modules}; set target_modules=language-model"
            )
        return self


class PolicyConfig(Section):
    """The OpenVLA checkpoint and how it is run."""

    checkpoint: str = Field(
        "tiny-openvla",
        description="a folder in the official layout, a Hugging Face id, tiny-openvla (in the repository, solves libero_spatial "
        "now and then), tiny-openvla-ppo (after PPO on it) or tiny-openvla-random",
    )
    decoder: Literal["autoregressive", "parallel"] = Field(
        "parallel",
        description="autoregressive: vanilla OpenVLA, one action; parallel: OpenVLA-OFT, a chunk in one forward",
    )
    head: Literal["tokens", "l1"] = Field(
        "tokens",
        description="tokens: action tokens, which RL trains; l1: OpenVLA-OFT's L1 head, to evaluate (to RL: vla_rl.warmstart)",
    )
    chunk_size: int = Field(8, ge=1, le=1000, description="actions a decision; 1 for the autoregressive decoder")
    num_images: Literal[1, 2] = Field(1, description="1: agent view; 2: agent view and wrist camera")
    use_proprio: bool = Field(False, description="feed end-effector position, orientation and gripper (8 numbers)")
    center_crop: bool = Field(True, description="crop 90 % of the image's area, as after training with augmentation")
    unnorm_key: str | None = Field(
        None,
        description="entry of dataset_statistics.json; null takes the task suite's, of a perturbed one its base suite's",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="precision of the frozen base weights")
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="what is recomputed backward, less memory and slower: none, selective (all but products and attention) or "
        "full; auto: on a GPU the first in which 16 rows fit (fine-tuning: full), on the CPU none",
    )
    compile: Literal["auto", "true", "false"] = Field(
        "auto",
        description="torch.compile the transformer blocks, and replay forwards as CUDA graphs; auto: on a GPU where a C compiler is",
    )
    quantization: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: the language model's frozen linear layers in 4 bit, a quarter of their memory, slower "
        "(pip install -r requirements-4bit.txt)",
    )
    as_trained: bool = Field(
        True,
        description="settings that differ from how the checkpoint was trained are an error; false: a warning",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    adapter: str | None = Field(None, description="LoRA weights to begin with: a run, its checkpoint, or a peft folder")

    @model_validator(mode="before")
    @classmethod
    def read_booleans(cls, values: Any) -> Any:
        """YAML reads true and false as booleans; gradient_checkpointing was one until November 2026."""
        if not isinstance(values, dict):
            return values
        words = {"gradient_checkpointing": ("none", "full"), "compile": ("false", "true")}
        return values | {k: words[k][values[k]] for k in words if isinstance(values.get(k), bool)}


class ValueHeadConfig(Section):
    """V(s): a float32 MLP on the hidden state of the last prompt token."""

    hidden_sizes: list[Annotated[int, Field(ge=1, le=2**16)]] = Field(
        [1024], max_length=64, description="widths of the hidden layers"
    )


class EnvConfig(Section):
    """LIBERO tasks and how an episode of them starts, ends and is seen."""

    task_suite: Annotated[str, AfterValidator(check_suite)] = Field(
        "libero_spatial",
        description="libero_spatial, libero_object, libero_goal, libero_10, libero_90; all but the last also as LIBERO-PRO perturbs "
        "them: with _lan, _object, _swap or _task behind (docs/libero.md has more); your own: docs/extending.md",
    )
    task_ids: Indices = Field([0], min_length=1, description="tasks of the suite; each gets as many episodes")
    initial_states: Literal["random"] | States = Field(
        "random", description="training episodes start from fresh random placements, or from these fixed states (0-49)"
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="simulator steps until a training episode is cut; null takes the suite's own limit",
    )
    settle_steps: int = Field(
        10, ge=0, le=10_000, description="steps with a resting arm before an episode; not counted"
    )
    reward: Literal["sparse", "dense"] = Field(
        "sparse",
        description="sparse: 1 on success; dense: and potential-based shaping from the goal's placements (gae)",
    )
    image_size: int = Field(256, ge=16, le=4096, description="rendered image side in pixels, before preprocessing")
    render: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: stock LIBERO's images; fast: no reflections and no multi-sampling, for CPU rendering",
    )
    physics: Literal["exact", "fast"] = Field(
        "exact",
        description="of training; exact: stock LIBERO's, bit for bit; fast: the same to rounding, a step in half the time. Evaluation is exact",
    )
    num_workers: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="processes that share the environments; null takes one a CPU core, with rollout.overlap at most one "
        "for two environments",
    )
    simulators_per_worker: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="tasks that a worker keeps in memory (0.6 GB each); null: one an environment, and in "
        "training all that a third of the memory has room for; fewer rebuild simulators at each turn, seconds each",
    )
    step_timeout_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="a worker that takes longer for a step (of one environment) or a picture hangs, and is replaced; null: 20 times the "
        "slowest of its first 20 steps, but at least 60",
    )
    build_timeout_s: float = Field(
        300.0, gt=0, le=86400, description="likewise for its start, the build of a simulator or a reset"
    )
    worker_replacements: int = Field(
        5,
        ge=0,
        le=10**6,
        description="of one worker in a row, with no episode of it that ended between them; then the run is saved and stops",
    )
    model_cache_gb: float = Field(
        3.0, ge=0, le=1e5, description="disk for compiled models in ~/.cache/vla_rl (0.25 GB a task); 0 for none"
    )


class RolloutConfig(Section):
    """Data of one iteration."""

    num_envs: int = Field(8, ge=1, le=2**16, description="environments")
    n_steps: int = Field(64, ge=1, le=10**6, description="decisions per environment and iteration (gae)")
    group_size: int = Field(8, ge=2, le=2**16, description="episodes that share task and initial state (grpo)")
    n_episodes: int | None = Field(
        None, ge=1, le=10**6, description="episodes per iteration (grpo); null takes num_envs"
    )
    overlap: bool = Field(
        False,
        description="the policy decides for one half of the environments while the other half steps; best with num_envs a "
        "multiple of 2 x env.num_workers",
    )
    temperature: float = Field(
        1.0, gt=0, le=1000, description="of the sampling; log-probabilities are of the same distribution"
    )
    final_temperature: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="to which the temperature goes in equal steps in the last third of the timesteps; null: it stays",
    )


class AlgorithmConfig(Section):
    """Advantages and losses."""

    estimator: Literal["gae", "grpo"] = Field("gae", description="gae: PPO with a critic; grpo: relative to a group")
    gamma: float = Field(0.99, ge=0, le=1, description="discount per decision, not per simulator step")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="0 is one-step TD, 1 is Monte Carlo")
    critic_gae_lambda: float | None = Field(
        None, ge=0, le=1, description="lambda of the value head's targets; null takes gae_lambda (VC-PPO: 1)"
    )
    bootstrap_truncated: bool = Field(
        True,
        description="the step limit is not the task's end: what would follow is worth the value of the last observation; "
        "false: it is failure, worth 0 (gae)",
    )
    normalize_advantages: bool = Field(True, description="zero mean and unit variance over the rollout (gae)")
    drop_uniform_groups: bool = Field(True, description="leave out groups whose returns are all equal (grpo; DAPO)")
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped at 1 - this")
    clip_ratio_high: float = Field(
        0.28, gt=0, le=1e6, description="the ratio is clipped at 1 + this (clip-higher, DAPO)"
    )
    logprob_level: Literal["token", "action", "chunk"] = Field(
        "token", description="what one ratio is of: one token, one 7-token action, or the whole chunk"
    )
    action_dims: ActionDims = Field(
        "0-6",
        description="dimensions of the action (0-2 translation, 3-5 rotation, 6 gripper) whose tokens the ratio is of; the "
        "others are sampled too, but what they are is not learned from",
    )
    value_coef: float = Field(0.5, ge=0, le=1e6, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, le=1e6, description="weight of the entropy bonus")
    kl_coef: float = Field(
        0.0, ge=0, le=1e6, description="weight of KL(policy || base model); above 0 costs one more forward a row"
    )
    recompute_logprobs: bool = Field(
        False,
        description="an update first scores its rows anew, one more forward a row, so that its ratios begin at 1 also in bfloat16 "
        "with the autoregressive decoder; false: the rollout's log-probabilities",
    )
    target_kl: float | None = Field(
        None, gt=0, le=1e6, description="an update stops before a step whose approx_kl is above; null never"
    )
    n_epochs: int = Field(1, ge=1, le=10_000, description="passes over the rollout")
    minibatch_size: int = Field(64, ge=1, le=10**7, description="decisions per optimizer step")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=10**7)] = Field(
        "auto",
        description="decisions per forward; gradients add up to the minibatch's; auto: what fits the GPU, measured at the start, "
        "and on the CPU a minibatch of at most 64",
    )
    critic_warmup_iterations: int = Field(
        0, ge=0, le=10**9, description="first iterations that train only the value head (gae)"
    )
    wait_for_reward: bool = Field(
        True, description="until the run's first reward other than 0, too, only the value head is trained (gae)"
    )
    critic_epochs: int = Field(
        0, ge=0, le=10_000, description="further passes of the value head alone, on cached hidden states (gae)"
    )
    freeze_vla_for_critic: bool = Field(False, description="true: the value loss does not reach the policy's weights")


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = Field(gt=0, le=100, description="step size")
    weight_decay: float = Field(0.0, ge=0, le=1e6, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's running mean")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the squared gradient's running mean")
    eps: float = Field(1e-8, gt=0, le=1, description="added to the root of the squared gradient's mean")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="gradients are scaled down to this global norm; .inf never"
    )


class ActorConfig(OptimizerConfig):
    """AdamW of the LoRA weights."""

    learning_rate: float = Field(1e-5, gt=0, le=100, description="step size")
    schedule: Literal["constant", "linear", "kl"] = Field(
        "constant",
        description="of the step size; linear: to 0 at run.timesteps; kl: / 1.5 before the step of a minibatch whose KL "
        "is above twice kl_target, x 1.5 where it is below half of it",
    )
    kl_target: float = Field(0.01, gt=0, le=1e6, description="nats a token that an update moves the policy by (kl)")
    min_learning_rate: float = Field(1e-7, gt=0, le=100, description="the step size is never smaller (kl)")
    max_learning_rate: float = Field(1e-2, gt=0, le=100, description="the step size is never larger (kl)")

    @model_validator(mode="before")
    @classmethod
    def read_old_name(cls, values: Any) -> Any:
        """anneal_learning_rate, until November 2026: true is schedule linear, false constant."""
        if not isinstance(values, dict) or not isinstance(values.get("anneal_learning_rate"), bool):
            return values
        old, meant = ("true", "linear") if values["anneal_learning_rate"] else ("false", "constant")
        if values.get("schedule", meant) != meant:
            raise ValueError(
                f"anneal_learning_rate={old}, the old name of schedule={meant}, with schedule={values['schedule']}; leave "
                "anneal_learning_rate out"
            )
        return {name: value for name, value in values.items() if name != "anneal_learning_rate"} | {"schedule": meant}

    @model_validator(mode="after")
    def check_bounds(self) -> ActorConfig:
        lowest, highest = self.min_learning_rate, self.max_learning_rate
        if self.schedule == "kl" and not lowest <= self.learning_rate <= highest:
            raise ValueError(
                f"learning_rate={self.learning_rate:g}, where schedule=kl begins, is not within min_learning_rate={lowest:g} "
                f"and max_learning_rate={highest:g}; change it or them"
            )
        return self


class CriticConfig(OptimizerConfig):
    """AdamW of the value head; its step size is constant."""

    learning_rate: float = Field(3e-4, gt=0, le=100, description="step size")


class EvalConfig(Section):
    """Success from the benchmark's fixed initial states, at the start, every interval and at the end."""

    interval: int = Field(
        10, ge=0, le=10**9, description="iterations between evaluations; 0 evaluates at start and end only"
    )
    states: States = Field("0-49", description="fixed initial states of each task")
    modes: list[Mode] = Field(
        ["greedy", "sampled"],
        min_length=1,
        description="greedy: most likely token; mean_action: nearest to its distribution's mean; sampled",
    )
    temperature: float | None = Field(
        1.0, gt=0, le=1000, description="of mean_action and sampled, 1 as VLA-RL reports; null: rollout.temperature"
    )
    num_envs: int = Field(8, ge=1, le=2**16, description="evaluation environments, fed from one queue")
    max_steps: int | None = Field(
        None, ge=1, le=10**6, description="as env.max_steps; null takes the suite's, which is what others report on"
    )
    render: Literal["exact", "fast"] = Field(
        "exact",
        description="as env.render; exact is what others report on, fast what a policy trained on fast images knows",
    )
    video: bool = Field(True, description="write an MP4 of one success and one failure")


class LoggingConfig(ProgressConfig):
    """What a run leaves behind."""

    checkpoint_interval: int = Field(
        10, ge=1, le=10**9, description="iterations between checkpoints, which evaluations have too"
    )
    keep_checkpoints: int = Field(3, ge=1, le=10**6, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="and those of every so many iterations, a multiple of checkpoint_interval, for good",
    )
    keep_best: bool = Field(True, description="and that of the best evaluation, by greedy success if it is measured")
    curves_interval: int = Field(
        10, ge=1, le=10**9, description="iterations between redrawings of curves and report, which each minute has, too"
    )

    @model_validator(mode="after")
    def check_kept(self) -> LoggingConfig:
        if self.keep_every is not None and self.keep_every % self.checkpoint_interval:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of checkpoint_interval={self.checkpoint_interval}, at which "
                f"checkpoints are written; use {-(-self.keep_every // self.checkpoint_interval) * self.checkpoint_interval}"
            )
        return self


class DistributedConfig(Section):
    """Several processes that train one run (torchrun)."""

    shard: bool = Field(
        False,
        description="each process keeps its part of the frozen base and gathers a block while it runs: less memory, slower",
    )


class Config(Section):
    """All settings of a run, checked against each other."""

    run: RunConfig = Field(default_factory=RunConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    value_head: ValueHeadConfig = Field(default_factory=ValueHeadConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    actor: ActorConfig = Field(default_factory=ActorConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)

    @model_validator(mode="after")
    def check_combinations(self) -> Config:
        env, rollout, algorithm, policy = self.env, self.rollout, self.algorithm, self.policy
        num_tasks, _ = suite_size(env.task_suite)
        wrong = [i for i in env.task_ids if i >= num_tasks]
        if wrong:
            raise ValueError(f"env.task_ids={wrong} outside {env.task_suite}, which has tasks 0 to {num_tasks - 1}")
        check_states(env.task_suite, self.eval.states, "eval.states")
        if env.initial_states != "random":
            check_states(env.task_suite, env.initial_states, "env.initial_states")
        for key, indices in (("env.task_ids", env.task_ids), ("eval.states", self.eval.states)):
            twice = sorted({i for i in indices if indices.count(i) > 1})
            if twice:
                raise ValueError(f"{key} has {twice} twice; name each once")
        check_decoder(policy)
        if algorithm.micro_batch_size != "auto" and algorithm.micro_batch_size > algorithm.minibatch_size:
            raise ValueError(
                f"algorithm.micro_batch_size={algorithm.micro_batch_size} is larger than "
                f"algorithm.minibatch_size={algorithm.minibatch_size}; make it at most that"
            )
        if algorithm.estimator == "gae":
            rows = rollout.num_envs * rollout.n_steps
            if algorithm.minibatch_size > rows:
                raise ValueError(
                    f"algorithm.minibatch_size={algorithm.minibatch_size} is larger than the rollout of {rows} decisions "
                    "(rollout.num_envs x rollout.n_steps); make it at most that"
                )
            if self.actor.schedule == "kl" and algorithm.n_epochs == 1 and algorithm.minibatch_size == rows:
                raise ValueError(
                    f"actor.schedule=kl with one minibatch an update: its KL is 0, and no other is measured; make "
                    f"algorithm.minibatch_size={rows} smaller or algorithm.n_epochs=1 larger"
                )
        else:
            check_groups(rollout)
            if rollout.n_episodes is not None and rollout.n_episodes < rollout.num_envs:
                raise ValueError(
                    f"rollout.n_episodes={rollout.n_episodes} leaves some of rollout.num_envs={rollout.num_envs} without an "
                    f"episode; use rollout.num_envs={rollout.n_episodes} or more episodes"
                )
        if env.reward == "dense" and algorithm.estimator == "grpo":
            raise ValueError(
                "env.reward=dense with algorithm.estimator=grpo: potentials cancel out of an episode's return, which is all "
                "that GRPO looks at; use env.reward=sparse or algorithm.estimator=gae"
            )
        if rollout.overlap and rollout.num_envs == 1:
            raise ValueError(
                "rollout.overlap=true with rollout.num_envs=1; use 2 or more environments, or overlap=false"
            )
        if env.initial_states != "random":
            shared = sorted(set(env.initial_states) & set(self.eval.states))
            if shared:
                raise ValueError(
                    f"env.initial_states and eval.states share {shared}: the policy would be tested on what it trained on; "
                    "make them disjoint, for example env.initial_states=0-39 eval.states=40-49"
                )
        return self

    def max_episode_steps(self, evaluation: bool = False) -> int:
        """Simulator steps after which an episode is truncated."""
        return (self.eval if evaluation else self.env).max_steps or suite_size(self.env.task_suite)[1]

    def unnorm_key(self) -> str:
        """The entry of a checkpoint's statistics, which may be there with _no_noops behind."""
        return self.policy.unnorm_key or base_suite(self.env.task_suite)


def check_micro_batches(batch_size: int, micro_batch_size: int) -> None:
    """Of trainings whose batches are cut into equal parts."""
    if batch_size % micro_batch_size:
        raise ValueError(
            f"training.batch_size={batch_size} is not a multiple of training.micro_batch_size={micro_batch_size}"
        )


def check_decoder(policy: PolicyConfig) -> None:
    if policy.head == "l1" and policy.decoder != "parallel":
        raise ValueError(f"policy.head=l1 with policy.decoder={policy.decoder}; set policy.decoder=parallel")
    if policy.decoder == "autoregressive" and policy.chunk_size != 1:
        raise ValueError(
            f"policy.chunk_size={policy.chunk_size} with policy.decoder=autoregressive, which decodes one action; "
            "set policy.chunk_size=1 or policy.decoder=parallel"
        )


def check_groups(rollout: RolloutConfig) -> None:
    size = rollout.group_size
    for key, value in (("num_envs", rollout.num_envs), ("n_episodes", rollout.n_episodes or rollout.num_envs)):
        if value % size:
            below = value // size * size
            ways = f"{below} or {below + size}" if below else f"{size}"
            raise ValueError(f"rollout.{key}={value} is not a multiple of rollout.group_size={size}; use {ways}")
