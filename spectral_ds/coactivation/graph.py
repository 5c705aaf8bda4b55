"""Coactivation: one graph for each layer's inputs, over all sites of a model.

In: what each rank has observed. Out: spectra, equal on all ranks to the bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spectral_ds.coactivation.moments import Moments, Projections
from spectral_ds.coactivation.observer import Observer
from spectral_ds.coactivation.sites import Site
from spectral_ds.coactivation.spectrum import Spectrum, most_active
from spectral_ds.sharding import Communicator

# Of each matrix of a site; None: nothing has entered it.
Spectra = Sequence[Spectrum | None]


@dataclass(frozen=True)
class Coactivation:
    """The graphs of a model's sites.

    Attributes:
        leaders: by parameter, whose graph it has; also of those that nothing has entered.
        spectra: of the sites that lead, by parameter.
    """

    leaders: Mapping[str, str] = field(default_factory=dict)
    spectra: Mapping[str, Spectra] = field(default_factory=dict)

    def of(self, parameter: str) -> Spectra:
        """The spectra of a parameter's matrices; empty if it has none."""
        return self.spectra.get(self.leaders.get(parameter, parameter), ())

    def __or__(self, other: "Coactivation") -> "Coactivation":
        """The graphs of both; of what is in both, the other's."""
        return Coactivation({**self.leaders, **other.leaders}, {**self.spectra, **other.spectra})

    def of_rank(self, rank: int) -> "Coactivation":
        """The same with the most active directions only."""
        return Coactivation(
            self.leaders,
            {
                name: [None if each is None else each.of_rank(rank) for each in spectra]
                for name, spectra in self.spectra.items()
            },
        )

    def among(self, parameters: Iterable[str]) -> "Coactivation":
        """The graphs of some parameters, each led by the first of them."""
        first: dict[str, str] = {}
        leaders = {
            name: first.setdefault(self.leaders[name], name)
            for name in parameters
            if name in self.leaders
        }
        return Coactivation(leaders, {new: self.spectra[old] for old, new in first.items()})

    def all_spectra(self) -> list[Spectrum]:
        """All of them, site after site."""
        return [each for spectra in self.spectra.values() for each in spectra if each is not None]


def summed(
    observer: Observer,
    sites: Iterable[Site],
    projections: Projections,
    rank: int,
    everyone: Communicator,
) -> Coactivation:
    """The graphs of what all ranks together have observed (collective).

    Args:
        observer: this rank's.
        sites: all, equal on all ranks.
        projections: that it has used.
        rank: directions to keep.
        everyone: the ranks that have observed.

    Raises:
        RuntimeError: ranks disagree who shares its inputs; on all ranks.
    """
    sites = list(sites)
    leaders = {site.parameter: site.parameter for site in sites}
    leaders |= _agreed(everyone.gather_objects(observer.leaders))
    found: dict[str, list[Spectrum | None]] = {}
    own: dict[str, list[Spectrum | None]] = {}
    leading = [site for site in sites if leaders[site.parameter] == site.parameter]
    of_share: dict[str, Moments] = {}
    for number, site in enumerate(leading):
        moments = observer.moments.get(site.parameter)
        if moments is None:
            omega = projections.of(site.inputs)
            moments = Moments(site.matrices, site.inputs, omega, everyone.device)
        moments.sum_over(everyone)
        # Each rank decomposes its share; two machines might round otherwise.
        if number % everyone.world_size == everyone.rank:
            of_share[site.parameter] = moments
    with everyone.all_or_none():
        for name, moments in of_share.items():
            matrices = range(len(moments.sums))
            own[name] = [most_active(moments, m, rank) for m in matrices]
    for part in everyone.gather_objects(own):
        found |= part
    return Coactivation(leaders, {s.parameter: found[s.parameter] for s in leading})


def _agreed(of_ranks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Who leads whom, from what each rank has seen; a rank may not have called every site."""
    found: dict[str, str] = {}
    for leaders in of_ranks:
        for name, leader in leaders.items():
            if found.setdefault(name, leader) != leader:
                raise RuntimeError(
                    f"parameter {name!r} got the input of {leader!r} on one rank and that of "
                    f"{found[name]!r} on another"
                )
    return found
