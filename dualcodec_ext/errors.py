"""What the package raises; every message is one line that says what is needed and what came."""

import importlib.util


class DualCodecError(ValueError):
    """A wrong argument, setting or file."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


class MissingExtraError(ImportError):
    """A feature needs a package of an optional extra that is not installed."""


def need_extra(package: str, extra: str, what: str) -> None:
    """Raise MissingExtraError unless `package` can be imported.

    Args:
        package: the import name of what is needed.
        extra: the extra of dualcodec-ext that installs it.
        what: the call that needs it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{what} needs {package}: pip install 'dualcodec-ext[{extra}]'")
