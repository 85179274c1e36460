"""The expert layer beside its peers and the roofline: CPU time, temporary memory, 8 bits."""

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.moe_layer_measuring import (
    EIGHT_BIT,
    EINSUM,
    OURS,
    PADDED,
    PLAIN,
    Case,
    Found,
    measure_case,
    one_thread,
)

FAR_WASTE = 12.0
"""From this waste on static gating must be five times slower."""

FULL = (
    Case(1024, 8, 768, 2048, "swiglu", share=0.85),
    Case(64, 8, 768, 2048, "swiglu", share=0.5),
    Case(1024, 16, 512, 1536, "swiglu", share=0.85),
    Case(1024, 16, 768, 3072, "relu", share=0.85, is_static=True),
    Case(1024, 128, 512, 2048, "relu", share=0.65),
    Case(1024, 128, 256, 512, "relu", is_static=True),
    Case(64, 128, 512, 2048, "relu", share=0.5, is_static=True),
    Case(1024, 16, 512, 2048, "relu", top_k=1, share=0.85),
    Case(64, 128, 512, 2048, "relu", top_k=1, share=0.5),
)
QUICK = (
    Case(1024, 8, 512, 1024, "swiglu", share=0.85),
    Case(512, 64, 256, 512, "relu", is_static=True),
    Case(64, 32, 512, 2048, "relu", top_k=1, share=0.5),
)


def measure(options: Options) -> list[Claim]:
    """One layer beside transformers, ONNX Runtime, static gating and the per-expert roofline.

    Times are CPU time of one thread, the least of interleaved rounds. The roofline is the sum
    over active experts of max(bytes / stream rate, operations / best dense rate), both rates
    measured in the same rounds. Static gating has room for the largest load: it drops nothing.
    """
    claims: list[Claim] = []
    with one_thread():
        for case in QUICK if options.is_quick else FULL:
            options.tell(case.name)
            claims += claims_of(measure_case(case, budget_s=3 if options.is_quick else 15))
    return claims


def claims_of(found: Found) -> list[Claim]:
    """The figures of a case as claims, in microseconds of CPU a token."""
    case, a_token = found.case, 1e6 / found.case.tokens
    ours = found.seconds[OURS] * a_token
    roofline = found.roofline_s * a_token
    peers = {
        name: seconds * a_token
        for name, seconds in found.seconds.items()
        if name != OURS and not name.startswith(EIGHT_BIT)
    }
    best = min(peers, key=lambda name: peers[name])
    claims = [
        claim(
            case.name,
            ours,
            "µs/token",
            peer="per-expert roofline",
            peer_value=roofline,
            goal=None if case.share is None else roofline / case.share,
        )
    ]
    for name, theirs in peers.items():
        is_static = name in (EINSUM, PADDED)
        goal = theirs if name == best else None
        if name == EINSUM and found.waste >= FAR_WASTE:
            goal = theirs / 5
        said = f"{name}, waste {found.waste:.1f}" if is_static else name
        claims.append(claim(case.name, ours, "µs/token", peer=said, peer_value=theirs, goal=goal))
    return claims + _memory_claims(found) + _eight_bit_claims(found)


def _memory_claims(found: Found) -> list[Claim]:
    is_large = found.case.n_experts >= 128
    return [
        claim(
            f"{found.case.name}: temporary memory",
            found.temporary_mb[OURS],
            "MB",
            peer=name,
            peer_value=theirs,
            goal=theirs / 20 if name == EINSUM and is_large else None,
        )
        for name, theirs in found.temporary_mb.items()
        if name != OURS
    ]


def _eight_bit_claims(found: Found) -> list[Claim]:
    a_token = 1e6 / found.case.tokens
    plain = found.seconds[PLAIN] * a_token
    eight = {n: s * a_token for n, s in found.seconds.items() if n.startswith(EIGHT_BIT)}
    best = min(eight, key=lambda name: eight[name], default="")
    factor = 4 if found.case.is_decode else 2
    return [
        claim(
            f"{found.case.name}: {name}, error {found.errors[name]:.1%}",
            spent,
            "µs/token",
            peer=PLAIN,
            peer_value=plain,
            goal=plain / factor if name == best else None,
        )
        for name, spent in eight.items()
    ]


if __name__ == "__main__":
    main("moe_layer", measure)
