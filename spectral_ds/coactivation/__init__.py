"""Co-activation graphs: which inputs of a layer are active together, and functions of that.

Nodes are the inputs of a layer, the columns of its weight. The operator is A = n · C / tr C with
C = E[xxᵀ] of its activations,
known by its most active directions.
"""

from spectral_ds.coactivation.acting import (
    CoactivationFilter,
    CoactivationPenalty,
    Function,
    Held,
    responses_within,
)
from spectral_ds.coactivation.calibrate import calibrate, only_looking
from spectral_ds.coactivation.content import content_of, content_of_tokenizer
from spectral_ds.coactivation.cut_rows import Key, answering_rank
from spectral_ds.coactivation.graph import Coactivation, summed
from spectral_ds.coactivation.inputs import (
    Batch,
    InputsError,
    called_with_tokens,
    generated_batches,
    random_batches,
    text_batches,
    user_batches,
)
from spectral_ds.coactivation.joint import functions_of
from spectral_ds.coactivation.moments import Moments, Projections, is_exact, sketch_columns
from spectral_ds.coactivation.observer import Observer
from spectral_ds.coactivation.operator import Energy, Factors, Piece, SubspaceOperator, pieces_of
from spectral_ds.coactivation.roles import RoleSpectra, by_role
from spectral_ds.coactivation.sites import Site, sites_of
from spectral_ds.coactivation.spectrum import Spectrum, largest, most_active, spectrum_of
from spectral_ds.coactivation.subspace import Response, SubspaceFunction, function_of

__all__ = [
    "Batch",
    "Coactivation",
    "CoactivationFilter",
    "CoactivationPenalty",
    "Energy",
    "Factors",
    "Function",
    "Held",
    "InputsError",
    "Key",
    "Moments",
    "Observer",
    "Piece",
    "Projections",
    "Response",
    "RoleSpectra",
    "Site",
    "Spectrum",
    "SubspaceFunction",
    "SubspaceOperator",
    "answering_rank",
    "by_role",
    "calibrate",
    "called_with_tokens",
    "content_of",
    "content_of_tokenizer",
    "function_of",
    "functions_of",
    "generated_batches",
    "is_exact",
    "largest",
    "most_active",
    "only_looking",
    "pieces_of",
    "random_batches",
    "responses_within",
    "sites_of",
    "sketch_columns",
    "spectrum_of",
    "summed",
    "text_batches",
    "user_batches",
]
