"""Observer: hooks that sum up the second moments of what enters a model's sites.

Sites that get the same tensors (query, key and value; gate and up) share one graph, unless one has
changed in between: the first of them leads, the others follow. That shows in the first forward pass
that calls them; until its end, each is summed by itself. Where the model is called with an
`attention_mask` of (batch, tokens), padding does not count in layers that keep these two
dimensions, make one of them or put heads between them, and in stacked experts. In a decoder, the
mask that it is called with is that of its own tokens, and `encoder_attention_mask` that of the
encoder's.
"""

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from spectral_ds.coactivation.inside import ProductsInside
from spectral_ds.coactivation.moments import Moments, Projections
from spectral_ds.coactivation.sites import Site, tokens
from spectral_ds.engines.steps import is_in_backward, not_compiled, version_of

# What models call it that tells padding: (batch, tokens).
MASK = "attention_mask"
# What a decoder attends to besides, and the same of it.
ENCODED, MASK_OF_ENCODED = "encoder_hidden_states", "encoder_attention_mask"


class Encoded(NamedTuple):
    """What an encoder has made of its tokens, in the decoder that attends to it.

    Attributes:
        states: (batch, tokens, ...).
        mask: (batch, tokens); None: no padding.
    """

    states: torch.Tensor
    mask: torch.Tensor | None


