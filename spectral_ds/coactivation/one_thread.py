"""One thread for small dense decompositions.

Threads gain nothing on a few hundred columns. Where several ranks share the cores of a machine they
wait for one another: a decomposition of (1536, 96) then took 50 times the processor time.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import scipy.linalg  # noqa: F401 - brings a BLAS of its own, that the controller should know
from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """A function that calls numpy's and scipy's linear algebra, on one thread."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return alone
