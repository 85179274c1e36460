"""Environments of their own: for a peer, and for what a device would install."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.claims import CACHE
from federation.errors import HeadwaterError

INSTALL_S = 900.0


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment that holds what was asked for and nothing else, not even pip."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def installed_mb(self) -> float:
        """What was installed, compiled byte code included, in MB (1e6 bytes)."""
        files = [
            path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()
        ]
        return sum(path.stat().st_size for path in files) / 1e6

    @property
    def distributions(self) -> list[importlib.metadata.Distribution]:
        """The packages that were installed."""
        site = [str(path) for path in self.folder.glob("lib/python*/site-packages")]
        return list(importlib.metadata.distributions(path=site))

    def compile(self) -> None:
        """Compile all that is installed, as pip does by default."""
        _call([str(self.python), "-m", "compileall", "-q", str(self.folder / "lib")])

    def run(self, code: str) -> str:
        """What these lines of Python print, with nothing but this environment to import.

        Raises:
            HeadwaterError: they failed.
        """
        return _call([str(self.python), "-c", code], cwd=self.folder)

    def version(self, package: str) -> str:
        """The installed version of a package; empty if it is not there."""
        named = [each for each in self.distributions if each.name.lower() == package]
        return named[0].version if named else ""


def find_environment(name: str) -> Environment | None:
    """The cached environment of this name, if it was finished."""
    environment = Environment(CACHE / "venvs" / name)
    return environment if (environment.folder / "ready").exists() else None


def make_environment(
    name: str, requirements: Sequence[str], *, afresh: bool, is_compiled: bool = True
) -> Environment:
    """The environment of this name with these requirements, made if need be.

    Unless `is_compiled`, there is no byte code in it before it runs (pip's --no-compile).

    Raises:
        HeadwaterError: pip could not install them.
    """
    known = find_environment(name)
    if known is not None and not afresh:
        return known
    environment = Environment(CACHE / "venvs" / name)
    shutil.rmtree(environment.folder, ignore_errors=True)
    _call([sys.executable, "-m", "venv", "--without-pip", str(environment.folder)])
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(environment.python)]
    _call([*pip, "install", *([] if is_compiled else ["--no-compile"]), *requirements])
    (environment.folder / "ready").touch()
    return environment


def installed_closure_mb(requirement: str) -> float:
    """What a requirement and all it needs take in the running environment, in MB (1e6 bytes)."""
    found: dict[str, float] = {}
    seen: set[str] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        seen.add(str(wanted))
        package = importlib.metadata.distribution(wanted.name)
        found[package.name] = sum(_size(Path(str(f.locate()))) for f in package.files or []) / 1e6
        for line in package.requires or []:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            is_needed = needed.marker is None or any(map(needed.marker.evaluate, extras))
            if is_needed and str(needed) not in seen:
                waiting.append(needed)
    return sum(found.values())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _call(command: list[str], cwd: Path | None = None) -> str:
    writes_byte_code = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=INSTALL_S,
            cwd=cwd,
            env=writes_byte_code,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise HeadwaterError(f"{command[0]} failed: {' | '.join(said[-3:])}") from error
    except subprocess.TimeoutExpired as error:
        raise HeadwaterError(f"{command[0]} took over {INSTALL_S:g} s") from error
    return done.stdout.decode()
