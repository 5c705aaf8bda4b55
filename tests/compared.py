"""Comparisons of tiny models by `spectral-ds compare`: what they read, and what they write."""

import csv
import json

import torch
from merged import CLASSES, CONFIGS, write_texts, write_tokenizer

from spectral_ds.cli import main

LOOK = {"rank": 8, "samples": 8, "length": 8}


def retain(keep, **edge):
    edge = {"family": "activations", "rank": 8, "keep": keep, **edge}
    return {"preset": "retain", "graph": {"node": "column", "edges": [edge]}}


METHODS = {
    "adamw": None,
    "identity": {"section": {"preset": "observe"}},
    "retain": {"section": retain("statistics.random"), "dial": {"section.filter.tau": [0.3, 1.0]}},
    "learn": {"section": retain("random", learn="training", samples=4, length=8)},
    **({"muon": {"optimizer": "muon"}} if hasattr(torch.optim, "Muon") else {}),
    "lora": {"adapter": "lora", "options": {"r": 4}, "rate": 10.0},
    "osf": {"adapter": "osf", "options": {"effective_rank": 0.5}},
    "by depth": {"after": "adamw", "by": "by_depth", "dial": {"options.alpha": [0.3]}},
    "early": {"after": "adamw", "by": "early_stopping"},
    "merge": {
        "after": "adamw",
        "by": "merge",
        "options": {"keep": "statistics.shuffled", "learn": "training", **LOOK, "rest": 0.5},
        "dial": {"options.mu": [0, 1]},
        "interpolated": [0.5],
    },
}  # fmt: skip


def write_inputs(path):
    """Two models with tokenizers, texts with classes, and texts of another kind."""
    for kind in ("llama", "bert"):
        torch.manual_seed(0)
        CLASSES[kind](CONFIGS[kind]).save_pretrained(path / kind)
        write_tokenizer(path / kind)
    write_texts(path / "task.tsv", 0, 120, labels=True)
    write_texts(path / "general.txt", 1, 60)


def write_config(folder, kind="classification", name="config", **changes):
    task = {"data": str(folder / "task.tsv"), "steps": 3, "examples": 40}
    content = {
        "model": str(folder / ("bert" if kind == "classification" else "llama")),
        "kind": kind,
        "batch_size": 8,
        "sequence_length": 12,
        "learning_rates": [0.01],
        "seeds": [0, 1],
        "validation": 16,
        "test": 24,
        "curve": 2,
        "interpolated": [0.0, 0.5],
        "tasks": {"words": task},
        "general": {"other": {"data": str(folder / "general.txt"), "texts": 24}},
        "statistics": {
            "random": {"keep": "random", **LOOK},
            "shuffled": {"keep": "random", "change": "shuffled", **LOOK},
        },
        "methods": METHODS,
    }
    path = folder / f"{name}.yaml"  # JSON is YAML
    path.write_text(json.dumps(content | changes))
    return path


def compare(config, out, *words):
    return main(["compare", "--config", str(config), "--out", str(out), *words])


def rows_of(out, table="results"):
    with (out / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cells(rows, method, but=()):
    return [
        {name: cell for name, cell in row.items() if name not in ("method", *but)}
        for row in rows
        if row["method"] == method
    ]
