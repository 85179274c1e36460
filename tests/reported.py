"""Folders of runs for tests, written as a run writes them: result, attempts and fleet."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEADER = (
    "round", "place", "device", "status", "reason", "opened_s", "ended_s", "train_s", "energy_j",
    "bytes_up", "bytes_down",
)  # fmt: skip
COUNTED, LOST, IN_VAIN = 2, 3, 4


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    rounds: int = 12,
    devices: int = 30,
    name: str = "fleet",
    namer: Callable[[int], str] = "d{:02d}".format,
    reason: str = "its link was lost",
) -> dict[str, Any]:
    """Draw a run from a seed and write its three files; gives what its result.json says."""
    draws = random.Random(seed)
    states = np.zeros((rounds, devices), np.uint8)
    attempts: list[tuple[object, ...]] = []
    rows = []
    now = 1.0
    for number in range(1, rounds + 1):
        fates = draws.choices((0, 1, COUNTED, LOST, IN_VAIN), (3, 2, 8, 2, 2), k=devices)
        states[number - 1] = fates
        ended = now + draws.uniform(8.0, 20.0)
        row = one_round(number, fates, (now, ended), namer, reason)
        for place, fate in enumerate(fates):
            if fate >= COUNTED:
                up = 1000 if fate == COUNTED else 0
                ends = (now, ended) if place else (now, "")
                status = {COUNTED: "received", LOST: "lost", IN_VAIN: "cancelled"}[fate]
                attempts.append(
                    (number, place, namer(place), status, reason, *ends, 0.5, 2.5, up, 1100)
                )
        rows.append(row)
        now = ended
    result = whole_result(rows, name, seed, now)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    with (folder / "attempts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *attempts])
    np.save(folder / "fleet.npy", states)
    return result


def one_round(
    number: int,
    fates: list[int],
    span_s: tuple[float, float],
    namer: Callable[[int], str],
    reason: str,
) -> dict[str, Any]:
    counted = [namer(place) for place, fate in enumerate(fates) if fate == COUNTED]
    is_closed = bool(counted) and number != 3
    words = {LOST: ("lost", reason), IN_VAIN: ("cancelled", "its round has closed")}
    asked = sum(fate >= COUNTED for fate in fates)
    return {
        "round": number,
        "status": "closed" if is_closed else "abandoned",
        "opened_s": span_s[0],
        "closed_s": span_s[1],
        "asked": asked,
        "not_asked": {"not available in this round": fates.count(0)},
        "devices": counted if is_closed else [],
        "dropped": [
            {"device": namer(place), "status": words[fate][0], "reason": words[fate][1]}
            for place, fate in enumerate(fates)
            if fate in words
        ],
        "interruptions": fates.count(LOST),
        "bytes_up": 1000 * len(counted),
        "bytes_down": 1100 * asked,
        "training_loss": 1.0 / number,
        "accuracy": 0.95 - 0.8 / (number + 1) if is_closed else None,
        "loss": 2.0 / number if is_closed else None,
        "energy_j": 2.5 * asked,
        "train_s": 0.5 * asked,
    }


def whole_result(rows: list[dict[str, Any]], name: str, seed: int, now: float) -> dict[str, Any]:
    reasons = [f"{d['status']}: {d['reason']}" for row in rows for d in row["dropped"]]
    return {
        "status": "finished",
        "reason": f"all {len(rows)} rounds are done",
        "seed": seed,
        "virtual_s": now,
        "rounds": rows,
        "accuracy": rows[-1]["accuracy"] if rows else None,
        "initial_accuracy": 0.1,
        "updates": sum(len(row["devices"]) for row in rows),
        "refused": {"too-late": 3},
        "letters_refused": 0,
        "drop_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "wire_up_bytes": 123456,
        "wire_down_bytes": 234567,
        "model_sha256": "ab" * 32,
        "run": {
            "name": name,
            "rounds": len(rows),
            "method": {"name": "fedavg", "params": {}},
            "training": {"learning_rate": 0.1, "epochs": 1 + seed},
        },
        "versions": {"headwater": "0.1.0", "numpy": "2.4.6"},
    }
