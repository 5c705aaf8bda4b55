"""Co-activation graphs in checkpoints: eigenvalues on all ranks, directions shared out."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from spectral_ds.checkpoint import PartState, Pieces, SavedState
from spectral_ds.coactivation import Coactivation, Site
from spectral_ds.coactivation.file import as_arrays, from_arrays
from spectral_ds.sharding import Communicator, Fragment


def sizes_of(sites: Sequence[Site], rank: int) -> Mapping[str, int]:
    """Elements of the directions of each site, by parameter."""
    return {site.parameter: site.matrices * site.inputs * rank for site in sites}


def state_of(
    name: str,
    graphs: Coactivation | None,
    sites: Sequence[Site],
    rank: int,
    communicator: Communicator,
) -> PartState:
    """The state of some graphs, of fixed shapes whatever is known of them.

    Args:
        name: that no other graphs have.
        graphs: None: they are not known yet.
        sites: equal on all ranks.
        rank: the most directions of a graph.
    """
    graphs = graphs or Coactivation()
    position = {site.parameter: number for number, site in enumerate(sites)}
    leading = [position.get(graphs.leaders.get(s.parameter, ""), -1) for s in sites]
    numbers = {f"{name}.leaders": torch.tensor(leading, dtype=torch.float64, device="cpu")}
    fragments, held = [], list[torch.Tensor | None]()
    for number, site in enumerate(sites):
        found = as_arrays(graphs.spectra.get(site.parameter, [None] * site.matrices))
        values = np.zeros((site.matrices, rank))
        vectors = np.zeros((site.matrices, site.inputs, rank), np.float32)
        if found.known.any():
            known = found.values.shape[1]
            values[:, :known], vectors[:, :, :known] = found.values, found.vectors
        numbers[f"{name}.values.{site.parameter}"] = torch.from_numpy(values)
        numbers[f"{name}.known.{site.parameter}"] = torch.from_numpy(found.known).double()
        if number % communicator.world_size == communicator.rank:
            flat = torch.from_numpy(vectors).reshape(-1).to(communicator.device)
            fragments.append(Fragment(site.parameter, 0, len(flat)))
            held.append(flat)
    return PartState(numbers, {name: Pieces(fragments, held)})


def restored(name: str, saved: SavedState, sites: Sequence[Site], rank: int) -> Coactivation | None:
    """Undoes `state_of`; no communication.

    Raises:
        CheckpointError: the state lacks them.
    """
    leading = saved.tensor(f"{name}.leaders").long().tolist()
    names = [site.parameter for site in sites]
    leaders = {n: names[at] for n, at in zip(names, leading, strict=True) if at >= 0}
    if not leaders:
        return None
    leading_sites = [site for site in sites if leaders.get(site.parameter) == site.parameter]
    wanted = [Fragment(n, 0, size) for n, size in sizes_of(leading_sites, rank).items()]
    spectra = {}
    for site, flat in zip(leading_sites, saved.pieces(name, wanted), strict=True):
        spectra[site.parameter] = from_arrays(
            # Files keep numbers flat.
            saved.tensor(f"{name}.values.{site.parameter}").reshape(-1, rank).numpy(),
            flat.reshape(site.matrices, site.inputs, rank).numpy(),
            saved.tensor(f"{name}.known.{site.parameter}").long().numpy(),
        )
    return Coactivation(leaders, spectra)
