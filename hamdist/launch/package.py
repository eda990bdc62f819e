"""The package of a launched run: the settings, the job's specification, and the user's code.

hamdist, torch and Ray are installed on the cluster's hosts (`hamdist doctor --cluster` compares);
data sets are not sent either: `stream.path` is a path there.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ValidationError

from hamdist.config import EngineKind, OptimizerSettings, Settings, describe, to_yaml
from hamdist.errors import SettingsError
from hamdist.loading import load_function

SETTINGS = "settings.yaml"
SPEC = "spec.json"
SNAPSHOTS = "snapshots"
INSTALLED = {"site-packages", "dist-packages"}
APART = ("__main__", "hamdist")  # modules beside a user's that do not travel
MOST_BYTES = 100 * 2**20


class JobSpec(BaseModel, extra="forbid", frozen=True):
    """Specification of a job.

    Attributes:
        model, stream: 'package.module:function', in code that is sent along or installed there.
        storage: a folder that all hosts see, where the results stay.
        most: bytes of the largest file that is sent back.
        snapshots: where the run keeps them; resume: those that it begins with.
        live: the interface and port on which a live run is served; None for a run of the stream.
    """

    id: str
    model: str | None
    storage: str | None
    most: int
    stream: str | None = None
    snapshots: str | None = None
    resume: str | None = None
    live: tuple[str, int] | None = None

    @property
    def own_snapshots(self) -> bool:
        """Return True if the snapshots lie in the run's own folder of the storage."""
        return self.storage is not None and self.snapshots == snapshots_in(self.storage, self.id)

    @property
    def called(self) -> str | None:
        """Return the argument of `--resume` that continues from this run's snapshots."""
        return self.id if self.own_snapshots else self.snapshots


def snapshots_in(storage: str, id_: str) -> str:
    """Return the default folder of a run's snapshots."""
    return f"{storage.rstrip('/')}/{id_}/{SNAPSHOTS}"


def on_ray(settings: Settings) -> Settings:
    """Return `settings` for a run on a cluster. Raises SettingsError if they name another one."""
    if settings.engine.address is not None:
        raise SettingsError(
            f"engine.address {settings.engine.address!r}: --cluster says where a launched run "
            "goes; leave one of them out"
        )
    return settings.changed(engine={"kind": EngineKind.RAY})


@contextmanager
def packed(settings: Settings, spec: JobSpec) -> Iterator[Path]:
    """Make the package in a temporary folder, which exists inside.

    The modules of `spec` have been imported; those of rules, level and optimiser are now.
    """
    files = _own_names(settings)
    for name, field in files.items():
        load_function(field, name)
    with TemporaryDirectory(prefix="hd-package-") as name:
        folder = Path(name)
        (folder / SETTINGS).write_text(to_yaml(settings, only_set=True), "utf-8")
        (folder / SPEC).write_text(spec.model_dump_json(), "utf-8")
        named = {"--model": spec.model, "--stream": spec.stream}
        code = {own_code(name): option for option, name in named.items() if name is not None}
        code |= {own_code(name): field for name, field in files.items()}
        code |= {beside: option for path, option in code.items() for beside in _beside(path)}
        for path, option in code.items():
            if path is not None:
                _copy(path, folder, option)
        yield folder


def in_package(settings: Settings) -> Settings:
    """Return the settings of a package, which name rules, level and optimiser as the user has named
    them, with the names of modules in its folder."""
    rules = {
        pattern: {**rule, "name": named_there(str(rule.get("name")))}
        if isinstance(rule, dict)
        else named_there(rule)
        for pattern, rule in settings.learning.rules.items()
    }
    level, optimizer = settings.locality.level, settings.learning.optimizer
    if optimizer is not None:
        optimizer = optimizer.model_copy(update={"name": named_there(optimizer.name)})
    return with_names(settings, rules, None if level is None else named_there(level), optimizer)


def with_names(
    settings: Settings,
    rules: dict[str, Any],
    level: str | None,
    optimizer: OptimizerSettings | None,
) -> Settings:
    """Return `settings` with rules, by pattern, a level and an optimiser of other names."""
    learning = {k: v for k, v in {"rules": rules, "optimizer": optimizer}.items() if v}
    sections = {"learning": learning, "locality": {} if level is None else {"level": level}}
    return settings.changed(**{name: fields for name, fields in sections.items() if fields})


def _own_names(settings: Settings) -> dict[str, str]:
    """Return the settings' fields by the rules, the level and the optimiser of the user's own that
    they name."""
    fields = {}
    for pattern, rule in settings.learning.rules.items():
        name = str(rule.get("name") if isinstance(rule, dict) else rule)
        if ":" in name:
            fields[name] = f"learning.rules.{pattern}"
    if settings.locality.level is not None:
        fields[settings.locality.level] = "locality.level"
    optimizer = settings.learning.optimizer
    if optimizer is not None and optimizer.is_own:
        fields[optimizer.name] = "learning.optimizer"
    return fields


def read_spec(folder: Path) -> JobSpec:
    """Read the job's specification. Raises SettingsError if the folder is no package."""
    try:
        return JobSpec.model_validate_json((folder / SPEC).read_text("utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{str(folder / SPEC)!r} cannot be read ({error.strerror}): hamdist launch makes it"
        ) from None
    except ValidationError as error:
        raise SettingsError(f"{SPEC}: {describe(error)}") from None


def named_there(name: str) -> str:
    """Return the name of `--model` or `--stream` in the job, whose package has the file."""
    where, _, function = name.rpartition(":")
    return f"{Path(where).stem}:{function}" if where.endswith(".py") else name


def own_code(name: str) -> Path | None:
    """Return the file, or the folder of the whole package, of the module that an option has named.

    None if it is installed among Python's packages, which are not sent.
    """
    top = named_there(name).partition(":")[0].partition(".")[0]
    module = sys.modules[top]
    file = getattr(module, "__file__", None)
    if file is None:  # a package without __init__.py
        file = next(iter(getattr(module, "__path__", [])), None)
        if file is None:
            return None
        path = Path(file).resolve()
    else:
        path = Path(file).resolve()
        path = path.parent if path.name == "__init__.py" else path
    installed = INSTALLED & set(path.parts)  # (of a user's or an outer environment, too)
    is_own = not installed and not path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())
    return path if is_own else None


def _beside(code: Path | None) -> set[Path]:
    """Return the user's other modules in the folder of a file that have been imported here: those
    that the file itself imports are among them."""
    if code is None or code.is_dir():
        return set()
    names = [name for name in sys.modules if "." not in name and name not in APART]
    paths = {path for name in names if (path := own_code(f"{name}:")) is not None}
    return {path for path in paths if path.parent == code.parent and path != code}


def _copy(code: Path, folder: Path, option: str) -> None:
    """Copy the code that `option` has named."""
    if code.name in (SETTINGS, SPEC):
        raise SettingsError(f"{option}: {str(code)!r}: give the module another name")
    size = sum(f.stat().st_size for f in code.rglob("*") if f.is_file()) if code.is_dir() else 0
    if size > MOST_BYTES:
        raise SettingsError(
            f"{option}: the package {str(code)!r} has {size / 2**20:.0f} MiB, and at most "
            f"{MOST_BYTES / 2**20:.0f} travel; install it on the cluster, or move its data away"
        )
    if code.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(code, folder / code.name, ignore=ignored)
    else:
        shutil.copy(code, folder / code.name)