class OwnHook:
    """A hook of one model's modules: in copies of the model, also pickled ones, it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = not_compiled(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnHook, (_nothing,)


def _nothing(*_: Any, **__: Any) -> None:
    pass


class Observer:
    """Sums up moments from `start` to `stop`.

    Args:
        model: that is called.
        sites: to observe.
        projections: Ω of each length.
        device: where sums are kept.
        leaders: who leads each site, where that is known: others are not observed.

    Attributes:
        moments: of the sites that lead and were called, by parameter.
        leaders: by parameter, the site whose graph it has.
        is_counting: whether what enters is summed; who shares is found in any case.
        only_training: whether calls without gradients in evaluation are left out, and of a site
            that was called in training, all in evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        projections: Projections,
        device: torch.device,
        leaders: Mapping[str, str] | None = None,
    ) -> None:
        self.moments: dict[str, Moments] = {}
        self.leaders: dict[str, str] = dict(leaders or {})
        self.is_counting, self.only_training = True, False
        self._in_training: set[str] = set()  # sites that were called in it
        self._model, self._projections, self._device = model, projections, device
        known = self.leaders
        self._sites = {
            s.parameter: s for s in sites if known.get(s.parameter, s.parameter) == s.parameter
        }
        self._finds_leaders = leaders is None
        self._handles: dict[str, Any] = {}
        self._handles_of: dict[str, list[Any]] = {}  # of sites, whose modules are hooked
        self._mask: torch.Tensor | None = None
        self._encoded: Encoded | None = None
        self._place_of_mask = _place_of_mask(model)
        # What has entered in this forward pass and is still alive, its version and its number.
        self._entered: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        self._numbers = itertools.count()
        # Of sites without a leader: the numbers of all that has entered in this forward pass.
        self._calls: dict[str, list[int]] = {}

    def start(self) -> None:
        """Hook the model."""
        self._handles[""] = self._model.register_forward_pre_hook(
            OwnHook(self._begin_forward), prepend=True, with_kwargs=True
        )
        for number, decoder in enumerate(_decoders(self._model)):
            self._handles[f"decoder {number} in"] = decoder.register_forward_pre_hook(
                OwnHook(self._begin_decoder), with_kwargs=True
            )
            self._handles[f"decoder {number} out"] = decoder.register_forward_hook(
                OwnHook(self._end_decoder), always_call=True
            )
        inner: dict[nn.Module, list[Site]] = {}
        for name, site in self._sites.items():
            if site.unfold is None:
                for module in site.modules:
                    inner.setdefault(module, []).append(site)
                self.leaders[name] = name
            else:
                self._handles_of[name] = [
                    module.register_forward_pre_hook(
                        self._hook(site, module), prepend=True, with_kwargs=True
                    )
                    for module in site.modules
                ]
        for number, (module, held) in enumerate(inner.items()):
            inside = ProductsInside(held, self.add, self._counts)
            self._handles[f"inside {number} in"] = module.register_forward_pre_hook(
                OwnHook(inside.enter), with_kwargs=True
            )
            self._handles[f"inside {number} out"] = module.register_forward_hook(
                OwnHook(inside.leave), always_call=True
            )

    def stop(self) -> None:
        """Take the hooks back."""
        self._settle()
        for handle in (*self._handles.values(), *itertools.chain(*self._handles_of.values())):
            handle.remove()
        self._handles.clear()
        self._handles_of.clear()
        self._mask = self._encoded = None

    def add(
        self, site: Site, vectors: torch.Tensor, weight: torch.Tensor | None, matrix: int = 0
    ) -> None:
        """Count vectors that enter a matrix of a site; see `Moments.add`."""
        if not self.is_counting or is_in_backward():  # checkpointed ones were counted before
            return
        if self.only_training and not self._is_training(site):
            return
        if site.parameter not in self.moments:
            omega = self._projections.of(site.inputs)
            moments = Moments(site.matrices, site.inputs, omega, self._device)
            self.moments[site.parameter] = moments
        self.moments[site.parameter].add(vectors, weight, matrix)

    def _is_training(self, site: Site) -> bool:
        """Whether a call is one of training, as far as is known; forgets what was none.

        A loop may train a model in evaluation, or evaluate it with gradients.
        """
        if not site.module.training:
            return torch.is_grad_enabled() and site.parameter not in self._in_training
        if site.parameter not in self._in_training:
            self._in_training.add(site.parameter)
            self.moments.pop(site.parameter, None)
        return True

    def _begin_forward(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        at = self._place_of_mask
        self._mask = _plain(args[at] if at < len(args) else kwargs.get(MASK))
        self._encoded = None
        self._settle()

    def _begin_decoder(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = kwargs.get(ENCODED)
        if isinstance(states, torch.Tensor):
            self._encoded = Encoded(states, _plain(kwargs.get(MASK_OF_ENCODED)))
            self._mask = _plain(kwargs.get(MASK))  # also of what follows: the head

    def _end_decoder(self, *_: Any) -> None:
        self._encoded = None

    def _hook(self, site: Site, module: nn.Module) -> OwnHook:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, torch.Tensor) or x.numel() == 0 or is_in_backward():
                return  # checkpointed ones were counted before
            if self._finds_leaders and site.parameter not in self.leaders:
                self._note(site, x)
            assert site.unfold is not None, "hooked"
            counts = self._counts(x) if site.unfold is tokens else None
            self.add(site, site.unfold(module, x.detach()), counts)

        return OwnHook(see)

    def _note(self, site: Site, x: torch.Tensor) -> None:
        """Number what enters a site; the same tensor has the same number."""
        number = next(self._numbers)
        if site.unfold is tokens:
            version = version_of(x)  # it may have changed in place since
            first, then, known = self._entered.get(id(x), (None, version, number))
            if first is not None and first() is x and then == version:
                number = known
            else:
                self._entered[id(x)] = weakref.ref(x), version, number
        self._calls.setdefault(site.parameter, []).append(number)

    def _settle(self) -> None:
        """Sites that the forward pass before has called first share a graph, if all that has
        entered them is the same."""
        first: dict[tuple[int, ...], str] = {}
        for name, numbers in self._calls.items():
            leader = self.leaders[name] = first.setdefault(tuple(sorted(numbers)), name)
            if leader != name:
                self.moments.pop(name, None)
                for handle in self._handles_of.pop(name):
                    handle.remove()
        self._calls.clear()
        self._entered.clear()

    def _counts(self, x: torch.Tensor) -> torch.Tensor | None:
        """(vectors,), bool: which vectors of x are no padding; None: all count.

        In x the first dimensions are (batch, tokens), or one is both of them, or, of four, they are
        (batch, heads, tokens).
        """
        encoded = self._encoded
        mask = encoded.mask if encoded is not None and x is encoded.states else self._mask
        if mask is None or x.dim() < 2 or x.numel() == 0:
            return None
        if x.dim() == 2 and len(x) == mask.numel():
            return mask.reshape(-1).bool()
        if x.dim() > 2 and x.shape[:2] == mask.shape:
            mask = mask.reshape(*mask.shape, *(1 for _ in x.shape[2:-1]))
        elif x.dim() == 4 and (x.shape[0], x.shape[2]) == mask.shape:
            mask = mask[:, None]
        else:
            return None
        return mask.bool().expand(x.shape[:-1]).reshape(-1)


def _place_of_mask(model: nn.Module) -> int:
    """Where the mask is among the arguments of a model; beyond all that it takes if it is not."""
    taken = _taken_by(model)
    return taken.index(MASK) if MASK in taken else sys.maxsize


def _plain(mask: object) -> torch.Tensor | None:
    """A mask that tells padding; None of any other."""
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _decoders(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that can be called with what an encoder has made."""
    if ENCODED in _taken_by(model):
        yield model
        return
    for child in model.children():
        yield from _decoders(child)


def _taken_by(model: nn.Module) -> list[str]:
    """The names of what a module is called with; none where nothing tells."""
    try:
        return [*inspect.signature(model.forward).parameters]
    except (TypeError, ValueError):
        return []
