"""Everything a user can set: names, types, defaults and ranges, as frozen dataclasses.

Valid for `OmegaConf.structured` too. `loading.py` reads and checks what a user has written.
"""

# ruff: noqa: RUF009 - what makes a field is called in its default

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from spectral_ds.config.fields import (
    BEST,
    SYNONYMS,
    choice,
    integer,
    not_negative,
    rule,
    unit_interval,
)

Family = Literal["depth", "similarity", "pair", "ring", "activations"]
Features = Literal["weights", "gradient"]
Scope = Literal["parameter", "role"]
Node = Literal["row", "column", "element"]
LaplacianKind = Literal["normalized", "combinatorial"]
ResponseName = Literal["identity", "heat", "tikhonov", "window", "lowpass", "highpass", "bandpass",
                       "polynomial", "bands", "wiener", "whiten"]  # fmt: skip
PenaltyName = Literal["laplacian", "identity", "heat", "tikhonov", "window", "lowpass", "highpass",
                      "bandpass", "polynomial", "bands", "wiener", "whiten"]  # fmt: skip
Rescaling = Literal["none", "norm"]
Filtered = Literal["gradient", "update"]
Coupling = Literal["joint", "decoupled"]
ReferenceName = Literal["pretrained", "zero"]
ReferenceDevice = Literal["same", "cpu"]
KernelName = Literal["best", "torch_sparse", "torch_csr", "embedding_bag"]
ExchangeName = Literal["best", "boundary", "transpose"]
ExchangeDtype = Literal["float32", "bfloat16"]
PresetName = Literal["paper", "retain", "retain_lm", "anchor_lm", "denoise",
                     "gradient_smoothing", "laplacian_smoothing", "grokfast", "whiten",
                     "observe"]  # fmt: skip

PRESETS: tuple[PresetName, ...] = get_args(PresetName)
RESPONSES: tuple[ResponseName, ...] = get_args(ResponseName)

# Keys that only some edge families or some responses use.
FAMILIES_USING = {
    "features": ("similarity",),
    "neighbours": ("similarity",),
    "scope": ("similarity",),
    "sketch_width": ("similarity",),
    "head_width": ("pair",),
    "rank": ("activations",),
    "keep": ("activations",),
    "learn": ("activations",),
    "samples": ("activations",),
    "length": ("activations",),
    "tokenizer": ("activations",),
}
RESPONSES_USING = {
    "tau": ("heat", "tikhonov"),
    "alpha": ("window",),
    "coefficients": ("polynomial",),
    "cutoff": ("lowpass", "highpass"),
    "low": ("bandpass",),
    "high": ("bandpass",),
    "gains": ("bands",),
    "bands": ("wiener", "whiten"),
    "power": ("whiten",),
}
ADAPTIVE = ("wiener", "whiten")
# Those that have a limit where what is learned has no activity, so that frequency is infinite.
BOUNDED = ("identity", "heat", "tikhonov")

# Where the inputs of activations come from; anything else is a file of texts, or of statistics
# that `plugin.save_activations` wrote (.safetensors).
KEEP = ("random", "generated", "given")
LEARN = ("none", "training")


def _inputs(default: str, words: tuple[str, ...]) -> Any:
    allowed = f"{', '.join(words)} or the name of a file or folder, without ${{"
    return rule(default, allowed, lambda value: value and "${" not in value)


def _name() -> Any:
    return rule("", "a string without ${", lambda value: "${" not in value)


def _patterns(default: tuple[str, ...], may_be_empty: bool) -> Any:
    def test(patterns: tuple[str, ...]) -> bool:
        # OmegaConf gives "${" and "???" a meaning of their own.
        return all(p and "${" not in p and p != "???" for p in patterns)

    kind = "list" if may_be_empty else "non-empty list"
    return rule(
        default,
        f"a {kind} of shell patterns: strings which are not empty, not ??? and without ${{",
        lambda value: test(value) and (may_be_empty or len(value) > 0),
    )


@dataclass(frozen=True)
class EdgeConfig:
    """One edge family of the parameter graph."""

    family: Family = choice("similarity", Family)
    features: Features = choice("weights", Features)  # what similarity compares
    neighbours: int = integer(8, at_least=1)  # nearest nodes each node is joined to
    scope: Scope = choice("parameter", Scope)  # where neighbours are looked for
    sketch_width: int = integer(64, at_least=0)  # length of a projected feature; 0 = never project
    # pair: rows of an attention head; 0 = from the model's own config
    head_width: int = integer(0, at_least=0)
    rank: int = integer(64, at_least=1)  # activations: most active directions of each layer
    keep: str = _inputs("random", KEEP)  # activations: what the model is to keep
    learn: str = _inputs("none", LEARN)  # activations: what it is to learn
    samples: int = integer(256, at_least=1)  # activations: sequences that are looked at
    length: int = integer(64, at_least=1)  # activations: tokens of each
    tokenizer: str = _name()  # activations: folder or name; "" = the model's own
    weight: float = rule(1.0, "a finite number > 0", lambda value: value > 0)  # of the family


@dataclass(frozen=True)
class GraphConfig:
    """Nodes and edges. Patterns are shell patterns on parameter names.

    A pattern that stands in `GraphConfig()` is a default and may match no parameter.
    """

    node: Node = choice("row", Node)
    include: tuple[str, ...] = _patterns(("*",), may_be_empty=False)
    exclude: tuple[str, ...] = _patterns(
        ("*embed*", "*lm_head*", "*classifier*", "*pooler*"), may_be_empty=True
    )
    edges: tuple[EdgeConfig, ...] = rule((EdgeConfig(),), "a non-empty list of mappings", bool)
    laplacian: LaplacianKind = choice("normalized", LaplacianKind)
    refresh_interval: int = integer(0, at_least=0)  # steps between rebuilds; 0 = built once


