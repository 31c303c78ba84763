"""The ops as functions: what other code bases drop in. Each is documented where it is implemented."""

from gcng.ops.attention import negative_attention
from gcng.ops.class_cross_entropy import linear_cross_entropy
from gcng.ops.correlation import center_normalize, correlation_topk
from gcng.ops.retrieval import knn
from gcng.ops.synthesis import synthesize_negatives

__all__ = [
    "center_normalize",
    "correlation_topk",
    "knn",
    "linear_cross_entropy",
    "negative_attention",
    "synthesize_negatives",
]
