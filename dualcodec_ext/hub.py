"""Where a checkpoint is: a directory, a file, or a repository on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .config import DualCodecConfig
from .errors import DualCodecError, need_extra

_DEFAULT_REPO = "amphion/dualcodec"
DEFAULT_SOURCE = f"hf://{_DEFAULT_REPO}"
RELEASED_FILES = {
    "12hz_v1": "dualcodec_12hz_16384_4096.safetensors",
    "25hz_v1": "dualcodec_25hz_16384_1024.safetensors",
}
# Weights that the package brings; their settings are the preset's.
BUNDLED = {"tiny": Path(__file__).parent / "weights" / "tiny.safetensors"}
_CONFIG_FILE = "config.json"

_log = logging.getLogger(__name__)


class HubName(NamedTuple):
    """A place on the hub: repository, the path inside it (or ""), and a revision (None: the newest)."""

    repo: str
    inside: str
    revision: str | None

    @classmethod
    def parse(cls, source: str | Path) -> HubName | None:
        """Read `hf://owner/name[@revision][/path]` or `owner/name`; None if neither, or if it is a local path.

        Without hf:// a name that ends in .safetensors is a file, there or missing: `ckpts/x.safetensors`.
        """
        text = str(source)
        explicit = text.startswith("hf://")
        local = isinstance(source, Path) or text.endswith(".safetensors") or Path(text).expanduser().exists()
        if local and not explicit:
            return None
        # Without hf:// a path inside can't be told from a local one.
        body = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?"
        hit = re.fullmatch(body + ("(?:/(.+?))?/*" if explicit else "()"), text.removeprefix("hf://"))
        if hit is None:
            if explicit:
                raise DualCodecError(f"checkpoint: a hub path must be hf://owner/name, got {text}")
            return None
        return cls(hit[1], hit[3] or "", hit[2])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.inside}" if self.inside else "")


def resolve_pretrained(source: str | Path, weights: str | Path | None = None) -> tuple[DualCodecConfig, Path]:
    """Find a checkpoint and the settings of its model.

    Args:
        source: a preset's name; or a safetensors file, a directory or a hub name that holds a checkpoint. The
            settings then follow from a released file's name, or from the config.json beside the file. Where
            both released files are there, 12hz_v1 is taken.
        weights: for a preset, where its checkpoint is, as in `find_checkpoint` (None: the released one).

    Returns:
        The settings and the file; one that a hub name stands for has been downloaded, or was in the cache.

    Raises:
        DualCodecError: there is none.
        MissingExtraError: a hub name without huggingface_hub installed.
    """
    if str(source) in DualCodecConfig.presets():
        preset = str(source)
        if weights is None and preset in BUNDLED:
            return DualCodecConfig.preset(preset), bundled_checkpoint(preset)
        if weights is None and preset not in RELEASED_FILES:
            raise DualCodecError(
                f"checkpoint: {preset} has no released weights: weights must be a file or directory, got None"
            )
        return DualCodecConfig.preset(preset), find_checkpoint(weights or DEFAULT_SOURCE, preset)
    if weights is not None:
        raise DualCodecError(
            f"checkpoint: weights goes with a preset's name ({', '.join(DualCodecConfig.presets())}), "
            f"got {source} and {weights}"
        )
    hub = HubName.parse(source)
    if hub is not None:
        return _resolve_on_hub(hub)
    path = Path(source).expanduser()
    if path.is_file():
        return _settings_of(path), path
    if not path.is_dir():
        raise DualCodecError(
            f"checkpoint: source must be a preset ({', '.join(DualCodecConfig.presets())}), a directory, "
            f"a safetensors file or a hub name, got {source}"
        )
    for preset, name in RELEASED_FILES.items():
        if (path / name).is_file():
            _log.info("checkpoint: %s holds %s, taken as %s", path, name, preset)
            return DualCodecConfig.preset(preset), path / name
    files = _checkpoints_in(path)
    if len(files) != 1:
        raise DualCodecError(
            f"checkpoint: {path} must hold {' or '.join(RELEASED_FILES.values())}, "
            f"or one safetensors file and its {_CONFIG_FILE}, got {_listed(files)}"
        )
    return _settings_of(files[0]), files[0]


def bundled_checkpoint(preset: str) -> Path:
    """Return the weights file that the package brings for a preset; raise DualCodecError where it is not there."""
    path = BUNDLED[preset]
    if not path.is_file():
        raise DualCodecError(f"checkpoint: {path} must be there, the package is not whole: install it again")
    return path


def find_checkpoint(source: str | Path, preset: str) -> Path:
    """Find the safetensors file of a preset.

    Args:
        source: the file; or a directory that holds it under its released name (for a preset that was not
            released, the only safetensors file there); or `hf://owner/name[@revision][/path]`, or
            `owner/name` if nothing local has that name.
        preset: the preset's name.

    Returns:
        The file, downloaded if it is not in the hub's cache yet.

    Raises:
        DualCodecError: there is none.
        MissingExtraError: a hub name without huggingface_hub installed.
    """
    released = RELEASED_FILES.get(preset)
    hub = HubName.parse(source)
    if hub is not None:
        if hub.inside.endswith(".safetensors"):
            return _fetch(hub, hub.inside)
        if released is None:
            raise DualCodecError(
                f"checkpoint: {preset} was not released: its source must be a file or directory, got {hub}"
            )
        return _fetch(hub, f"{hub.inside}/{released}".lstrip("/"))
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise DualCodecError(
            f"checkpoint: {source} must be a directory or a safetensors file, it does not exist{_how(released, source)}"
        )
    if released is not None:
        if (path / released).is_file():
            return path / released
        raise DualCodecError(
            f"checkpoint: {path} must hold {released}, got {_listed(_checkpoints_in(path))}{_how(released, path)}"
        )
    files = [file for file in _checkpoints_in(path) if file.name not in RELEASED_FILES.values()]
    if len(files) != 1:
        raise DualCodecError(f"checkpoint: {path} must hold one safetensors file for {preset}, got {_listed(files)}")
    return files[0]


def find_file(source: str | Path, name: str) -> Path:
    """Find a file by name in a directory or a hub repository.

    Args:
        source: the directory, or a hub name as in `find_checkpoint`.
        name: the file's name.

    Returns:
        The file, downloaded if it is not in the hub's cache yet.

    Raises:
        DualCodecError: there is none.
        MissingExtraError: a hub name without huggingface_hub installed.
    """
    hub = HubName.parse(source)
    if hub is not None:
        return _fetch(hub, f"{hub.inside}/{name}".lstrip("/"))
    path = Path(source).expanduser() / name
    if not path.is_file():
        raise DualCodecError(f"checkpoint: {source} must be a directory that holds {name}, it does not")
    return path


def find_directory(source: str | Path, patterns: list[str]) -> Path:
    """Find a directory; of a hub repository, fetch the files that match.

    Args:
        source: the directory, or a hub name as in `find_checkpoint`.
        patterns: globs of the files that are needed, so that nothing else is downloaded.

    Returns:
        The directory.

    Raises:
        DualCodecError: there is none.
        MissingExtraError: a hub name without huggingface_hub installed.
    """
    hub = HubName.parse(source)
    if hub is None:
        path = Path(source).expanduser()
        if not path.is_dir():
            raise DualCodecError(f"checkpoint: {source} must be a directory, it does not exist")
        return path
    client = _client(hub)
    wanted = [f"{hub.inside}/{pattern}".lstrip("/") for pattern in patterns]
    try:
        with _quiet():
            root = client.snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted)
    except Exception as error:  # the client's own, its HTTP library's, the disk's
        _refuse_download(hub, "", error)
    return Path(root) / hub.inside


def _resolve_on_hub(hub: HubName) -> tuple[DualCodecConfig, Path]:
    if hub.inside.endswith(".safetensors"):
        path = _fetch(hub, hub.inside)
        folder, _, name = hub.inside.rpartition("/")
        if name not in RELEASED_FILES.values():
            _fetch(hub, f"{folder}/{_CONFIG_FILE}".lstrip("/"))
        return _settings_of(path), path
    for preset, name in RELEASED_FILES.items():
        found = _fetch_if_there(hub, f"{hub.inside}/{name}".lstrip("/"))
        if found is not None:
            _log.info("checkpoint: %s holds %s, taken as %s", hub, name, preset)
            return DualCodecConfig.preset(preset), found
    raise DualCodecError(f"checkpoint: {hub} must hold {' or '.join(RELEASED_FILES.values())}, it has neither")


def _settings_of(file: Path) -> DualCodecConfig:
    for preset, name in RELEASED_FILES.items():
        if file.name == name:
            return DualCodecConfig.preset(preset)
    beside = file.parent / _CONFIG_FILE
    try:
        return DualCodecConfig.from_json(beside)
    except OSError:
        raise DualCodecError(
            f"checkpoint: {file} must have a released file's name or a {_CONFIG_FILE} beside it "
            "(a preset's name goes with weights=FILE)"
        ) from None
    except (TypeError, ValueError) as error:
        raise DualCodecError(f"checkpoint: {beside}: {error}") from None


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _listed(files: list[Path]) -> str:
    return ", ".join(file.name for file in files) or "no safetensors file"


def _how(released: str | None, where: str | Path) -> str:
    if released is None:
        return ""
    folder = Path(where).parent if Path(where).suffix == ".safetensors" else where
    return f" (to have it: hf download {_DEFAULT_REPO} {released} --local-dir {folder})"


def _client(hub: HubName) -> Any:
    need_extra("huggingface_hub", "hub", str(hub))
    import huggingface_hub

    return huggingface_hub


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the client's lines about its retries: what came of them is told in one line of ours."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fetch(hub: HubName, file: str) -> Path:
    client = _client(hub)
    try:
        with _quiet():
            return Path(client.hf_hub_download(hub.repo, file, revision=hub.revision))
    except Exception as error:  # the client's own, its HTTP library's, the disk's
        _refuse_download(hub, file, error)


def _fetch_if_there(hub: HubName, file: str) -> Path | None:
    client = _client(hub)
    try:
        with _quiet():
            return Path(client.hf_hub_download(hub.repo, file, revision=hub.revision))
    except Exception as error:
        # To the client being offline is a kind of "no such entry", yet it says nothing about the repository.
        errors = client.utils
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        _refuse_download(hub, file, error)


def _refuse_download(hub: HubName, file: str, error: Exception) -> NoReturn:
    lines = str(error).strip().splitlines()
    what = f"{file} of {hub.repo}" if file else hub.repo
    command = f"hf download {hub.repo} {file}".strip()
    raise DualCodecError(
        f"checkpoint: {what} could not be fetched from the hub: "
        f"{lines[0] if lines else type(error).__name__} "
        f"(where there is a network: {command} --local-dir DIR, then give DIR)"
    ) from error
