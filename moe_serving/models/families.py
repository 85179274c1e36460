"""The model of a record."""

from typing import TypeAlias

from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import (
    ClassifierConfig,
    DecoderConfig,
    ModelConfig,
    TranslationConfig,
)
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.translation import EncoderDecoder

Model: TypeAlias = DecoderLM | EncoderDecoder | WindowClassifier


def build(config: ModelConfig) -> Model:
    """A model with random weights, from torch's global generator.

    Raises:
        ConfigError: The record describes no model.
    """
    match config:
        case DecoderConfig():
            return DecoderLM(config)
        case TranslationConfig():
            return EncoderDecoder(config)
        case ClassifierConfig():
            return WindowClassifier(config)
