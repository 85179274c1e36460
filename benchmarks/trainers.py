"""The hub's trainers: all that `trainers_samo`, `trainers_ted` and `trainers_freezing` measure."""

from collections.abc import Callable
from dataclasses import replace

import msgspec

from benchmarks import trainers_freezing, trainers_samo, trainers_ted
from benchmarks.claims import Claim, Options, main

PARTS: dict[str, Callable[[Options], list[Claim]]] = {
    "SAMO": trainers_samo.measure,
    "TED": trainers_ted.measure,
    "freezing": trainers_freezing.measure,
}


def measure(options: Options) -> list[Claim]:
    """Pruned, frozen and three-way parallel training, each beside its peers, one after another."""
    claims = []
    for part, measure_part in PARTS.items():
        folder = options.folder / part
        folder.mkdir()
        of_part = measure_part(replace(options, folder=folder))
        claims += [msgspec.structs.replace(each, name=f"{part}: {each.name}") for each in of_part]
    return claims


if __name__ == "__main__":
    main("trainers", measure)
