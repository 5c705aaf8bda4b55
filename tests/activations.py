"""Graphs of family activations by dense float64 numpy, and a tiny model that they can be made of.

In: weights or a model, and what it is called with. Out: the operators of its layers' inputs, and
what a step that they filter should be. Shares no code with the package.
"""

import functools

import numpy as np
import oracle
import scipy.linalg
import tiny
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

import spectral_ds

VOCABULARY, LENGTH = 53, 9
RANK, RATE = 3, 64.0
# Added to both graphs where something is to be learned, as the package documents.
RIDGE = 1e-6
# Three calls of the model: 56 + 56 + 18 sequences, so that ranks have unequal shares.
EDGE = {"family": "activations", "rank": 2, "samples": 130, "length": LENGTH}


def section_of(edge=None, **keys):
    """A section whose only graph is one of activations."""
    graph = {"node": "column", "edges": [{**EDGE, **(edge or {})}]}
    filtered = {"response": "tikhonov", "tau": 1.5, "strength": 0.8, "rest": 0.6}
    return {
        "graph": graph,
        "filter": {**filtered, "apply_to": "update", **keys.pop("filter", {})},
        "monitor": {"enabled": False},
        **keys,
    }


class Writer(transformers.LlamaForCausalLM):
    """A model that generates; in training it gives its loss."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(tiny.llama_config())

    def forward(self, input_ids=None, **arguments):
        if self.training:
            return super().forward(input_ids=input_ids, labels=input_ids).loss
        return super().forward(input_ids=input_ids, **arguments)


class CalledByIds(tiny.TinyLlama):
    """The tiny model, as a model of Hugging Face is called and tells of its vocabulary."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.config = self.llama.config

    def forward(self, input_ids, attention_mask=None):
        return self.llama(input_ids, attention_mask=attention_mask, labels=input_ids).loss


# Inputs


def random_ids(samples=EDGE["samples"], length=LENGTH, seed=0, vocabulary=VOCABULARY):
    """The documented draw: each id of the vocabulary as likely, torch's CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (samples, length), generator=generator)


def inputs_of(model, call, kinds=(nn.Linear,)):
    """By module: all that enters it while the model is called, (vectors, inputs), float64."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            note = functools.partial(lambda held, _, args: held.append(args[0].detach()), [])
            seen[name] = note.args[0]
            handles.append(module.register_forward_pre_hook(note))
    flags = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        call(model)
    for module, flag in flags.items():
        module.training = flag
    for handle in handles:
        handle.remove()
    return {
        name: np.concatenate([x.reshape(-1, x.shape[-1]).double().numpy() for x in held])
        for name, held in seen.items()
        if held
    }


def words(folder):
    """A folder of a tokenizer whose word n has id n."""
    vocabulary = {f"w{n}": n for n in range(VOCABULARY - 1)} | {"?": 52}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    whole.save_pretrained(folder)
    return str(folder)


def write_texts(path, seed=7):
    """A file of texts of unequal length, and their pieces of at most nine ids."""
    generator = np.random.default_rng(seed)
    texts = [generator.integers(0, 52, length) for length in (4, 9, 21, 1, 13, 2)]
    path.write_text("\n\n".join(" ".join(f"w{n}" for n in text) for text in texts))
    pieces = [text[at : at + 9] for text in texts for at in range(0, len(text), 9)]
    return {number: piece[None] for number, piece in enumerate(pieces)}


# Operators


