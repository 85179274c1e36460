import msgspec

from cloud.config import MethodChoice, ModelChoice
from federation.learning.costs import BYTES_PER_ENTRY, count_parameters
from tests.real import digits_plan, digits_shards, real_fleet

DEVICES, ROUNDS, SENDERS = 3, 2, 2
SIZES = {"inputs": 64, "hidden": 1000, "classes": 10}
LETTERS_BYTES = 8_000
"""What a device may send in a round beside its tensors: letters, headers, MQTT, TCP's part not."""


def test_layers_that_are_not_asked_for_really_do_not_travel(tmp_path):
    """What FedLP's devices send, counted on their links, is its counter and little more."""
    plan = msgspec.structs.replace(
        digits_plan(DEVICES, ROUNDS),
        model=ModelChoice(name="mlp", sizes=SIZES),
        method=MethodChoice(name="fedlp", params={"p": SENDERS / DEVICES}),
    )
    counted = ROUNDS * SENDERS * BYTES_PER_ENTRY * count_parameters(plan.model)
    shards = digits_shards(DEVICES)

    latencies_s = dict.fromkeys(shards, 0.0)
    with real_fleet(tmp_path, "auto", plan, shards, latencies_s=latencies_s) as fleet:
        fleet.begin()
        fleet.finish()
        sent = sum(link.up_bytes for link in fleet.links.values())

    assert counted <= sent <= counted + ROUNDS * DEVICES * LETTERS_BYTES
    assert sent < 0.75 * ROUNDS * DEVICES * BYTES_PER_ENTRY * count_parameters(plan.model)
