"""A graph that joins nothing, or almost nothing: what to tell the user.

In: the graph, and the edge families that were to make it. Out: a sentence, or nothing.
"""

from collections.abc import Sequence

from spectral_ds.graph import Depth, EdgeFamily, Pair, ParameterNodes, Ring
from spectral_ds.laplacian import ParameterGraph

# Less than this share of the elements with an edge is as good as none.
FEW = 0.01


def edgeless(graph: ParameterGraph, families: Sequence[EdgeFamily]) -> str:
    """Why edges reach almost nothing of a graph; empty if they do reach something."""
    elements = sum(parameter.numel for parameter in graph.parameters)
    reached = sum(int((g.degree > 0).sum()) * g.bucket.width for g in graph.groups)
    if reached >= FEW * elements:
        return ""
    reasons = [_reason(family, graph.parameters) for family in families]
    return (
        f"{graph.num_edges:,} edges reach {reached:,} of the {elements:,} elements that the graph "
        f"covers, and what no edge reaches is only multiplied by h(0): "
        f"{'; '.join(dict.fromkeys(reasons))}"
    )


def _reason(family: EdgeFamily, parameters: Sequence[ParameterNodes]) -> str:
    if isinstance(family, Depth):
        return (
            "family depth joins parameters of equal shape and name in several blocks, and there "
            f"are {'few' if family.links(parameters) else 'none'}"
        )
    if isinstance(family, Pair):
        return (
            "family pair joins queries and keys, gates and up projections, which it knows by their "
            f"names, and there are {'few' if family.links(parameters) else 'none'}"
        )
    kind = parameters[0].kind
    if all(parameter.nodes_of_matrix == 1 for parameter in parameters):
        joins = "joins" if isinstance(family, Ring) else "compares"
        name = "ring" if isinstance(family, Ring) else "similarity"
        return f"family {name} {joins} {kind}s of a matrix, and none has two"
    if isinstance(family, Ring):
        return f"family ring joins {kind}s of a matrix, and few have two"
    return f"family similarity found few {kind}s that are alike: {family.features} may be zero"
