"""The errors of this package: each is also the builtin that a caller expects."""

from __future__ import annotations

import importlib
from types import ModuleType


class MendError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(MendError, ValueError):
    """A setting has an impossible value."""


class ShapeError(MendError, ValueError):
    """A tensor has another shape than the base model or the config asks for."""


class UnsupportedModelError(MendError, ValueError):
    """A model lacks what distilling or answering needs."""


class DataError(MendError, ValueError):
    """Demonstrations, tasks or texts are not in the expected form."""


class CheckpointError(MendError, OSError):
    """Something saved cannot be read, written or used with this model."""


class HubError(MendError, OSError):
    """The Hub refused what was asked of it, or could not be reached."""


class TrainingError(MendError, FloatingPointError):
    """A training went astray: a loss or a weight is not a finite number."""


class MissingExtraError(MendError, ImportError):
    """An optional package is not installed."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Return an optional module.

    Args:
        module: Its import name.
        extra: The extra of mend_hf that installs it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(
            f'Expected the package {error.name!r}, which is not installed: run pip install "mend_hf[{extra}]".',
            name=error.name,
        ) from error
