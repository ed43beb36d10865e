"""The built-in losses and advantage estimators, found by listing their folders: a new one is a new file there.

Nothing here, or at the top of those files, imports torch: the command line reads names and flags from them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import field, make_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group
from megatron_bupo.user_code import UserFunction, fingerprint

if TYPE_CHECKING:
    from megatron_bupo.rl.advantage import Estimator
    from megatron_bupo.rl.loss import Loss


@functools.cache
def _modules(folder: str) -> dict[str, ModuleType]:
    """NAME -> module, for the files of one folder of rl/."""
    package = importlib.import_module(f"megatron_bupo.rl.{folder}")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]
    return {module.NAME: module for module in modules}


def loss_names() -> tuple[str, ...]:
    """What --loss can be, beside FILE.py:function."""
    return tuple(_modules("losses"))


def estimator_names() -> tuple[str, ...]:
    """What --advantage-estimator can be, beside FILE.py:function."""
    return tuple(_modules("estimators"))


def estimator(name: str) -> ModuleType | None:
    """The module of a built-in estimator; None for a function of the user's."""
    return _modules("estimators").get(name)


def _field(name: str) -> str:
    return name.replace("-", "_")


if TYPE_CHECKING:

    class LossFlags(Group):
        """The flags of every built-in loss, each as a group under the name of the loss with _ for -."""
else:
    LossFlags = make_dataclass(
        "LossFlags",
        [
            (_field(name), module.Flags, field(default_factory=module.Flags))
            for name, module in _modules("losses").items()
        ],
        bases=(Group,),
        frozen=True,
    )


def load_loss(text: str, flags: LossFlags) -> Loss:
    """What --loss says; a function of the user's has no flags.

    Raises:
        UsageError: a file of the user's that cannot be loaded.
    """
    module = _modules("losses").get(text)
    if module is not None:
        return functools.partial(module.loss, flags=getattr(flags, _field(text)))
    return _load_function("--loss", text, loss_names())  # type: ignore[no-any-return]


def load_estimator(text: str) -> Estimator:
    """What --advantage-estimator says. Raises UsageError as `load_loss`."""
    module = estimator(text)
    if module is not None:
        return module.advantages  # type: ignore[no-any-return]
    return _load_function("--advantage-estimator", text, estimator_names())  # type: ignore[no-any-return]


def loss_fingerprint(text: str) -> str:
    """What --loss says, to tell whether it is the same in another start: a function with the hash of its file."""
    return fingerprint("--loss", text, "inputs", loss_names())


def estimator_fingerprint(text: str) -> str:
    """What --advantage-estimator says, likewise."""
    return fingerprint("--advantage-estimator", text, "inputs", estimator_names())


def _load_function(flag: str, text: str, names: tuple[str, ...]) -> Any:
    function = UserFunction.parse(flag, text, "inputs", names)
    try:
        return function.load()
    except UsageError as error:
        raise UsageError(f"{flag} {text}: {error}") from error
