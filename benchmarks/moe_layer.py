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
    Case(1024, 128, 512, 2048, "relu", share=0.65, is_static=True),
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
    """The figures of a case as claims; times are in microseconds a token."""
    case, ours_s = found.case, found.seconds[OURS]
    a_token = 1e6 / case.tokens
    claims = [
        claim(
            f"{case.name}: times the roofline",
            ours_s / found.roofline_s,
            "x",
            peer="per-expert roofline, µs/token",
            peer_value=found.roofline_s * a_token,
            goal=None if case.share is None else round(1 / case.share, 2),
        )
    ]
    exact = {
        name: seconds
        for name, seconds in found.seconds.items()
        if name != OURS and not name.startswith(EIGHT_BIT)
    }
    best = min(exact, key=lambda name: exact[name])
    for name, seconds in exact.items():
        is_far_static = name == EINSUM and found.waste >= FAR_WASTE
        goal = 0.2 if is_far_static else 1.0 if name == best else None
        waste = f" (waste {found.waste:.1f})" if name in (EINSUM, PADDED) else ""
        claims.append(
            claim(
                f"{case.name}: beside {name}{waste}",
                ours_s / seconds,
                "x",
                peer="µs/token",
                peer_value=seconds * a_token,
                goal=goal,
            )
        )
    return claims + _memory_claims(found) + _eight_bit_claims(found)


def _memory_claims(found: Found) -> list[Claim]:
    if not found.temporary_mb:
        return []
    ours = found.temporary_mb[OURS]
    return [
        claim(
            f"{found.case.name}: temporary memory",
            ours,
            "MB",
            peer=f"{name}, MB",
            peer_value=other,
            goal=other / 20 if name == EINSUM and found.case.n_experts >= 128 else None,
        )
        for name, other in found.temporary_mb.items()
        if name != OURS
    ]


def _eight_bit_claims(found: Found) -> list[Claim]:
    plain_s = found.seconds[PLAIN]
    eight = {n: s for n, s in found.seconds.items() if n.startswith(EIGHT_BIT)}
    best = min(eight, key=lambda name: eight[name], default="")
    goal = 0.25 if found.case.is_decode else 0.5
    return [
        claim(
            f"{found.case.name}: {name} (error {found.errors[name]:.2%})",
            seconds / plain_s,
            "x",
            peer=f"{PLAIN}, µs/token",
            peer_value=plain_s * 1e6 / found.case.tokens,
            goal=goal if name == best else None,
        )
        for name, seconds in eight.items()
    ]


if __name__ == "__main__":
    main("moe_layer", measure)
