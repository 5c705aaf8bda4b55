"""What a model is called with while its activations are watched.

Random token ids, what the model writes by itself, or texts; in batches of a few sequences, equal
whatever the number of ranks.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spectral_ds.engines.fsdp2 import sharded_modules
from spectral_ds.text import Text, begin_of, encoded, pieces_of

# Calls a model with one batch.
Batch = Callable[[nn.Module], None]

# Of one call: few enough for any memory, enough for a CPU to be busy.
BATCH_TOKENS = 512
# Written at once: a step of a few costs as much as one of many.
WRITTEN_AT_ONCE = 64
# What settings of generation say of the vocabulary.
OF_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")


class InputsError(ValueError):
    """A model cannot be called with what was asked for."""


def called_with_tokens(model: nn.Module, holding: Iterable[nn.Module]) -> nn.Module:
    """The module of a model that token ids go into, where another wraps it (LightningModule).

    It is the outermost that says how large its vocabulary is and has these modules in it; else, and
    where FSDP2 shards the model as a whole, the model itself. So is a model of Hugging Face.
    """
    wanted = set(holding)
    is_its_own = hasattr(getattr(model, "config", None), "get_text_config")
    if is_its_own or model in sharded_modules(model):
        return model
    within = (m for m in model.modules() if _number(m, "vocab_size") is not None)
    return next((each for each in within if wanted <= set(each.modules())), model)


def random_batches(
    model: nn.Module, samples: int, length: int, seed: int, with_head: bool = True
) -> list[Batch]:
    """Token ids drawn from the vocabulary, each as likely.

    Args:
        with_head: whether all tokens enter the head; it is large.

    Raises:
        InputsError: the model has no vocabulary.
    """
    vocabulary = _number(model, "vocab_size")
    if vocabulary is None:
        raise InputsError(
            f"random draws token ids, and {type(model).__name__} has no config.vocab_size; use a "
            "file of statistics, or keep: given and plugin.calibrate(batches)"
        )
    generator = torch.Generator().manual_seed(seed)
    size = (samples, _at_most(model, length))
    ids = torch.randint(vocabulary, size, device="cpu", generator=generator)
    at_once = _sequences(ids.shape[1])
    return [_called_with(each, None, with_head) for each in ids.split(at_once)]


def generated_batches(model: nn.Module, samples: int, length: int, seed: int) -> list[Batch]:
    """Text that the model writes, sampled at temperature 1 from its begin token.

    Of its own settings of generation only the begin and end tokens count; none ends a text.

    Raises:
        InputsError: the model cannot generate, or has no begin token in its vocabulary.
    """
    can: Any = getattr(model, "can_generate", None)
    if can is None or not can():
        raise InputsError(
            f"generated is text that the model writes, and {type(model).__name__} cannot generate; "
            "use random or a file of texts"
        )
    settings: Any = getattr(model, "generation_config", None)
    begin = next(
        (
            number
            for name in ("decoder_start_token_id", "bos_token_id")
            if (number := getattr(settings, name, None)) is not None
            or (number := _number(model, name)) is not None
        ),
        None,
    )
    if begin is None:
        raise InputsError(f"generated begins with bos_token_id, which {type(model).__name__} lacks")
    vocabulary = _number(model, "vocab_size")
    if vocabulary is not None and not 0 <= begin < vocabulary:
        raise InputsError(
            f"generated begins with bos_token_id {begin}, and the vocabulary of "
            f"{type(model).__name__} has {vocabulary} tokens: set generation_config.bos_token_id"
        )
    from transformers import GenerationConfig

    length = _at_most(model, length)
    at_once = WRITTEN_AT_ONCE
    sampling = GenerationConfig(
        do_sample=True,
        use_cache=True,  # every token enters once
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=int(begin == 0),  # another: nothing is padded
        **{name: getattr(settings, name, None) for name in OF_TOKENS},
    )

    def batch(first: int) -> Batch:
        def call(called: Any) -> None:
            torch.manual_seed(seed + first)
            count = min(at_once, samples - first)
            device = _device_of(called)
            with _generating(called, sampling):
                called.generate(
                    torch.full((count, 1), begin, device=device),
                    attention_mask=torch.ones(count, 1, dtype=torch.long, device=device),
                    generation_config=sampling,
                )

        return call

    return [batch(first) for first in range(0, samples, at_once)]


@contextmanager
def _generating(model: Any, settings: Any) -> Iterator[None]:
    """Settings in the place of the model's own, which fill in what settings of a call leave out."""
    holders = [each for each in model.modules() if "generation_config" in vars(each)]
    own = [each.generation_config for each in holders]
    try:
        for each in holders:
            each.generation_config = settings
        yield
    finally:
        for each, before in zip(holders, own, strict=True):
            each.generation_config = before


