"""Feature extractors, inputs -> (N, D) embeddings: the shipped ones, building by name, and freezing of parts.

Any ``nn.Module`` that gives (N, D) is accepted wherever gcng asks for an extractor.
"""

from gcng.models.factory import build_extractor, check_extractor, make_head, replace_head
from gcng.models.freezing import (
    FrozenParameters,
    find_head,
    freeze_backbone,
    freeze_batch_norm,
    freeze_named,
    split_parameters,
)
from gcng.models.small import EmbeddingTable, LinearExtractor, SmallConvNet

__all__ = [
    "EmbeddingTable",
    "FrozenParameters",
    "LinearExtractor",
    "SmallConvNet",
    "build_extractor",
    "check_extractor",
    "find_head",
    "freeze_backbone",
    "freeze_batch_norm",
    "freeze_named",
    "make_head",
    "replace_head",
    "split_parameters",
]
