"""The declarations: published names and defaults, ranges, and combinations that cannot be."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.config.commands import GenerateConfig, ScoreConfig
from megatron_bupo.config.model import ModelConfig
from megatron_bupo.config.monitor import MonitorConfig
from megatron_bupo.config.rollout import RolloutConfig, SGLangConfig
from megatron_bupo.config.schedule import ScheduleConfig
from megatron_bupo.config.train import (
    AlgorithmConfig,
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_bupo.errors import UsageError


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ModelConfig(str(tmp_path / "model"))


@pytest.fixture
def train(model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """The smallest run that passes every check."""
    (tmp_path / "prompts.jsonl").write_text("")
    return TrainConfig(
        model,
        ParallelConfig(),
        OptimizerConfig(),
        ScheduleConfig(train_iters=5),
        AlgorithmConfig(),
        DataConfig(prompt_data=[str(tmp_path / "prompts.jsonl")]),
        RolloutConfig(),
        SGLangConfig(),
        BatchConfig(),
        MonitorConfig(),
        RunConfig(),
    )


def changed(config: Any, group: str, **values: object) -> Any:
    """With other values in a group, or in one inside it: algorithm.objective."""
    outer, _, inner = group.partition(".")
    held = getattr(config, outer)
    return replace(config, **{outer: changed(held, inner, **values) if inner else replace(held, **values)})


def test_defaults_are_those_of_the_interface(train: TrainConfig) -> None:
    train.check()
    assert (train.optimizer.lr, train.optimizer.lr_decay_style, train.optimizer.adam_eps) == (1e-6, "constant", 1e-8)
    assert (train.optimizer.adam_beta1, train.optimizer.adam_beta2) == (0.9, 0.999)
    assert (train.optimizer.weight_decay, train.optimizer.clip_grad) == (0.01, 1.0)
    assert (train.schedule.internal_layer, train.schedule.internal_steps) == (None, 0)
    assert (train.schedule.internal_module, train.schedule.internal_policy_norm) == ("layer", "none")
    objective, clip = train.algorithm.objective, train.algorithm.losses.ppo_clip  # type: ignore[attr-defined]
    assert (clip.clip_ratio_low, clip.clip_ratio_high, clip.dual_clip) == (0.2, 0.2, 10)
    assert (objective.kl_loss_coef, objective.kl_type, objective.entropy_coef) == (0, "k3", 0)
    assert (train.algorithm.advantage_estimator, train.algorithm.loss) == ("grpo", "ppo-clip")
    assert (objective.loss_aggregation, train.algorithm.aggregation) == ("token-mean", "token-mean")
    assert (train.rollout.rollout_batch_size, train.rollout.n_samples_per_prompt) == (128, 8)
    assert (train.data.rollout_max_prompt_len, train.rollout.rollout_max_response_len) == (1024, 8192)
    assert (train.rollout.rollout_temperature, train.rollout.rollout_top_p) == (1.0, 1.0)
    assert (train.batch.global_batch_size, train.batch.max_tokens_per_micro_batch) == (None, 16384)
    assert (train.monitor.monitor_responses, train.run.seed, train.model.bf16) == (64, 1234, False)


def test_groups_are_frozen(train: TrainConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        train.optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("group", "values", "words"),
    [
        ("parallel", {"context_parallel_size": 2}, "context parallelism is not supported"),
        ("parallel", {"expert_model_parallel_size": 2}, "expert parallelism is not supported"),
        ("parallel", {"num_virtual_stages_per_pipeline_rank": 2}, "needs --pipeline-model-parallel-size 2"),
        ("parallel", {"sequence_parallel": True}, "needs --tensor-model-parallel-size 2"),
        ("parallel", {"recompute_granularity": "full"}, "needs --recompute-method and --recompute-num-layers"),
        (
            "parallel",
            {"recompute_granularity": "full", "recompute_method": "block"},
            "needs --recompute-method and --recompute-num-layers",
        ),
        (
            "parallel",
            {"recompute_granularity": "selective", "recompute_method": "block"},
            "--recompute-method block: goes only with --recompute-granularity full",
        ),
        ("parallel", {"recompute_num_layers": 1}, "--recompute-num-layers 1: goes only with"),
        ("optimizer", {"min_lr": 1e-3}, "must be at most --lr 1e-06"),
        ("optimizer", {"lr_warmup_iters": 6}, "must be at most --train-iters 5"),
        ("optimizer", {"lr": math.nan}, "must be a finite number"),
        ("algorithm.losses.ppo_clip", {"dual_clip": 1.0}, "must be greater than 1, or 0"),
        ("batch", {"global_batch_size": 1000}, "must divide the 1024 responses of a step"),
        ("batch", {"global_batch_size": 2048}, "must divide the 1024 responses of a step"),
        ("data", {"prompt_data": None}, "give --prompt-data FILE... or --load-rollouts DIR"),
        ("rollout", {"rollout_engine": "sglang"}, "sglang: neither servers nor --sglang-launch; give --sglang-url"),
        ("sglang", {"sglang_launch": True}, "--sglang-launch: goes only with --rollout-engine sglang"),
        ("sglang", {"sglang_concurrency": 8}, "--sglang-concurrency: goes only with --rollout-engine sglang"),
        ("sglang", {"sglang_gpus": ["0", "1"]}, "--sglang-gpus 0 1: give one list for each of the 1 server"),
        ("sglang", {"sglang_url": ["http://a:1", "http://a:1/"]}, "give each server once"),
        ("run", {"save_interval": 10}, "--save DIR"),
        ("run", {"keep": 2}, "only with --save-interval"),
        ("run", {"allow_changed_run": True}, "only with --load"),
    ],
)
def test_refused_combinations(train: TrainConfig, group: str, values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        changed(train, group, **values).check()
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("parallel", {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
        ("parallel", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("parallel", {"recompute_granularity": "selective"}),
        (
            "parallel",
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ),
        ("optimizer", {"lr_warmup_iters": 5}),
        ("algorithm.losses.ppo_clip", {"dual_clip": 0.0}),
        ("algorithm", {"advantage_estimator": "dr-grpo"}),
        ("batch", {"global_batch_size": 256}),
        ("batch", {"global_batch_size": 1024}),
        ("monitor", {"monitor_responses": 0}),
    ],
)
def test_allowed_combinations(
    train: TrainConfig, group: str, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    changed(train, group, **values).check()


def test_dr_grpo_has_its_own_aggregation(train: TrainConfig) -> None:
    dr_grpo = changed(train, "algorithm", advantage_estimator="dr-grpo")
    dr_grpo.check()
    assert dr_grpo.algorithm.aggregation == "dr-grpo"
    with pytest.raises(UsageError, match="leave the flag out"):
        changed(dr_grpo, "algorithm.objective", loss_aggregation="seq-mean").check()


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
def test_grouped_estimators_need_two_samples(train: TrainConfig, estimator: str) -> None:
    grouped = changed(train, "algorithm", advantage_estimator=estimator)
    with pytest.raises(UsageError, match=f"--n-samples-per-prompt 1: {estimator} compares"):
        changed(grouped, "rollout", n_samples_per_prompt=1).check()
    changed(grouped, "rollout", n_samples_per_prompt=2).check()


def test_reinforce_whitens_over_the_step(train: TrainConfig) -> None:
    single = changed(train, "algorithm", advantage_estimator="reinforce++")
    single = changed(single, "rollout", n_samples_per_prompt=1)
    single.check()
    with pytest.raises(UsageError, match=r"reinforce\+\+ compares the responses of a step"):
        changed(single, "rollout", rollout_batch_size=1).check()


def test_replay_and_prompts_exclude_each_other(train: TrainConfig, tmp_path: Path) -> None:
    replayed = changed(train, "rollout", load_rollouts=str(tmp_path))
    with pytest.raises(UsageError, match="give one of them"):
        replayed.check()
    replayed = changed(replayed, "data", prompt_data=None)
    replayed.check()
    with pytest.raises(UsageError, match="is the folder that is replayed"):
        changed(replayed, "rollout", save_rollouts=f"{tmp_path}/../{tmp_path.name}").check()


def test_servers_are_given_or_launched(train: TrainConfig) -> None:
    served = changed(train, "rollout", rollout_engine="sglang")

    def check(**values: object) -> None:
        changed(served, "sglang", **values).check()

    check(sglang_launch=True, sglang_num_servers=2, sglang_gpus=["0,1", "2,3"], sglang_args="--tp 2")
    check(sglang_url=["http://127.0.0.1:30000", "https://[::1]:443/"], weight_sync="disk", weight_sync_dir="weights")
    for words, values in {
        "both --sglang-url and": {"sglang_launch": True, "sglang_url": ["http://a:1"]},
        "--sglang-args: goes only with --sglang-launch": {"sglang_url": ["http://a:1"], "sglang_args": "--tp 2"},
        "--sglang-num-servers: goes only with": {"sglang_url": ["http://a:1"], "sglang_num_servers": 2},
        "--weight-sync disk: needs --weight-sync-dir": {"sglang_launch": True, "weight_sync": "disk"},
    }.items():
        with pytest.raises(UsageError, match=words):
            check(**values)
    replay = changed(changed(served, "sglang", sglang_launch=True), "rollout", load_rollouts=".")
    with pytest.raises(UsageError, match="needs no engine"):
        changed(replay, "data", prompt_data=None).check()


def test_files_that_are_read_must_exist(train: TrainConfig, tmp_path: Path) -> None:
    def refused(group: str, words: str, **values: object) -> None:
        with pytest.raises(UsageError) as refusal:
            changed(train, group, **values).check()
        assert words in str(refusal.value)

    refused("model", "no such folder", hf_model=str(tmp_path / "nowhere"))
    refused("model", "has no config.json", hf_model=str(tmp_path))
    refused("data", "must end in .parquet, .jsonl or .json", prompt_data=[str(tmp_path / "prompts.csv")])
    refused("data", "is not there", prompt_data=[*train.data.prompt_data, str(tmp_path / "more.jsonl")])
    refused("data", "cannot read the file", reward=str(tmp_path / "reward.py") + ":score")
    refused("data", "must be math or FILE.py:function", reward="maths")
    refused("data", "must be math or FILE.py:function", reward="reward.py:not a name")
    refused("rollout", "no such folder", load_rollouts=str(tmp_path / "nowhere"))
    (tmp_path / "reward.py").write_text("def score(): ...")
    changed(train, "data", reward=str(tmp_path / "reward.py") + ":score").check()


@pytest.mark.parametrize(
    ("group", "name", "taken"),
    [
        ("run", "save", "metrics.jsonl"),
        ("rollout", "save_rollouts", "step_000001.jsonl"),
    ],
)
def test_an_earlier_run_is_not_overwritten(
    train: TrainConfig, tmp_path: Path, group: str, name: str, taken: str
) -> None:
    target = tmp_path / "out"
    changed(train, group, **{name: str(target / "deeper")}).check()
    target.mkdir()
    (target / "unrelated").write_text("")
    changed(train, group, **{name: str(target)}).check()
    (target / taken).write_text("")
    with pytest.raises(UsageError, match=f"already holds {taken} of an earlier run; choose another folder"):
        changed(train, group, **{name: str(target)}).check()
    with pytest.raises(UsageError, match="is a file, not a folder"):
        changed(train, group, **{name: str(target / taken / "below")}).check()
    assert sorted(path.name for path in target.iterdir()) == sorted([taken, "unrelated"])


def test_world_size_must_hold_whole_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    for processes in ("6", "12"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        parallel.check_world()
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(UsageError, match=f"{processes} process.* start a multiple of 6"):
            parallel.check_world()


def test_score_and_generate(model: ModelConfig, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("")
    out = str(tmp_path / "out.jsonl")
    score = ScoreConfig(model=model, parallel=ParallelConfig(), rollouts=str(data), output=out)
    generate = GenerateConfig(model=model, prompt_data=[str(data)], output=out)
    score.check()
    generate.check()
    assert (score.rollout_temperature, score.max_tokens_per_micro_batch, score.policy) == (1.0, 16384, "full")
    assert (generate.n_samples_per_prompt, generate.rollout_micro_batch_size, generate.num_prompts) == (1, 64, None)
    for config in (score, generate):
        with pytest.raises(UsageError, match="none of: full, layer:L"):
            replace(config, policy="layer:0" if config is score else ["layer:0"]).check()
        with pytest.raises(UsageError, match="is a folder; give the name of a file"):
            replace(config, output=str(tmp_path)).check()
        with pytest.raises(UsageError, match="is a file, not a folder"):
            replace(config, output=str(data / "out.jsonl")).check()
    with pytest.raises(UsageError, match="is not there"):
        replace(score, rollouts=str(tmp_path / "none.jsonl")).check()
