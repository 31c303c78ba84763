"""The definition: every formula of docs/maths.md in dense, plain torch, for any floating dtype.

What every other path of gcng must equal. Memory grows with N * N * D; autograd is torch's own.
"""

from gcng.reference import losses
from gcng.reference.correlation import center_normalize, initial_edges
from gcng.reference.dropout import dropout_pairs, dropout_scales, node_identity
from gcng.reference.edges import activation_norm, edges
from gcng.reference.gates import batch_norm, gates
from gcng.reference.graph import DenseGraph, graph
from gcng.reference.layout import ClassLayout, class_layout
from gcng.reference.messages import messages
from gcng.reference.synthesis import pulled_negatives, synthesize_negatives

__all__ = [
    "ClassLayout",
    "DenseGraph",
    "activation_norm",
    "batch_norm",
    "center_normalize",
    "class_layout",
    "dropout_pairs",
    "dropout_scales",
    "edges",
    "gates",
    "graph",
    "initial_edges",
    "losses",
    "messages",
    "node_identity",
    "pulled_negatives",
    "synthesize_negatives",
]
