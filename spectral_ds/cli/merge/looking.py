"""Looking: models are loaded and called, and what enters their layers becomes graphs.

A model that does not fit into memory is called with most of its weights on the disk, by accelerate.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.adapter import Adapter
from spectral_ds.cli.merge.architecture import Architecture, class_of
from spectral_ds.cli.merge.folder import Folder, dtype_of
from spectral_ds.cli.models import Source
from spectral_ds.coactivation import (
    Batch,
    Coactivation,
    InputsError,
    Site,
    calibrate,
    generated_batches,
    only_looking,
    random_batches,
    text_batches,
    user_batches,
)
from spectral_ds.console import logger, progress
from spectral_ds.sharding import Communicator
from spectral_ds.text import DataError, Text, read_learnable

RANDOM, GENERATED = "random", "generated"
# Of the draws; of sketches too.
SEED = 0
# Of its weights: what a model takes in memory while it is called; and of free memory: what weights
# may take where the rest stays on the disk.
IN_USE, SHARE_FOR_WEIGHTS = 1.2, 0.6


@dataclass(frozen=True)
class Amount:
    """How much is looked at.

    Attributes:
        samples: sequences.
        length: tokens of one.
        rank: directions that are kept of a graph.
    """

    samples: int
    length: int
    rank: int


def free_memory() -> int:
    """Bytes that programs may take."""
    return int(psutil.virtual_memory().available)


def elements_of(model: Folder) -> int:
    """Of all tensors."""
    return sum(torch.Size(each.shape).numel() for each in model.stored.values())


def bytes_of(model: Folder) -> int:
    """Of all tensors."""
    return sum(each.bytes for each in model.stored.values())


def load(folder: Folder, config: Any = None, kind: Any = None) -> nn.Module:
    """A model whole in memory, in float32, on the CPU."""
    settings = {} if config is None else {"config": config}
    source = Source(folder.given, str(folder.path), {})
    kind = class_of(folder.config) if kind is None else kind
    model: nn.Module = source.load(kind, dtype=torch.float32, **settings)
    return model.eval()


def fits(model: Folder) -> bool:
    """Whether it can be called in float32 in memory."""
    return 4 * elements_of(model) * IN_USE <= free_memory()


@contextmanager
def loaded(tuned: "Folder | Adapter", base: Folder) -> Iterator[nn.Module]:
    """A model that can be called: in float32 if it fits, or in its own dtype, or from the disk.

    An adapter must fit.
    """
    source = tuned if isinstance(tuned, Folder) else base
    free, own = free_memory(), bytes_of(source)
    if fits(source):
        yield load_whole(tuned, base)
        return
    dtype = dtype_of(source.stored)
    options: dict[str, Any] = {"dtype": dtype}
    kind = class_of(source.config)
    if own * IN_USE <= free:
        logger.info(f"{source.given}: called in {dtype}, for float32 does not fit into memory")
        yield Source(source.given, str(source.path), {}).load(kind, **options).eval()
        return
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise UserError(
            f"{source.given}: {own:,} bytes of weights do not fit into memory ({free:,} are free); "
            "pip install accelerate leaves them on the disk, or give files of statistics"
        ) from None
    logger.info(f"{source.given}: called with weights on the disk, in {dtype}")
    with tempfile.TemporaryDirectory() as folder:
        options |= {
            "device_map": "auto",
            "max_memory": _of_devices(free),
            "offload_folder": folder,
        }
        yield Source(source.given, str(source.path), {}).load(kind, **options).eval()


def _of_devices(free: int) -> dict[int | str, int]:
    """Bytes that weights may take, by device."""
    found: dict[int | str, int] = {"cpu": int(SHARE_FOR_WEIGHTS * free)}
    for index in range(torch.cuda.device_count()):
        found[index] = int(SHARE_FOR_WEIGHTS * torch.cuda.mem_get_info(index)[0])
    return found


def load_whole(tuned: "Folder | Adapter", base: Folder) -> nn.Module:
    """A model in memory, in float32; an adapter is merged into the base model."""
    if isinstance(tuned, Folder):
        return load(tuned)
    return tuned.whole_model(load(base, tuned.config, class_of(tuned.config)))


def tokenizer_of(*models: "Folder | Adapter") -> Any:
    """The tokenizer of the first model that has one.

    Raises:
        UserError: none has one.
    """
    import transformers

    for model in models:
        folder = model.tokenizer_folder()
        if folder is not None:
            source = Source(model.given, str(folder), {})
            return source.load(transformers.AutoTokenizer)
    raise UserError(f"{models[0].given}: has no tokenizer, and texts are to be read")


def texts_of(path: Path, option: str, half: int | None = None) -> list[Text]:
    """The texts of a file; of halves the first (0) or the second (1), text by text in turn.

    Raises:
        UserError: it cannot be used.
    """
    try:
        texts = read_learnable(path)
    except DataError as error:
        raise UserError(f"{option} {path}: {error}") from error
    return texts if half is None else texts[half::2]


def batches_of(
    source: str, option: str, model: nn.Module, amount: Amount, tokenizer: Any, half: int | None
) -> list[Batch]:
    """Batches of random token ids, of text that the model writes, or of a file of texts.

    Raises:
        UserError: the model cannot be called with them.
    """
    samples, length = amount.samples, amount.length
    try:
        if source == RANDOM:
            return random_batches(model, samples, length, SEED)
        if source == GENERATED:
            return generated_batches(model, samples, length, SEED)
        texts = texts_of(Path(source), option, half)
        return text_batches(model, texts, tokenizer(), samples, length, SEED)
    except (InputsError, DataError) as error:
        raise UserError(f"{option} {source}: {error}") from error


def written_batches(batches: Sequence[Batch], model: nn.Module) -> list[Batch]:
    """What batches have a model write, as batches to call other models with."""

    class Writer:
        """The model, whose words are kept; the last of them it has not read itself."""

        def __init__(self) -> None:
            self.written: list[torch.Tensor] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def generate(self, *given: Any, **named: Any) -> torch.Tensor:
            ids: torch.Tensor = cast(Any, model).generate(*given, **named)
            self.written.append(ids[:, :-1])
            return ids

    writer = Writer()
    with only_looking(model), progress("writing", len(batches), "call", True) as update:
        for batch in batches:
            batch(cast(nn.Module, writer))
            update(1)
    return user_batches([{"input_ids": ids} for ids in writer.written])


def sites_in(model: nn.Module) -> list[Site]:
    """The sites of a model, by the names of its parameters, as a training has them."""
    architecture = Architecture(model)
    names = {architecture.short(name): name for name, _ in model.named_parameters()}
    return [replace(site, parameter=names[n]) for n, site in architecture.sites.items()]


def look(model: nn.Module, batches: Sequence[Batch], amount: Amount, what: str) -> Coactivation:
    """The graphs of all layers of a model, called with batches."""
    alone = Communicator.alone(torch.device("cpu"))
    sites = sites_in(model)
    with progress(f"looking at activations ({what})", len(batches), "call", True) as update:
        return calibrate(model, sites, batches, amount.rank, SEED, alone, update)
