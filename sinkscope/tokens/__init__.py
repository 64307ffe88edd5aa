"""Texts or token ids -> batches, and the corpora and streams that they come from."""

from sinkscope.tokens.batches import Batch, TextTokens, Tokens, key_positions
from sinkscope.tokens.corpora import Corpus, as_stream, portions, read_text
from sinkscope.tokens.encodings import columns_of, separate
from sinkscope.tokens.features import Features, Mixed, features_of, is_features, is_mixed
from sinkscope.tokens.items import label_of
from sinkscope.tokens.numbers import at_most, whole_number
from sinkscope.tokens.pairs import Targets, resided, tokenize_pairs
from sinkscope.tokens.texts import tokenize

__all__ = [
    "Batch",
    "Corpus",
    "Features",
    "Mixed",
    "Targets",
    "TextTokens",
    "Tokens",
    "as_stream",
    "at_most",
    "columns_of",
    "features_of",
    "is_features",
    "is_mixed",
    "key_positions",
    "label_of",
    "portions",
    "read_text",
    "resided",
    "separate",
    "tokenize",
    "tokenize_pairs",
    "whole_number",
]
