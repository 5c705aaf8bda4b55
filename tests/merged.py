"""Tiny models for `spectral-ds merge`, and what it must make of them, in dense float64 numpy."""

import json
import shutil

import numpy as np
import tiny
import torch
from commands import run
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from spectral_ds.cli import main

# More than a layer has inputs, so that no graph is singular.
WORDS = [f"word{number}" for number in range(30)]
VOCABULARY = ["[PAD]", "[END]", *WORDS]
# Wide, so that heads attend to different tokens and no graph is nearly singular.
SPREAD = 0.5
# Of the identity, that T and R get where there is something to learn.
RIDGE = 1e-6
TOKENS = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
HEADS = {
    "initializer_range": SPREAD,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
}
LLAMA = {**TOKENS, **HEADS, "intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, max_position_embeddings=32),
    "tied": LlamaConfig(**LLAMA, max_position_embeddings=32, tie_word_embeddings=True),
    "mixtral": MixtralConfig(
        **LLAMA, max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": GPT2Config(
        **TOKENS, n_embd=16, n_head=2, n_layer=2, n_positions=32, initializer_range=SPREAD
    ),
    "bert": BertConfig(
        **HEADS, vocab_size=len(VOCABULARY), intermediate_size=24, max_position_embeddings=32
    ),
}
CLASSES = {
    "llama": LlamaForCausalLM,
    "tied": LlamaForCausalLM,
    "mixtral": MixtralForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "bert": BertForMaskedLM,
}


def write_tokenizer(path):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[PAD]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[END]", pad_token="[PAD]"
    ).save_pretrained(path)


