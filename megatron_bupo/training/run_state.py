"""Where a run stands, and whether a new start is the same run. Read before any process group exists."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bupo.config.train import RunConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_file
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.training.watch import PhaseNumbers, PhaseWatch
from megatron_bupo.weights.checkpoint_tree import TRACKER, find_checkpoint

RUN_STATE = "run_state.json"
SCHEMA = 1
ITERATION = re.compile(r"iter_(\d{7,})")
_COMPARED = (
    "model", "dtype", "data", "seed", "rollout_batch_size", "n_samples_per_prompt", "loss",
    "advantage_estimator", "reward",
)  # fmt: skip


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same when a run goes on.

    `model` and `data` are hashes, `replay` one hash for each step's file instead of `data`, `phases` the policy of each
    step. Steps beyond the shorter of two runs may be added. `loss`, `advantage_estimator` and `reward` are built-in
    names, or the user's function with a hash of its file; None in a run from before they were noted, and a replay has
    no reward.
    """

    model: str
    dtype: str
    data: str
    replay: tuple[str, ...]
    seed: int
    rollout_batch_size: int
    n_samples_per_prompt: int
    phases: tuple[str, ...]
    loss: str | None = None
    advantage_estimator: str | None = None
    reward: str | None = None

    def differences(self, saved: RunIdentity, step: int) -> list[str]:
        """What changed since `saved`, which took `step` steps, in words."""
        found = [
            f"{name}: {getattr(saved, name)} then, {getattr(self, name)} now"
            for name in _COMPARED
            if getattr(saved, name) not in (getattr(self, name), None)
        ]
        replayed = [index + 1 for index, pair in enumerate(zip(saved.replay, self.replay)) if pair[0] != pair[1]]  # noqa: B905
        if replayed or bool(saved.replay) != bool(self.replay):
            found.append(f"replayed rollouts of step {replayed[0] if replayed else 1}: others now than then")
        common = min(len(saved.phases), len(self.phases))
        changed = [index + 1 for index in range(common) if saved.phases[index] != self.phases[index]]
        if changed:
            first = changed[0]
            found.append(f"policy of step {first}: {saved.phases[first - 1]} then, {self.phases[first - 1]} now")
        if step > len(self.phases):
            found.append(f"steps: {step} taken, {len(self.phases)} wanted")
        return found


@dataclass(frozen=True)
class RunState:
    """SAVE/iter_*/run_state.json: where the run stands, and the converted checkpoint that it started from, if any.

    `ended` are the steps before which --internal-stop ended a phase of the schedule that `identity` names;
    `phase_start` the numbers of the first step of the internal phase that the run is in, if it is watched.
    """

    step: int
    identity: RunIdentity
    optimizer_steps: dict[str, int]
    converted: str | None = None
    ended: tuple[int, ...] = ()
    phase_start: PhaseNumbers | None = None

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Read FOLDER/run_state.json.

        Raises:
            UsageError: missing, broken, or of another schema.
        """
        path = folder / RUN_STATE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise UsageError(f"{path}: schema {content['schema']}; this version reads {SCHEMA}")
            identity = content["identity"]
            identity |= {name: tuple(identity[name]) for name in ("phases", "replay")}
            phase_start = content.get("phase_start")
            return cls(
                int(content["step"]),
                RunIdentity(**identity),
                content["optimizer_steps"],
                content["converted"],
                # Missing in a run of an earlier version.
                tuple(content.get("ended", ())),
                None if phase_start is None else PhaseNumbers(**phase_start),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: no run state that can be read ({type(error).__name__}: {error})") from error


def newest_checkpoint(save: str | Path) -> Path | None:
    """The newest whole iteration in a run's folder: an iteration gets its name when all its files are written."""
    found = [path for path in Path(save).glob("iter_*") if ITERATION.fullmatch(path.name)]
    whole = [path for path in found if (path / RUN_STATE).is_file()]
    return max(whole, key=lambda path: int(path.name.removeprefix("iter_")), default=None)


def layer_so_far(run: RunConfig) -> int | None:
    """The layer of the first internal phase of the run that --load names; None if there is no such run or phase.

    Raises:
        UsageError: its state cannot be read.
    """
    folder = None if run.load is None else newest_checkpoint(run.load)
    if folder is None:
        return None
    layers = (PolicySpec.parse(phase).layer for phase in RunState.read(folder).identity.phases)
    return next((layer for layer in layers if layer is not None), None)


@dataclass(frozen=True)
class Start:
    """Where a run begins: after step `done`, from the iteration `folder` (None: from its model).

    Attributes:
        converted: a converted checkpoint whose weights the run starts from.
        changes: what differs from the run in `folder`, and is accepted.
        ended: the steps before which a phase of the schedule was ended early.
        watch: over the internal phase that the run is in.
    """

    done: int = 0
    folder: Path | None = None
    state: RunState | None = None
    converted: Path | None = None
    changes: tuple[str, ...] = ()
    ended: tuple[int, ...] = ()
    watch: PhaseWatch | None = None


def find_start(run: RunConfig, identity: RunIdentity, watched: bool = True) -> Start:
    """What --load names: the newest whole checkpoint of a run, or a converted one.

    If --load and --save name the same folder and it is empty, the run starts at its beginning: one command line serves
    for the first start and for every restart.

    Args:
        watched: whether internal phases are watched; only then is the probe of the current one read.

    Raises:
        UsageError: nothing to load, or it is of another run and --allow-changed-run is not given.
    """
    if run.load is None:
        return Start()
    folder = newest_checkpoint(run.load)
    if folder is None:
        if run.continues and not (Path(run.load) / TRACKER).is_file():
            return Start()
        found = find_checkpoint(run.load)
        if not found.converted:
            raise UsageError(f"--load {run.load}: no whole checkpoint is there")
        return Start(converted=found.folder)
    state = RunState.read(folder)
    changes = identity.differences(state.identity, state.step)
    if changes and not run.allow_changed_run:
        raise UsageError(
            f"--load {run.load}: this is another run than the one there ({'; '.join(changes)}); give the same flags, "
            "or --allow-changed-run to go on"
        )
    converted = None if state.converted is None else Path(state.converted)
    if converted is not None and not converted.is_dir():
        raise UsageError(f"--load {run.load}: the run started from {converted}, which is gone; put it back")
    # Under --allow-changed-run the steps taken may be of another schedule: phases that ended there are not those here.
    same_so_far = identity.phases[: state.step] == state.identity.phases[: state.step]
    ended = state.ended if same_so_far else ()
    watch = None
    if watched and same_so_far and state.phase_start is not None:
        watch = PhaseWatch.read(folder.parent, state.phase_start)
    return Start(state.step, folder, state, converted, tuple(changes), ended, watch)


def cut_metrics(save: Path, step: int) -> None:
    """Remove the lines of metrics.jsonl after `step`: the run takes those steps again. Written beside and renamed.

    A run that begins again (step 0) is evaluated again before its first step too.
    """
    path = save / "metrics.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A kill can leave half a line at the end; its step is taken again.
        if not line.endswith("\n") or step == 0 or json.loads(line)["step"] > step:
            break
        kept.append(line)
    with new_file(path) as beside:
        beside.write_text("".join(kept), encoding="utf-8")