@dataclass(frozen=True)
class TemporalConfig:
    """Adds amplify x the running mean of the filtered gradient (arXiv 2405.20233)."""

    decay: float = rule(0.98, "a number >= 0 and < 1", lambda value: 0 <= value < 1)
    amplify: float = not_negative(2.0)


@dataclass(frozen=True)
class FilterConfig:
    """The response h, where and how strongly it acts: Y = (1 - strength) X + strength h(L) X."""

    response: ResponseName = choice("heat", ResponseName)
    tau: float = not_negative(1.0)  # heat exp(-tau lambda), tikhonov 1 / (1 + tau lambda)
    # window 1 - (alpha / 2) lambda; up to 1 it is >= 0 on [0, 2], the normalized spectrum
    alpha: float = unit_interval(0.4)
    # polynomial: of lambda^0, lambda^1, ...
    coefficients: tuple[float, ...] = rule((), "a list of finite numbers", lambda value: True)
    # lowpass keeps, highpass drops what is below this share of [0, lambda_max]
    cutoff: float = unit_interval(0.25)
    low: float = unit_interval(0.0)  # bandpass keeps what is between these shares
    high: float = unit_interval(0.5)
    # bands: of equal bands of [0, lambda_max], lowest first
    gains: tuple[float, ...] = rule((), "a list of finite numbers", lambda value: True)
    # wiener, whiten: equal bands with a gain each
    bands: int = rule(8, "an integer from 2 to 64", lambda value: 2 <= value <= 64)
    power: float = not_negative(0.5)  # whiten: the gain of a band is its power to the minus this
    order: int | Literal["best"] = rule(  # Chebyshev order; best = the least within tolerance
        BEST,
        "best or an integer from 1 to 512",
        lambda value: value == BEST if isinstance(value, str) else 1 <= value <= 512,
        SYNONYMS,
    )
    # largest error of h on the spectrum under order best
    tolerance: float = rule(1e-3, "a number > 0 and < 1", lambda value: 0 < value < 1)
    strength: float = unit_interval(0.5)
    rescale: Rescaling = choice("none", Rescaling)
    apply_to: Filtered = choice("gradient", Filtered)
    # family activations: factor on what it covers that has no inputs: norms, biases, embeddings
    rest: float = not_negative(1.0)
    warmup_steps: int = integer(0, at_least=0)  # optimizer steps until full strength
    decay_steps: int = integer(0, at_least=0)  # steps of its fall to 0 after that; 0 = it stays
    interval: int = integer(1, at_least=1)  # filter every so many optimizer steps
    temporal: TemporalConfig | None = None


@dataclass(frozen=True)
class StatisticsConfig:
    """Running means of gradients, for similarity of gradients, adaptive responses and `snr`."""

    interval: int = integer(20, at_least=1)  # optimizer steps between samples
    decay: float = rule(0.99, "a number > 0 and < 1", lambda value: 0 < value < 1)  # a sample


@dataclass(frozen=True)
class RegularizerConfig:
    """The term strength x 1/2 tr(D^T (r(L) + ridge I) D), D = weights - reference."""

    strength: float = not_negative(0.0)
    response: PenaltyName = choice("laplacian", PenaltyName)  # r
    ridge: float = not_negative(0.0)
    coupling: Coupling = choice("joint", Coupling)
    reference: ReferenceName = choice("pretrained", ReferenceName)
    reference_device: ReferenceDevice = choice("same", ReferenceDevice)


@dataclass(frozen=True)
class MonitorConfig:
    """What goes to TensorBoard, and how often."""

    enabled: bool = True
    interval: int = integer(20, at_least=1)  # optimizer steps between records
    # equal bands of frequency; the order of the band filters grows with their number
    bands: int = rule(8, "an integer from 2 to 64", lambda value: 2 <= value <= 64)
    figures_interval: int = integer(100, at_least=1)  # optimizer steps between figures
    folder: str = _name()  # for TensorBoard files of its own; "" = where the engine writes


@dataclass(frozen=True)
class OperatorConfig:
    """How y = L x is computed on shards."""

    kernel: KernelName = choice(BEST, KernelName)  # best = the fastest one
    exchange: ExchangeName = choice(BEST, ExchangeName)
    exchange_dtype: ExchangeDtype = choice("float32", ExchangeDtype)


@dataclass(frozen=True)
class CheckpointConfig:
    """The plugin's state in the engine's checkpoints."""

    enabled: bool = True  # whether it is saved and loaded with them
    strict: bool = True  # whether a state that cannot be used is an error, or a new graph is made


@dataclass(frozen=True)
class SpectralConfig:
    """The whole section. Build it with `load_config`, which validates; frozen afterwards."""

    enabled: bool = True
    preset: PresetName = choice("paper", PresetName)
    graph: GraphConfig = GraphConfig()
    graphs: tuple[GraphConfig, ...] = rule((), "a list of mappings", lambda value: True)  # stacked
    filter: FilterConfig = FilterConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    monitor: MonitorConfig = MonitorConfig()
    operator: OperatorConfig = OperatorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = rule(0, "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)

    @property
    def stack(self) -> tuple[GraphConfig, ...]:
        """The graphs that filter one after another."""
        return self.graphs or (self.graph,)

    @property
    def has_activations(self) -> bool:
        """Whether a graph is one of co-activation."""
        return any(edge.family == "activations" for graph in self.stack for edge in graph.edges)

    def digest(self) -> str:
        """SHA-256 of the configuration, hexadecimal; equal on two ranks iff all values are."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