def operator_of(inputs, rank, seed=0):
    """A = n · C / tr C, its most active directions exact, the others by their mean."""
    second = inputs.T @ inputs
    count = len(second)
    second *= count / np.trace(second)
    columns, shift = rank + max(8, rank // 2), 0.0
    if count > 2 * columns:  # the fixed-rank approximation of arXiv 1706.05736, algorithm 3
        draw = oracle.projection(count, columns, seed)
        shift = 1e-6 * np.linalg.norm(second @ draw)
        sketch = second @ draw + shift * draw
        second = sketch @ np.linalg.inv(draw.T @ sketch) @ sketch.T
    values, vectors = np.linalg.eigh((second + second.T) / 2)
    return truncated(values - shift, vectors, rank)


def truncated(values, vectors, rank):
    """The operator with the largest of ascending eigenvalues; trace and dimension stay."""
    count = len(vectors)
    kept, basis = values[-rank:], vectors[:, -rank:]
    others = count - len(kept)
    mean = (count - kept.sum()) / others if others else 1.0
    return (basis * (kept - mean)) @ basis.T + mean * np.eye(count)


def function_of(keep, learn, settings, most_active):
    """G: h(R), or with something to learn h(R T⁻¹) = T^½ h(T^−½ R T^−½) T^−½."""
    identity = np.eye(len(keep))
    if learn is None:
        values, vectors = np.linalg.eigh(keep)
        response = oracle.response_of({**settings, "strength": 1.0}, most_active)
        return (vectors * response(values)) @ vectors.T
    ratio = (keep + RIDGE * identity) @ np.linalg.inv(learn + RIDGE * identity)
    tau = settings.get("tau", 1.0)
    if settings["response"] == "tikhonov":
        return np.linalg.inv(identity + tau * ratio)
    assert settings["response"] == "heat"
    return scipy.linalg.expm(-tau * ratio)


def most_active(operators):
    return max(np.linalg.eigvalsh(each)[-1] for each in operators.values())


# The tiny model


@oracle.remembered
def operators_of_weights(weights, rank, calls):
    """By weight: A of the tiny model with these weights, called with these ids, in float64."""
    model = CalledByIds(torch.float64)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(torch.from_numpy(value))
    found = inputs_of(
        model, lambda called: [called(torch.from_numpy(ids)) for ids in calls.values()]
    )
    return {f"{name}.weight": operator_of(x, rank) for name, x in found.items()}


def operators_for(section, weights, ids=None):
    """R by weight; of random ids, if no others are given.

    Args:
        ids: (sequences, length), or several such by any key.
    """
    [graph] = [g for g in section.get("graphs", [section.get("graph")]) if g["node"] == "column"]
    edge = {**EDGE, **graph["edges"][0]}
    ids = random_ids(edge["samples"], edge["length"]) if ids is None else ids
    calls = ids if isinstance(ids, dict) else {0: np.asarray(ids)}
    return operators_of_weights(weights, edge["rank"], calls)


def expected_update(section, plain, learned=None, kept=None):
    """What becomes of the update of a step, given without the plugin, by name.

    Args:
        plain: facts of the step without the plugin.
        learned: token ids of what is learned; None: nothing is.
        kept: token ids of what is to be kept; None: those drawn at random.
    """
    keep = operators_for(section, plain["weights"], kept)
    learn = None if learned is None else operators_for(section, plain["weights"], learned)
    updates = {n: u for n, u in plain["gradients"].items() if tiny.is_filtered(n)}
    known = {name: keep[name] for name in updates if name in keep}
    top = most_active(known)
    settings, pull = section["filter"], section.get("regularizer")
    strength = settings["strength"]
    expected = dict(plain["gradients"])
    for name, update in updates.items():
        if name in known:
            learned_of = None if learn is None else learn[name]
            filtered = update @ function_of(known[name], learned_of, settings, top)
        else:
            filtered = update * settings.get("rest", 1.0)
        expected[name] = (1 - strength) * update + strength * filtered
        if pull is not None:
            step = plain["rates"][name] * pull["strength"]
            expected[name] = pulled(expected[name], known.get(name), step, pull["ridge"])
    return expected


def pulled(moved, operator, step, ridge):
    """Δ (I + step · (A + ρI))⁻¹; what has no inputs counts as of average activity."""
    if operator is None:
        return moved / (1 + step * (1 + ridge))
    identity = np.eye(len(operator))
    return moved @ np.linalg.inv(identity + step * (operator + ridge * identity))


def cut_rows(facts):
    """Rows of matrices with a graph that shard boundaries cut, by all ranks' facts of a step."""
    count = 0
    for found in facts:
        for name, start, _ in found["owned"]:
            is_known = name in found["operators"]
            count += is_known and start % found["weights"][name].shape[1] > 0
    return count


# Any model


def keeping(model, batches, section=None, parameters=None):
    """A plugin whose graph is of the inputs that these batches make."""
    section = section_of({"keep": "given", "rank": RANK}) if section is None else section
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=RATE)
    plugin = spectral_ds.attach(model, optimizer, section)
    plugin.calibrate(batches)
    return plugin, optimizer


def assert_operators(graph, expected):
    """The graph has these operators, by (parameter, matrix), and no others."""
    assert set(graph.held.graph_of) == set(expected)
    for (name, matrix), wanted in expected.items():
        got = graph.operator(name, matrix)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), (name, matrix)


def trained(model):
    """Names of the parameters that are."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def operators(inputs, rank=RANK):
    """By matrix, of the inputs of layers by name."""
    return {(f"{name}.weight", 0): operator_of(x, rank) for name, x in inputs.items()}


def ids_of(model, samples=7, length=6):
    """Random token ids of its vocabulary."""
    return random_ids(samples, length, 5, model.config.vocab_size)
