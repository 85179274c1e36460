"""The documents say what the code does, file by file and letter by letter."""

import re
from pathlib import Path

import msgspec

from federation.protocol import messages as m
from federation.protocol.topics import ROUTES

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "federation", "edge_agent", "cloud", "twin", "optimizer", "moe_serving", "simulations",
    "benchmarks",
)  # fmt: skip


def test_the_readme_maps_every_file() -> None:
    """Each module of each package has its line in the README's map, and no line is stale."""
    there = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    readme = (ROOT / "README.md").read_text()

    assert _mapped(readme) == there


def test_the_protocol_document_names_every_letter() -> None:
    """Each letter stands in docs/protocol.md with its topic, quality, retention and fields."""
    document = (ROOT / "docs" / "protocol.md").read_text()
    missing = [row for letter in ROUTES if (row := _row(letter)) not in document]

    assert not missing, "\n".join(["docs/protocol.md lacks:", *missing])


def test_every_rule_a_test_cites_is_in_the_semantics() -> None:
    """A rule that code or tests cite as `semantics N` is written down under that number."""
    rules = set(re.findall(r"^(\d+)\. ", (ROOT / "docs" / "semantics.md").read_text(), re.M))
    cited = {
        number
        for folder in (*PACKAGES, "tests")
        for file in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"semantics (\d+)", file.read_text())
    }

    assert cited
    assert cited <= rules


def _mapped(readme: str) -> set[str]:
    """The paths in the map: a folder's line ends in `/`, its files stand indented below it."""
    block = re.search(r"```text\n(federation/.*?)```", readme, re.S)
    assert block is not None
    paths, folders = set(), [""]
    for line in block.group(1).splitlines():
        if not (found := re.match(r"( *)(\S+)", line)):
            continue
        depth = len(found.group(1)) // 2
        name = found.group(2)
        folders = folders[: depth + 1]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        elif name.endswith(".py"):
            paths.add(folders[-1] + name)
    return paths


def _row(letter: type[m.AnyLetter]) -> str:
    route = ROUTES[letter]
    fields = ", ".join(f"`{field.name}`" for field in msgspec.structs.fields(letter))
    topic = re.sub(r"\{0\.(\w+)\}", r"<\1>", route.topic)
    keeps = "yes" if route.retain else "no"
    expiry = f"{route.expiry_s} s" if route.expiry_s else "-"
    return f"| {letter.__name__} | `{topic}` | {route.qos} | {keeps} | {expiry} | {fields} |"
