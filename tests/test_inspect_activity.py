"""`spectral-ds inspect` of activations: what dense numpy finds of the same text; configurations."""

import json

import corpus
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_ds.cli import main
from spectral_ds.cli.inspect import batches
from spectral_ds.text import read_texts

STEPS, SIZE, LENGTH = 4, 2, 16
SIZES = ["--steps", str(STEPS), "--batch-size", str(SIZE), "--sequence-length", str(LENGTH)]
DIRECTIONS = (8, 32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("activity")
    corpus.write(path)
    return path


def inspected(capsys, folder, *words):
    assert main(["inspect", str(folder / "model"), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Dense:
    """A model's activations and gradients, whole."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        size = {"batches": STEPS, "batch_size": SIZE, "sequence_length": LENGTH, "seed": 0}
        texts = read_texts(folder / "reviews.tsv")
        self.text = batches.token_batches(texts, self.tokenizer, **size)
        generator = torch.Generator().manual_seed(0)
        half = STEPS // 2 * SIZE
        vocabulary = self.model.config.vocab_size
        random = torch.randint(vocabulary, (half, LENGTH), generator=generator)
        self.half = {"random tokens": random, "the data": self.text[: STEPS // 2]}

    def eigenpairs(self, tokens):
        """Of A, by parameter, the most active first."""
        moments, handles = {}, []
        for name, module in self.model.named_modules():
            if "_proj" in name:

                def see(_, args, name=f"{name}.weight"):
                    x = args[0].double().numpy().reshape(-1, args[0].shape[-1])
                    moments[name] = moments.get(name, 0) + x.T @ x

                handles.append(module.register_forward_pre_hook(see))
        with torch.no_grad():
            self.model(tokens.reshape(-1, tokens.shape[-1]))
        for handle in handles:
            handle.remove()
        found = {}
        for name, c in moments.items():
            values, vectors = np.linalg.eigh(len(c) * c / np.trace(c))
            found[name] = values[::-1], vectors[:, ::-1]
        return found

    def energies(self, pairs):
        """Of the gradients of the second half, by parameter, along each direction."""
        found = {name: np.zeros(len(values)) for name, (values, _) in pairs.items()}
        for tokens in self.text[STEPS // 2 :]:
            self.model.zero_grad()
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            for name, parameter in self.model.named_parameters():
                if name in found:
                    x = parameter.grad.double().numpy() @ pairs[name][1]
                    found[name] += np.square(x).sum(axis=0)
        return found


def of_role(names, role):
    head, tail = role.split("*")
    return [name for name in names if name.startswith(head) and name.endswith(tail)]


def shares(energies):
    total = sum(energy.sum() for energy in energies)
    return [sum(energy[:k].sum() for energy in energies) / total for k in DIRECTIONS]


def test_shares_of_the_gradient_are_those_of_dense_numpy(folder, capsys, tmp_path):
    out = tmp_path / "out"
    words = ["--data", str(folder / "reviews.tsv"), *SIZES, "--out", str(out)]
    summary, dense = inspected(capsys, folder, *words), Dense(folder)
    assert [each["name"] for each in summary["activity"]] == ["random tokens", "the data"]
    for report in summary["activity"]:
        pairs = dense.eigenpairs(dense.half[report["name"]])
        energies = dense.energies(pairs)
        np.testing.assert_allclose(report["gradient"], shares(energies.values()), rtol=1e-4)
        sizes = {name: len(values) for name, (values, _) in pairs.items()}
        total = sum(e.sum() for e in energies.values())
        chance = [
            sum(e.sum() * min(1, k / sizes[n]) for n, e in energies.items()) / total
            for k in DIRECTIONS
        ]
        np.testing.assert_allclose(report["by_chance"], chance, rtol=1e-4)
        assert [len(role["roles"]) for role in report["roles"]] == [3, 1, 2, 1]
        for role in report["roles"]:
            names = [n for each in role["roles"] for n in of_role(energies, each)]
            np.testing.assert_allclose(
                role["gradient"], shares([energies[n] for n in names]), rtol=1e-4
            )
            values = [pairs[n][0] for n in of_role(energies, role["roles"][0])]
            median = np.median(values, axis=0)[: len(role["eigenvalues"])]
            np.testing.assert_allclose(role["eigenvalues"], median, rtol=2e-3, atol=1e-5)
            held = [np.cumsum(each) / len(each) for each in values]
            for share, key in ((0.5, "holding_half"), (0.9, "holding_most")):
                counts = sorted(int((each < share).sum()) + 1 for each in held)
                assert role[key] == counts[len(counts) // 2]
            assert role["graphs"] == len(values) == 3
            assert role["inputs"] == len(values[0])
    random, data = (f"{100 * each['gradient'][0]:.0f} %" for each in summary["activity"])
    assert summary["activity_words"].startswith(f"{random} of the gradient goes along the 8 dir")
    assert f"{data} along those that the data uses most" in summary["activity_words"]
    assert (out / "activity.png").stat().st_size > 10_000
    assert json.loads((out / "summary.json").read_text())["activity"] == summary["activity"]
    assert "activations" not in json.dumps(summary["candidates"])


def written(tmp_path, text):
    path = tmp_path / "spectral.yaml"
    path.write_text(text)
    return ["--config", str(path)]


ACTIVATIONS = "{node: column, edges: [{family: activations, length: 16, %s}]}"


def test_a_graph_of_activations_is_looked_at_without_data(folder, capsys, tmp_path):
    config = written(tmp_path, f"graph: {ACTIVATIONS % 'keep: random, samples: 8, rank: 16'}")
    summary = inspected(capsys, folder, *config, "--out", str(tmp_path / "out"))
    assert summary["graphs"] == []
    assert summary["candidates"] is summary["activity_words"] is None
    [report] = summary["activity"]
    assert report["name"] == "graph, keep random"
    assert report["gradient"] is None
    for role in report["roles"]:
        values = role["eigenvalues"]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(role["inputs"], rel=0.02)  # all directions are known
        assert role["gradient"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "activity.png"}
    assert main(["inspect", str(folder / "model"), *config]) == 0
    out = capsys.readouterr().out
    assert "activity of graph, keep random" in out
    assert "Laplacian" not in out


def test_what_is_kept_and_learned_may_be_files(folder, capsys, tmp_path):
    files = {"keep": folder / "other.txt", "learn": folder / "reviews.tsv"}
    edge = ", ".join(f"{what}: '{file}'" for what, file in files.items())
    section = f"graphs: [{ACTIVATIONS % edge}, {{edges: [{{family: depth}}]}}]"
    section += "\nfilter: {response: tikhonov, apply_to: update}"
    words = ["--data", str(files["learn"]), *SIZES]
    summary, dense = inspected(capsys, folder, *written(tmp_path, section), *words), Dense(folder)
    names = [each["name"] for each in summary["activity"]]
    of_files = [f"graphs[0], {what} {file}" for what, file in files.items()]
    assert names == ["random tokens", "the data", *of_files]
    keep, learn = (each["gradient"] for each in summary["activity"][2:])
    assert keep != learn
    for found, file in zip((keep, learn), files.values(), strict=True):
        ids = torch.tensor(dense.tokenizer(read_texts(file))["input_ids"])  # of equal length
        energies = dense.energies(dense.eigenpairs(ids))
        # Of 8 directions; few words do not make 32.
        assert found[0] == pytest.approx(shares(energies.values())[0], rel=1e-4)
    assert [graph["name"] for graph in summary["graphs"]] == ["graphs[1]"]


def test_statistics_of_lower_rank_are_looked_at_as_they_are(folder, capsys, tmp_path):
    model = folder / "model"
    words = ["--keep", "random", "--rank", "8", "--samples", "8", "--length", "16"]
    assert main(["merge", str(model), str(model), *words, "--out", str(tmp_path / "out")]) == 0
    keep = tmp_path / "out" / "statistics" / "keep.safetensors"
    capsys.readouterr()
    config = written(tmp_path, f"graph: {ACTIVATIONS % f'rank: 8, keep: {keep}'}")
    [report] = inspected(capsys, folder, *config)["activity"]
    assert report["name"] == f"graph, keep {keep}"
    assert all(len(role["eigenvalues"]) == 8 for role in report["roles"])


def test_inputs_that_are_given_in_training_are_not_there_before(folder, capsys, tmp_path):
    config = written(tmp_path, f"graph: {ACTIVATIONS % 'keep: given'}")
    assert inspected(capsys, folder, *config)["activity"] == []


def test_a_file_that_is_not_there_is_one_line(folder, capsys, tmp_path):
    config = written(tmp_path, f"graph: {ACTIVATIONS % 'keep: nowhere.txt'}")
    assert main(["inspect", str(folder / "model"), *config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'spectral_ds.graph.edges[0].keep = "nowhere.txt": no such file or folder' in error