def write_texts(path, seed, count=24, labels=False):
    """Texts of words, one a line; with labels, a TSV of label and text."""
    random = np.random.default_rng(seed)
    odds = random.dirichlet(np.ones(len(WORDS)))
    texts = [" ".join(random.choice(WORDS, size=12, p=odds)) for _ in range(count)]
    lines = [f"{i % 3}\t{text}" if labels else text for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def perturbed(model, seed, share=0.3):
    """Every weight moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = share * (parameter.std() if parameter.numel() > 1 else 1) + 0.01
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def write_pair(path, kind, **options):
    """A base model in `base`, with a tokenizer, and two that were tuned in `tuned` and `other`."""
    torch.manual_seed(0)
    model = CLASSES[kind](CONFIGS[kind])
    # Norms and biases that are all equal would hide mistakes.
    perturbed(model, 9, 0.1).save_pretrained(path / "base")
    write_tokenizer(path / "base")
    for seed, name in enumerate(("tuned", "other"), start=1):
        tuned = CLASSES[kind].from_pretrained(path / "base")
        perturbed(tuned, seed).save_pretrained(path / name, **options)
        write_tokenizer(path / name)
    return path


def classifiers_of(path):
    """Classifiers with the encoder of `base` (a masked language model) and a head of their own."""
    for seed, name in enumerate(("tuned", "other"), start=1):
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(path / "base", num_labels=3)
        perturbed(model, seed).save_pretrained(path / name)
        write_tokenizer(path / name)


def merge(folder, *words):
    """The report of a merge of `base` in this folder."""
    status, out = run("merge", folder / "base", *words, "--json")
    assert status == 0
    return json.loads(out)


def refusal(capsys, *words):
    """The one line of a merge that is refused."""
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def tensors(path):
    """All of a folder, float64 by name."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return {name: value.astype(np.float64) for name, value in found.items()}


def token_pieces(path, length):
    """Token ids of a file's texts, cut into pieces."""
    ids = [
        [VOCABULARY.index(word) for word in text.split()] for text in path.read_text().split("\n")
    ]
    return [each[at : at + length] for each in ids for at in range(0, len(each), length)]


class Inputs:
    """Everything that enters the layers of a model, called with one piece of text at a time."""

    def __init__(self, model, pieces):
        self.vectors = {}
        handles = []
        for name, module in model.named_modules():
            is_matrix = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
            if is_matrix or type(module).__name__ == "MixtralSparseMoeBlock":
                handles.append(module.register_forward_pre_hook(self._keep(name)))
        model.eval()
        with torch.no_grad():
            for piece in pieces:
                if piece:
                    model(input_ids=torch.tensor([piece]))
        for handle in handles:
            handle.remove()

    def _keep(self, name):
        def keep(_, arguments):
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            self.vectors.setdefault(name, []).append(flat.double().numpy())

        return keep

    def graph(self, name):
        """A = n C / tr C, dense."""
        return _normalized(np.concatenate(self.vectors[name]))


def filtered(base, changes, keep, learn, mu):
    """W₀ + Σ ΔW_i T_i (Σ T_j + μR)⁻¹ of matrices (outputs, inputs)."""
    eye = np.eye(len(keep))
    if any(each is not None for each in learn):
        keep = keep + RIDGE * eye
    learn = [eye if each is None else each + RIDGE * eye for each in learn]
    inverse = np.linalg.inv(sum(learn) + mu * keep)
    return base + sum(change @ t @ inverse for change, t in zip(changes, learn, strict=True))


def of_rank(graph, rank):
    """A graph's largest eigenpairs, and all others by their mean."""
    values, vectors = np.linalg.eigh(graph)
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    if rank < len(values):
        values[rank:] = values[rank:].mean()
    return vectors * values @ vectors.T


class Expected:
    """What a merge makes of models, tensor by tensor.

    Args:
        base: a model in memory.
        keep: pieces of inputs to keep.
        learn: of each tuned model: the model and its pieces; None: T = I.
    """

    def __init__(self, base, keep, learn=(None,), rank=10**6, mu=1.0, rest=0.6):
        self.keep = _graphs(base, keep)
        self.learn = [None if each is None else _graphs(*each) for each in learn]
        self.rank, self.mu, self.rest = rank, mu, rest
        # By name: the activity by which errors are weighed, and whether the matrix is turned.
        self.activity = {}

    def tensors(self, base, tuned, turned=()):
        """The result, by name.

        Args:
            base, tuned: tensors by name, float64.
            turned: ends of names of matrices that are stored as (inputs, outputs).
        """
        found = {}
        for name, first in tuned[0].items():
            if name not in base:
                found[name] = first
                continue
            before = base[name]
            changes = [each[name] - before for each in tuned]
            site = name.removesuffix(".weight")
            if site not in self.keep:
                found[name] = before + self.rest * sum(changes) / len(changes)
                continue
            is_turned = name.endswith(tuple(turned))
            matrices = [m.T if is_turned else m for m in (before, *changes)]
            learn = [
                None if each is None else of_rank(each[site], self.rank) for each in self.learn
            ]
            keep = of_rank(self.keep[site], self.rank)
            result = filtered(matrices[0], matrices[1:], keep, learn, self.mu)
            found[name] = result.T if is_turned else result
            learned = [each for each in learn if each is not None]
            if learned:
                self.activity[name] = sum(learned) + keep, is_turned
        return found


def _graphs(model, pieces):
    inputs = Inputs(model, pieces)
    found = {name: inputs.graph(name) for name in inputs.vectors}
    if getattr(model.config, "model_type", "") == "mixtral":
        found |= _graphs_of_experts(model, inputs)
    tied = getattr(model.config, "tie_word_embeddings", False)
    return {name: graph for name, graph in found.items() if not (tied and name == "lm_head")}


def _graphs_of_experts(model, inputs):
    """Of each router and each expert's matrices, under their names in files.

    An expert's are of the tokens routed to it.
    """
    tiny.skip_without_stacked_experts()
    found = {}
    for number, layer in enumerate(model.model.layers):
        x = np.concatenate(inputs.vectors[f"model.layers.{number}.mlp"])
        gate = layer.mlp.gate.weight.detach().double().numpy()
        chosen = np.argsort(x @ gate.T, axis=1)[:, -2:]
        up = layer.mlp.experts.gate_up_proj.detach().double().numpy()
        path = f"model.layers.{number}.block_sparse_moe"
        found[f"{path}.gate"] = _normalized(x)
        for expert in range(len(up)):
            own = x[(chosen == expert).any(1)]
            first, third = np.split(own @ up[expert].T, 2, axis=1)
            inside = first / (1 + np.exp(-first)) * third
            for matrix, vectors in (("w1", own), ("w3", own), ("w2", inside)):
                found[f"{path}.experts.{expert}.{matrix}"] = _normalized(vectors)
    return found


def _normalized(x):
    c = x.T @ x
    return c * len(c) / np.trace(c)


def assert_close(found, expected, tolerance=1e-5, activity=()):
    """The same tensors, to a share of each one's largest element.

    Args:
        activity: of matrices that are compared by what they make of inputs. What they do in
            directions that no input has depends on rounding.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in activity:
            graph, is_turned = activity[name]
            wrong, right = (m.T if is_turned else m for m in (found[name] - value, value))
            worst = np.linalg.norm(wrong @ graph) / np.linalg.norm(right @ graph)
            assert worst <= tolerance, (name, worst)
            continue
        difference = np.abs(found[name] - value).max()
        worst = difference / np.abs(value).max()
        assert worst <= tolerance, (name, worst)


LENGTH = 8
LOOK = ["--samples", "999", "--length", str(LENGTH)]


def write_models(path, kinds=("llama", "gpt2", "bert", "mixtral", "tied")):
    """A folder with models before and after tuning, of several kinds, and texts."""
    for seed, name in enumerate(("keep", "first", "second")):
        write_texts(path / f"{name}.txt", seed)
    write_texts(path / "labelled.tsv", 5, 60, labels=True)
    write_texts(path / "general.txt", 6, 60)
    for kind in kinds:
        (path / kind).mkdir()
        write_pair(path / kind, kind)
    (path / "classifier").mkdir()
    shutil.copytree(path / "bert" / "base", path / "classifier" / "base")
    classifiers_of(path / "classifier")
    return path


def lora(path, model, targets, task, **settings):
    """An adapter in `adapter`, the same merged by peft in `whole`."""
    torch.manual_seed(3)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2, target_modules=targets, task_type=task, init_lora_weights=False, **settings
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
                parameter.normal_()
    adapted.save_pretrained(path / "adapter")
    adapted.merge_and_unload().save_pretrained(path / "whole")
