"""Which matrices get the same input, told by their names: no model is called.

In training it is seen which tensor enters a layer. From shapes alone, query, key and value of one
block are taken to share their input, and gate and up-projection theirs, by the names that they have
in the model families of Hugging Face and in Llama's own code; each other matrix has its own.
"""

import re
from collections.abc import Sequence

from spectral_ds.graph import ParameterNodes

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# There, queries are of the one sequence, keys and values of the other.
CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?att|encdecatt", re.IGNORECASE)


def by_shared_input(parameters: Sequence[ParameterNodes]) -> list[tuple[ParameterNodes, ...]]:
    """Parameters that are taken to share their input, in model order."""
    found: dict[object, list[ParameterNodes]] = {}
    for parameter in parameters:
        key = _place(parameter.name), parameter.matrices, parameter.nodes_of_matrix
        found.setdefault(key, []).append(parameter)
    return [tuple(members) for members in found.values()]


def _place(name: str) -> str:
    """The name, with the first of those that share their input in place of each."""
    parts = name.split(".")
    for names in TOGETHER:
        is_cross = CROSS_ATTENTION.search(name) is not None and len(names) == 3
        alike = names[1:] if is_cross else names
        parts = [alike[0] if part in alike else part for part in parts]
    return ".".join(parts)