def text_batches(
    model: nn.Module,
    texts: Sequence[Text],
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    with_head: bool = True,
) -> list[Batch]:
    """Pieces of texts and conversations, at most `samples`, evenly from all of them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        with_head: whether all tokens enter the head; it is large.

    Raises:
        InputsError: no text has a token.
        DataError: the tokenizer cannot make one of a conversation.
    """
    length = _at_most(model, length)
    pieces: list[list[int]] = []
    begin = begin_of(tokenizer)
    for whole in encoded(texts, tokenizer):
        pieces += pieces_of(whole, begin, length)
    if not pieces:
        raise InputsError("the texts hold no token")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pieces), device="cpu", generator=generator)
    # Those of about equal length together: less padding.
    chosen = sorted((pieces[at] for at in order[:samples].tolist()), key=len)
    batches = []
    for held in _at_once(chosen, _sequences(length), _has_experts(model)):
        ids = torch.zeros(len(held), len(held[-1]), dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(held):
            ids[row, : len(piece)] = torch.tensor(piece, device="cpu")
            mask[row, : len(piece)] = 1
        batches.append(_called_with(ids, mask, with_head))
    return batches


def _at_once(
    pieces: Sequence[list[int]], most: int, equal_lengths: bool
) -> Iterator[Sequence[list[int]]]:
    """Some pieces after others, in order; of equal lengths if asked for."""
    first = 0
    while first < len(pieces):
        held = pieces[first : first + most]
        if equal_lengths:
            held = [piece for piece in held if len(piece) == len(held[0])]
        yield held
        first += len(held)


def _has_experts(model: nn.Module) -> bool:
    """Whether experts are layers one by one: nothing tells which of their tokens are padding."""
    return any(
        isinstance(module, nn.Linear) and "experts" in name.split(".")
        for name, module in model.named_modules()
    )


def user_batches(batches: Sequence[Any]) -> list[Batch]:
    """Batches of the user's, each the keyword arguments of the model, or its one argument."""

    def batch(given: Any) -> Batch:
        def call(model: nn.Module) -> None:
            device = _device_of(model)
            if hasattr(given, "items"):
                model(**{name: _moved(value, device) for name, value in given.items()})
            elif isinstance(given, tuple | list):
                model(*(_moved(value, device) for value in given))
            else:
                model(_moved(given, device))

        return call

    return [batch(given) for given in batches]


def _called_with(ids: torch.Tensor, mask: torch.Tensor | None, with_head: bool) -> Batch:
    def call(model: nn.Module) -> None:
        device = _device_of(model)
        taken = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids.to(device)}
        if mask is not None:
            inputs["attention_mask"] = mask.to(device)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
            if mask is not None:
                inputs["decoder_attention_mask"] = inputs["attention_mask"]
        if "logits_to_keep" in taken and not with_head:
            inputs["logits_to_keep"] = 1
        model(**inputs)

    return call


def _device_of(model: nn.Module) -> torch.device:
    """Of its parameters; of those that are not in memory, the device where inputs may start."""
    devices = (parameter.device for parameter in model.parameters())
    return next((each for each in devices if each.type != "meta"), torch.device("cpu"))


def _sequences(length: int) -> int:
    return max(1, BATCH_TOKENS // length)


def _at_most(model: nn.Module, length: int) -> int:
    """The length, or the longest that the model takes."""
    longest = _number(model, "max_position_embeddings")
    # XLNet has -1: any length.
    return length if longest is None or longest <= 0 else min(length, longest)


def _number(model: nn.Module, name: str) -> int | None:
    config: Any = getattr(model, "config", None)
    try:
        text: Any = getattr(config, "get_text_config", lambda: config)()
    except ValueError:  # several of its parts read text
        return None
    value = getattr(text, name, None)
    return value if isinstance(value, int) else None


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
