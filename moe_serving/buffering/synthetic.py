"""Traces made up with the traits of real ones: skew, topics that last, and echoes.

Each topic ranks a layer's experts in an order of its own, half of it shared by all topics, and a
token draws experts with Zipf's law over its stream's order (Gumbel top-k). A stream changes its
topic now and then, and repeats an expert of its previous token with some probability.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_serving.buffering.trace import Shape, Trace

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a synthetic trace is made; one pass is one token of each stream through all layers."""

    layers: int = 6
    experts: int = 64
    top_k: int = 2
    streams: int = 1
    passes: int = 1000
    topics: int = 8
    exponent: float = 0.9
    switch_chance: float = 1 / 150
    echo_chance: float = 0.3


def synthesise(recipe: Recipe, rng: np.random.Generator) -> Trace:
    """Makes a trace of `passes * layers` visits, layer after layer."""
    shape = Shape(recipe.layers, recipe.experts)
    logit_ZLE = _topic_logits(recipe, rng)
    topic_S = rng.integers(recipe.topics, size=recipe.streams)
    chosen_LSk = np.full((recipe.layers, recipe.streams, recipe.top_k), -1)
    counts = np.zeros((recipe.passes, recipe.layers, recipe.experts), dtype=np.int32)
    for number in range(recipe.passes):
        does_switch_S = rng.random(recipe.streams) < recipe.switch_chance
        topic_S = np.where(does_switch_S, rng.integers(recipe.topics, size=recipe.streams), topic_S)
        for layer in range(recipe.layers):
            logit_SE = logit_ZLE[topic_S, layer]
            chosen_LSk[layer] = _choose(recipe, logit_SE, chosen_LSk[layer], rng)
            counts[number, layer] = np.bincount(chosen_LSk[layer].ravel(), minlength=recipe.experts)
    layer_V = np.tile(np.arange(recipe.layers, dtype=np.int32), recipe.passes)
    return Trace(shape, layer_V, counts.reshape(-1, recipe.experts))


def _topic_logits(recipe: Recipe, rng: np.random.Generator) -> NDArray[np.float64]:
    by_rank_E = -recipe.exponent * np.log(np.arange(1, recipe.experts + 1))
    logit_ZLE = np.empty((recipe.topics, recipe.layers, recipe.experts))
    for layer in range(recipe.layers):
        shared_E = rng.permutation(recipe.experts)
        own = shared_E[recipe.experts // 2 :]
        for topic in range(recipe.topics):
            order_E = np.empty(recipe.experts, dtype=np.int64)
            order_E[0::2] = shared_E[: (recipe.experts + 1) // 2]
            order_E[1::2] = rng.permutation(own)[: recipe.experts // 2]
            logit_ZLE[topic, layer, order_E] = by_rank_E
    return logit_ZLE


def _choose(
    recipe: Recipe, logit_SE: NDArray[np.float64], previous_Sk: Ints, rng: np.random.Generator
) -> Ints:
    score_SE = logit_SE + rng.gumbel(size=logit_SE.shape)
    does_echo_Sk = (rng.random(previous_Sk.shape) < recipe.echo_chance) & (previous_Sk >= 0)
    stream_Sk = np.broadcast_to(np.arange(len(previous_Sk))[:, None], previous_Sk.shape)
    score_SE[stream_Sk[does_echo_Sk], previous_Sk[does_echo_Sk]] = np.inf
    return np.argsort(-score_SE, axis=1, kind="stable")[:, : recipe.top_k]
