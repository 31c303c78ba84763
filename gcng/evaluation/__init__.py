"""Retrieval evaluation: Recall@K, R-precision, mAP@R; definitions in docs/evaluation.md."""

from gcng.evaluation.retrieval import RetrievalMetrics, evaluate_retrieval

__all__ = ["RetrievalMetrics", "evaluate_retrieval"]
