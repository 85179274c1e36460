"""TED beside one process, and beside expert and data parallelism alone: messages and memory."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.trainers_ted_ranks import (
    KINDS,
    TILE,
    WAYS,
    Found,
    alone,
    everything,
    on_ranks,
    state_bytes,
)
from cloud.trainers.parallel.mesh import Shape, rank_tables

MESHES = {"2x2": "tensor 2 x expert 2", "2x1x2": "tensor 2 x data 2"}
ERROR = 1e-5
BUDGET_BYTES = 16e9
DEEPSPEED: dict[str, set[tuple[int, ...]]] = {
    "tensor": {(n, n + 1) for n in range(0, 16, 2)},
    "expert": {(0, 2, 4, 6), (8, 10, 12, 14), (1, 3, 5, 7), (9, 11, 13, 15)},
    "data": {tuple(range(0, 16, 2)), tuple(range(1, 16, 2))},
    "expert_data": {(n, n + 8) for n in range(8)},
}
"""The groups of 16 ranks with tensor 2 and expert 4, as `deepspeed/utils/groups.py` has them."""


def measure(options: Options) -> list[Claim]:
    """A mixture of experts trained on four processes over gloo, as on one.

    Messages and bytes are counted where they are sent; memory is that of the tensors there are.
    """
    steps = 40 if options.is_quick else 200
    options.tell("one process")
    expected = alone(steps)
    options.tell("four processes")
    found = on_ranks(partial(everything, steps=steps), options.folder)
    options.tell("memory of larger meshes")
    claims = _message_claims(found[0]) + _answer_claims(found[0], expected, steps)
    return claims + _tile_claims(found) + _memory_claims(found) + [_group_claim()]


def _message_claims(found: Found) -> list[Claim]:
    """What dropping duplicates and keeping what collectives gave save, of neither."""
    claims = []
    before = found["2x2/neither/sent"].tolist()
    goals = {
        "keeping": (2 / 3, 2 / 3),
        "dropping": (1.0, 1 / 2),
        "both": (2 / 3, 1 / 3),
    }
    peer = "neither dropping duplicates nor keeping"
    for number, kind in enumerate(KINDS[:2]):
        calls = {way: int(found[f"2x2/{way}/calls"][number]) for way in WAYS}
        claims.append(
            claim(
                f"{kind}s of a layer and step, keeping",
                calls["keeping"],
                "",
                peer=peer,
                peer_value=calls["neither"],
                goal=4,
            )
        )
        for way, of_kinds in goals.items():
            sent = found[f"2x2/{way}/sent"].tolist()
            bytes_goal = of_kinds[number] * before[number]
            claims.append(
                claim(
                    f"{kind}: bytes of all ranks, {way}",
                    sent[number],
                    "B",
                    peer=peer,
                    peer_value=before[number],
                    goal=float(round(bytes_goal)),
                )
            )
    gathered = found["2x2/both/sent"].tolist()[2]
    name = "all-gather: bytes that dropping adds, with both"
    return [*claims, claim(name, gathered, "B", peer="all-to-all of neither", peer_value=before[1])]


def _answer_claims(found: Found, expected: Found, steps: int) -> list[Claim]:
    claims = []
    gradients = [name for name in expected if name.startswith("gradient/")]
    for mesh, words in MESHES.items():
        outputs = max(_error(found[f"{mesh}/{way}/out"], expected["out"]) for way in WAYS)
        worst = max(
            _error(found[f"{mesh}/{way}/{name}"], expected[name])
            for way in WAYS
            for name in gradients
        )
        for what, error in (("outputs", outputs), ("gradients", worst)):
            name = f"{words}: {what}, largest difference from one process, in all ways"
            claims.append(claim(name, error, "", goal=ERROR))
    apart = ((found["losses"] - expected["losses"]).abs() / expected["losses"]).max()
    name = f"losses of {steps} steps, largest relative difference from one process"
    claims.append(claim(name, float(apart), "", goal=0.01))
    name = "a step with both: all that one of four ranks does"
    mine_ms, alone_ms = (1e3 * float(each["cpu_s"]) / steps for each in (found, expected))
    return [*claims, claim(name, mine_ms, "CPU ms", peer="one process", peer_value=alone_ms)]


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _tile_claims(found: list[Found]) -> list[Claim]:
    claims = []
    for n_experts in (2, 4, 8):
        tiled, whole = found[0][f"tiles/{n_experts}/buffer"].tolist()
        claims.append(
            claim(
                f"{n_experts} experts: float32 buffer of a step in tiles of {TILE}",
                tiled,
                "B",
                peer="without tiles",
                peer_value=whole,
                goal=4 * TILE,
            )
        )
    differing = sum(int(rank[f"tiles/{n}/differ"]) for rank in found for n in (2, 4, 8))
    name = "ranks and models whose state differs in a bit from that without tiles, of 12"
    return [*claims, claim(name, differing, "", goal=0)]


def _memory_claims(found: list[Found]) -> list[Claim]:
    """Bytes of a rank against the paper's model, and the largest base model that they allow.

    The paper has experts in every second layer: 4 NP (1/Gt + (E + 2)/G) bytes a rank (Eq. 5). Our
    models have them in every layer, so that of a base model 2/3 become experts, E times, and 1/3
    do not: by the same count (4/Gt bytes for 16-bit parameters and gradients, 12 for the sharded
    float32 state) that is 4 NP (1/Gt + (2E + 1)/G), with as many ranks as experts in a group.
    """
    claims = []
    for ranks, tensor, experts in ((4, 1, 4), (4, 2, 2), (64, 2, 16), (128, 4, 16)):
        kept, base = state_bytes(ranks, tensor, experts)
        formula = 4 * base * (1 / tensor + (2 * experts + 1) / ranks)
        name = f"{ranks} ranks, tensor {tensor}, {experts} experts: state of a rank"
        peer = "4 NP (1/Gt + (2E + 1)/G)"
        goal = float(round(1.05 * formula))
        claims.append(claim(name, kept, "B", peer=peer, peer_value=formula, goal=goal))
    counted, _ = state_bytes(4, 2, 2)
    most = max(int(rank["kept_bytes"]) for rank in found)
    peer = "the same rank counted alone"
    claims.append(claim("4 ranks, tensor 2: largest of the four processes", most, "B", peer=peer,
                        peer_value=counted, goal=counted))  # fmt: skip
    for ranks, tensor in ((64, 4), (128, 4), (512, 4)):
        ours, base = state_bytes(ranks, tensor, 16)
        theirs, _ = state_bytes(ranks, 1, 16)
        sizes = [BUDGET_BYTES * base / kept / 1e9 for kept in (ours, theirs)]
        name = f"{ranks} ranks, tensor {tensor}, 16 experts: largest base model in 16 GB a rank"
        claims.append(claim(name, sizes[0], "10^9 parameters", peer="expert + data parallel alone",
                            peer_value=sizes[1]))  # fmt: skip
    return claims


def _group_claim() -> Claim:
    tables = rank_tables(Shape(tensor=2, expert=4, expert_data=2))
    apart = [name for name, groups in DEEPSPEED.items() if set(tables[name]) != groups]
    return claim("16 ranks: kinds of groups unlike DeepSpeed's, of 4", len(apart), "", goal=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main("trainers_ted", measure)
