"""What the filter and the regularizer of a configuration take of one graph at a step."""

from spectral_ds.config import FilterConfig, RegularizerConfig
from spectral_ds.laplacian import Work


def filter_work(settings: FilterConfig, hops: int, is_identity: bool) -> Work:
    """Of (1 − s) + s · h(L): the signal comes and returns.

    Args:
        hops, is_identity: of h, see `Transfer`.
    """
    if is_identity or settings.strength == 0:
        return Work()
    return Work(hops, moves=2)


def penalty_work(settings: RegularizerConfig, hops: int) -> Work:
    """Of r(L) + ρI: the weights come, as does what they were, and the product returns.

    Args:
        hops: of r.
    """
    if settings.strength == 0:
        return Work()
    return Work(hops, moves=3 if settings.reference == "pretrained" else 2)
