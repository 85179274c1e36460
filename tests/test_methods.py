import pytest
import torch

from federation.errors import ConfigError
from federation.learning.losses import OBJECTIVES, cross_entropy, proximal
from federation.learning.methods import METHODS, method_named


def test_the_table_is_in_order():
    """Every method names its paper and an objective that exists, under its own name."""
    assert {"fedavg", "fedprox"} <= METHODS.keys()
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper.startswith("arXiv:")
        assert method.loss in OBJECTIVES
        assert OBJECTIVES[method.loss](method.settings({})).output is not None
        assert method.aggregator() is not method.aggregator()


def test_an_unknown_method_lists_those_there_are():
    """The refusal names the methods there are."""
    with pytest.raises(ConfigError, match=r"'magic'.*fedavg, fedprox"):
        method_named("magic")


def test_numbers_have_defaults_and_unknown_ones_are_refused():
    """A method's numbers fall back to their defaults, and no others are taken."""
    fedprox = method_named("fedprox")

    assert fedprox.settings({}) == {"mu": 0.01}
    assert fedprox.settings({"mu": 1.0}) == {"mu": 1.0}
    with pytest.raises(ConfigError, match="'nu'; it has mu"):
        fedprox.settings({"nu": 1.0})


def test_the_proximal_term_is_the_papers():
    """Value and gradient are those of mu/2 ||w - w_base||^2, found by autograd."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, generator=generator)
    weights = torch.randn(50, generator=generator, requires_grad=True)
    expected = 0.3 / 2 * (weights - base).pow(2).sum()
    expected.backward()
    gradient = torch.ones(50)

    value = proximal(0.3)(weights.detach(), base, gradient)

    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, 1 + weights.grad)


def test_cross_entropy_is_the_mean_surprise():
    """The loss is the mean of -log softmax at the label."""
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])

    loss = cross_entropy(logits, torch.tensor([1, 0]))

    surprise = -logits.log_softmax(1)
    torch.testing.assert_close(loss, (surprise[0, 1] + surprise[1, 0]) / 2)
