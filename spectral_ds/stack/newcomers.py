"""Parameters that come to be trained join the graphs, or are named once as not filtered."""

import logging

from spectral_ds.config import SpectralConfig, SpectralConfigError
from spectral_ds.engines import Engine, UnsupportedEngineError
from spectral_ds.stack.names import listed
from spectral_ds.stack.stack import Stack


class Newcomers:
    """Watches what an engine's optimizer trains.

    Args:
        engine: whose gradients are filtered.
        config: all of the configuration.
    """

    def __init__(self, engine: Engine, config: SpectralConfig) -> None:
        self._engine, self._config = engine, config
        self._is_waiting = False

    def join(self, stack: Stack) -> Stack:
        """The stack, or one in its place that has the newcomers too (collective if there are any).

        It keeps the reference, and the running means of gradients. Signal and noise are measured
        anew. Newcomers that cannot join are named in a warning.

        Args:
            stack: in use.
        """
        engine = self._engine
        found = engine.newcomers()
        if not found:
            return stack
        if not engine.is_complete:
            self._wait(len(found))
            return stack
        self._is_waiting = False
        before = list(engine.shapes)
        admission = engine.admit(found)
        for reason in dict.fromkeys(admission.left_out.values()):
            names = [name for name, why in admission.left_out.items() if why == reason]
            engine.log(f"not filtered: {listed(names)}: {reason}", logging.WARNING)
        if not admission.joined:
            return stack
        joined = listed(admission.joined)
        # One that joined may have the name of one that is gone.
        kept = [name for name in before if name not in admission.joined]
        try:
            new = Stack(engine, self._config, stack, kept)
        except (SpectralConfigError, UnsupportedEngineError, ValueError) as error:  # on all ranks
            admission.undo()
            engine.log(
                f"trained from step {engine.step} on and not filtered: {joined}: {error}",
                logging.WARNING,
            )
            return stack
        new.take_over(stack, kept)
        stack.forget()
        filtered = {parameter.name for graph in new.graphs for parameter in graph.parameters}
        excluded = [name for name in admission.joined if name not in filtered]
        engine.log(
            f"trained from step {engine.step} on: {joined}"
            + (f" (of these excluded by the configuration: {listed(excluded)})" if excluded else "")
            + f"; the graph is built anew: {new.graphs[0].graph.describe()}"
        )
        return new

    def _wait(self, count: int) -> None:
        if not self._is_waiting:
            self._engine.log(
                f"{count} parameters have come to be trained inside join(), where ranks may have "
                "left: they are not filtered until it ends",
                logging.WARNING,
            )
        self._is_waiting = True
