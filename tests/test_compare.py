"""`spectral-ds compare` on tiny models: every way to train and what is done after, and going on."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from compared import METHODS, cells, compare, retain, rows_of, write_config, write_inputs
from merged import WORDS
from safetensors.numpy import load_file
from transformers import AutoTokenizer, BertForSequenceClassification

from spectral_ds.cli.compare.adapters import adapted
from spectral_ds.cli.compare.after import share_by_depth
from spectral_ds.cli.compare.material import Material
from spectral_ds.cli.compare.prepare import changed, prepare
from spectral_ds.cli.compare.results import Table
from spectral_ds.cli.compare.settings import load
from spectral_ds.cli.compare.state import State, contents_of
from spectral_ds.cli.errors import UserError
from spectral_ds.coactivation import Coactivation
from spectral_ds.coactivation.spectrum import spectrum_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_inputs(path)
    return path


TIMES = ("seconds", "step_seconds", "memory")
CURVE = 3  # so that the first point has the lowest loss of some run, and the last that of another


@pytest.fixture(scope="module")
def classified(folder):
    """The folder of the results."""
    out = folder / "classified"
    assert compare(write_config(folder, curve=CURVE), out, "--workers", "0") == 0
    return out


def test_two_processes_at_once_find_the_same(classified, folder, processes):
    config = write_config(folder, name="two", methods={"adamw": None})
    assert compare(config, folder / "two", "--workers", "2") == 0
    found, same = (
        {(row["seed"], row["alpha"]): row for row in cells(rows_of(out), "adamw", TIMES)}
        for out in (folder / "two", classified)
    )
    assert len(found) == 6
    assert found == same


def test_every_method_has_rows_of_every_seed_setting_and_interpolation(classified):
    rows = rows_of(classified)
    trained, settings = 3, {"retain": 2, "merge": 2}  # α of 1, 0 and 0.5
    for name, method in METHODS.items():
        after = 1 + len(method.get("interpolated", ())) if method and "after" in method else 0
        assert len(cells(rows, name)) == 2 * settings.get(name, 1) * (after or trained)
    for row in rows + rows_of(classified, "curves"):
        numbers = {n: float(c) for n, c in row.items() if n not in ("task", "method", "setting")}
        assert np.isfinite(list(numbers.values())).all(), row


def test_a_filter_that_changes_nothing_is_adamw_to_the_last_digit(classified):
    rows = rows_of(classified)
    assert cells(rows, "identity", TIMES) == cells(rows, "adamw", TIMES)


def test_nothing_is_forgotten_where_nothing_of_the_change_is_left(classified):
    rows = [row for row in rows_of(classified) if row["alpha"] == "0"]
    assert rows
    for row in rows:
        assert float(row["test.forgetting"]) == float(row["validation.forgetting"]) == 0
        assert float(row["perturbation"]) == 0


def test_a_merge_that_keeps_nothing_is_the_run_itself_but_for_what_has_no_inputs(classified):
    rows = rows_of(classified)
    whole = {row["seed"]: row for row in rows if row["method"] == "adamw" and row["alpha"] == "1"}
    merged = [row for row in rows if row["method"] == "merge" and row["alpha"] == "1"]
    assert len(merged) == 4
    for row in merged:
        share = float(row["perturbation"]) / float(whole[row["seed"]]["perturbation"])
        assert 0.5 < share < 1
        if row["setting"] == "mu=0":
            assert share > 0.9


@pytest.mark.parametrize("method", ["retain", "merge"])
def test_interpolation_moves_the_weights_by_its_share(classified, method):
    rows = [row for row in rows_of(classified) if row["method"] == method]
    assert any(0 < float(row["alpha"]) < 1 for row in rows)
    by_key = {(r["seed"], r["setting"], r["alpha"]): float(r["perturbation"]) for r in rows}
    for (seed, setting, alpha), value in by_key.items():
        assert value == pytest.approx(float(alpha) * by_key[seed, setting, "1"], rel=1e-4)


def test_the_curve_ends_with_the_validation_loss_of_the_run(classified):
    last = {
        (row["method"], row["setting"], row["seed"]): row["loss"]
        for row in rows_of(classified, "curves")
    }
    trained = {
        key: row["validation.loss"]
        for row in rows_of(classified)
        if row["alpha"] == "1" and (key := (row["method"], row["setting"], row["seed"])) in last
    }
    assert {name for name, _, _ in last} == {
        n for n in METHODS if "after" not in (METHODS[n] or {})
    }
    assert trained == last


def test_early_stopping_has_the_lowest_loss_of_the_curve(classified):
    losses = {}
    for row in rows_of(classified, "curves"):
        if row["method"] == "adamw":
            losses.setdefault(row["seed"], []).append(float(row["loss"]))
    early = {row["seed"]: row for row in rows_of(classified) if row["method"] == "early"}
    assert early.keys() == losses.keys() == {"0", "1"}
    assert any(min(each) < each[-1] for each in losses.values())
    for seed, row in early.items():
        assert float(row["validation.loss"]) == min(losses[seed])


def test_by_depth_a_part_of_the_change_is_left(classified):
    rows = rows_of(classified)
    whole = {row["seed"]: row for row in rows if row["method"] == "adamw" and row["alpha"] == "1"}
    by_depth = [row for row in rows if row["method"] == "by depth"]
    assert len(by_depth) == 2
    for row in by_depth:
        share = float(row["perturbation"]) / float(whole[row["seed"]]["perturbation"])
        assert 0.3 < share < 1


def test_the_report_has_every_method_and_its_figures(classified):
    report = (classified / "report.md").read_text()
    assert all(f"| {name} |" in report for name in METHODS)
    assert "adamw, interpolated" in report
    for name in ("frontier-forgetting-words.png", "curves-words.png"):
        assert (classified / name).stat().st_size > 1000
        assert f"({name})" in report


def test_rows_that_are_lost_are_measured_again_and_come_out_the_same(classified, folder):
    before = rows_of(classified)
    lines = (classified / "results.csv").read_text().splitlines()
    lost = ("adamw,", "lora,", "merge,")
    kept = [
        line for line in lines if not (",0," in line and line.split(",", 1)[1].startswith(lost))
    ]
    (classified / "results.csv").write_text("\n".join(kept) + "\nwords,adamw,,0.0")  # cut
    assert len(kept) < len(lines)
    words = ("--resume", "--workers", "0", "only=[adamw,lora,merge]")
    assert compare(folder / "config.yaml", classified, *words) == 0

    def known(rows):
        return sorted(str({n: c for n, c in row.items() if n not in TIMES}) for row in rows)

    assert known(rows_of(classified)) == known(before)


@pytest.mark.parametrize("left", ["2e", "2e-", "2e-0", "2e-05", "2e-05\r"])
def test_a_value_that_is_cut_is_measured_again(tmp_path, left):
    path, columns = tmp_path / "curves.csv", ("step", "loss")
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 2e-05}]
    Table(path, columns, ("step",)).add(rows)
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"2e-05\r\n") + left.encode())
    table = Table(path, columns, ("step",))
    assert table.rows == rows[:1]
    table.add(rows)
    assert path.read_bytes() == whole


def test_a_report_leaves_the_tables_as_they_are(classified, folder, tmp_path):
    """Another process may be adding rows to them."""
    for name in ("comparison.json", "results.csv", "curves.csv"):
        shutil.copy(classified / name, tmp_path)
    results = tmp_path / "results.csv"
    with results.open("a") as file:
        file.write("words,adamw,,0.0")  # is being written
    content, file = results.read_bytes(), results.stat().st_ino
    assert compare(folder / "config.yaml", tmp_path, "--report") == 0
    assert (results.read_bytes(), results.stat().st_ino) == (content, file)


def test_language_models_are_compared_by_loss_and_divergence(folder):
    methods = {name: METHODS[name] for name in ("adamw", "learn", "merge", "osf")}
    (folder / "task.txt").write_text(
        "\n".join(line.split("\t")[1] for line in (folder / "task.tsv").read_text().splitlines())
    )
    tasks = {"words": {"data": str(folder / "task.txt"), "steps": 2}}
    config = write_config(folder, "causal-lm", "language", methods=methods, tasks=tasks, seeds=[0])
    out = folder / "language"
    assert compare(config, out, "--workers", "0") == 0
    for row in rows_of(out):
        before = float(row["alpha"]) == 0
        for name in ("test.divergence", "test.forgetting"):
            value = float(row[name])
            assert np.isfinite(value), row
            assert (abs(value) < 1e-6) == before


def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "bert")


@pytest.mark.parametrize("held_out", ["same", "by_seed"])
def test_what_is_held_out_is_the_same_for_all_seeds_or_drawn_by_each(folder, held_out):
    config = write_config(folder, name=held_out, held_out=held_out)
    comparison, _ = load(config, [], False)
    of_seeds = []
    for seed in (1, 1, 2):
        material = Material(comparison, tokenizer(folder), seed)
        task = material.task("words")
        of_seeds.append((task.held_out, material.general))
        seen = {tuple(ids) for ids in task.trained_ids(comparison.tasks["words"], 4, seed)}
        assert not seen & {tuple(ids) for part in task.held_out.values() for ids in part}
    first, again, other = of_seeds
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert (one == two) == (held_out == "same")


def test_examples_of_each_class_are_drawn_by_the_seed(folder):
    config = write_config(
        folder, name="few", tasks={"few": {"data": str(folder / "task.tsv"), "per_class": 5}}
    )
    comparison, _ = load(config, [], False)
    task = Material(comparison, tokenizer(folder), 0).task("few")
    config = replace(comparison.tasks["few"], steps=5)
    drawn = [task.trained_ids(config, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # An epoch is 3 whole batches; 5 leave out at most what the second has left.
    assert all(12 <= len(each) <= 15 for each in drawn)
    held_out = {tuple(ids) for part in task.held_out.values() for ids in part}
    assert not held_out & {tuple(ids) for ids in drawn[0]}


def test_classes_may_be_numbered_from_one(folder, tmp_path):
    lines = (folder / "task.tsv").read_text().splitlines()
    path = tmp_path / "from one.tsv"
    path.write_text("".join(f"{1 + int(line[0])}{line[1:]}\n" for line in lines))
    tasks = {"few": {"data": str(path), "per_class": 5}}
    comparison, _ = load(write_config(folder, name="from one", tasks=tasks), [], False)
    task = Material(comparison, tokenizer(folder), 0).task("few")
    assert len(task.trained_ids(replace(comparison.tasks["few"], steps=9), 5, 0)) == 15


def test_what_a_run_has_learned_from_is_what_stood_in_its_batches(folder):
    """`learn: training` of a merge: not what else could have been drawn."""
    config = write_config(folder, name="seen")
    comparison, _ = load(config, [], False)
    task = Material(comparison, tokenizer(folder), 0).task("words")
    settings = replace(comparison.tasks["words"], steps=3)
    seen = {tuple(ids) for ids in task.trained_ids(settings, 4, 1)}
    batches = itertools.islice(task.batches(settings, 4, 1), 3)
    used = {
        tuple(ids[mask == 1].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert seen == used
    assert len(task.training) > 12


def test_by_depth_the_share_rises_from_the_first_block_to_the_last(folder):
    model = BertForSequenceClassification.from_pretrained(folder / "bert")
    share = share_by_depth(model, 0.2)
    layer = "bert.encoder.layer.{}.output.dense.weight"
    assert share("bert.embeddings.word_embeddings.weight") == pytest.approx(0.2)
    assert (share(layer.format(0)), share(layer.format(1))) == pytest.approx((0.2, 1.0))
    assert share("classifier.weight") == 1.0


def test_osf_moves_no_weight_along_its_largest_singular_directions(folder):
    model = BertForSequenceClassification.from_pretrained(folder / "bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    before = model.get_parameter(name).detach().double().clone()
    wrapped, unload = adapted("osf", model, {"effective_rank": 0.5})
    ids = torch.randint(2, len(WORDS), (4, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    change = unload().get_parameter(name).detach().double() - before
    u, _, v = torch.linalg.svd(before)
    kept = len(before) // 2
    assert change.norm() > 0
    along = u[:, :kept].T @ change @ v[:kept].T
    assert float(along.norm()) < 1e-4 * float(change.norm())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"learning_rate": [1]}, "unknown key; nearest: comparison.learning_rates",
                     id="a misspelt key"),
        pytest.param({"seeds": []}, "seeds", id="nothing to run"),
        pytest.param({"methods": {"adamw": {"optimiser": "muon"}}},
                     "methods.adamw.optimizer", id="a misspelt key of a method"),
        pytest.param({"methods": {"adamw": {"optimizer": "adam"}}},
                     "one of adamw, muon", id="no such optimizer"),
        pytest.param({"methods": {"adamw": {"dial": {"optoins.r": [1]}}}},
                     "dial.optoins.r: must begin with", id="a dial of nothing"),
        pytest.param({"methods": {"adamw": {"section": retain("statistics.no")}}},
                     "statistics.no is not under statistics", id="no such statistics"),
        pytest.param({"methods": {"adamw": {"adapter": "lora"},
                                  "early": {"after": "adamw", "by": "early_stopping"}}},
                     "not after adapter lora", id="early stopping of an adapter"),
        pytest.param({"only": ["x"]}, "only = x: is none of adamw", id="only what there is not"),
        pytest.param({"drawn": ["x"]}, "drawn = x: is none of adamw", id="drawn what there is not"),
        pytest.param({"baseline": "sgd"}, "baseline = sgd", id="no such baseline"),
        pytest.param({"methods": {"adamw": None, "m": {"after": "adamw"}}},
                     "`after` a method and `by`", id="after without by"),
        pytest.param({"methods": {"adamw": None, "m": {"after": "x", "by": "merge"}}},
                     "methods.m.after = x", id="after nothing"),
        pytest.param({"methods": {"adamw": {"section": {"filter": {"tao": 1}}}}},
                     "spectral_ds.filter.tau", id="a wrong section"),
        pytest.param({"methods": {"adamw": {"dial": {"options.r": 1}}}},
                     "must be a list of values", id="a dial of one value"),
        pytest.param({"tasks": {"words": {"data": "/nowhere.tsv"}}}, "/nowhere.tsv",
                     id="no such text"),
        pytest.param({"general": {"other": {"data": "/nowhere.txt"}}}, "/nowhere.txt",
                     id="no such general text"),
        pytest.param({"tasks": {"good/books": {"data": "{folder}/task.tsv"}}},
                     "tasks.good/books: must be a name that files can have", id="no file's name"),
        pytest.param({"tasks": {"x" * 201: {"data": "{folder}/task.tsv"}}},
                     "at most 200 bytes", id="too long a name"),
        pytest.param({"test": 5000}, "is too short", id="more held out than there is"),
        pytest.param({"model": "/nowhere"}, "/nowhere", id="no such model"),
        pytest.param({"statistics": {"own": {"keep": "{folder}/general.txt"}}},
                     "statistics.own.keep", id="what is measured is kept"),
        pytest.param({"methods": {"adamw": {"section": retain("{folder}/general.txt")}}},
                     "is what general.other measures", id="it is kept in training"),
        pytest.param({"general": {"other": {"data": "{folder}/general.txt", "texts": 31}}},
                     "general.other.texts = 31: there are only 30", id="few general texts"),
        pytest.param({"tasks": {"words": {"data": "{folder}/task.tsv", "examples": 81}}},
                     "tasks.words.examples = 81: there are only 80", id="few examples"),
        pytest.param({"tasks": {"words": {"data": "{folder}/task.tsv", "per_class": 40}}},
                     "tasks.words.per_class = 40: there are only", id="few of a class"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_before_anything_is_trained(
    folder, tmp_path, capsys, changes, said
):
    named = json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    config = write_config(folder, name="wrong", **({"methods": {"adamw": None}} | named))
    assert compare(config, tmp_path / "out", "--workers", "0") == 2
    wrong = capsys.readouterr().err
    assert said in wrong
    assert "Traceback" not in wrong


def test_results_of_other_settings_are_not_mixed(folder, classified, capsys):
    config = write_config(folder, name="other", curve=CURVE, batch_size=4)
    assert compare(config, classified, "--resume") == 2
    assert "batch_size = 8, not 4" in capsys.readouterr().err
    methods = METHODS | {"lora": {"adapter": "lora", "options": {"r": 2}, "rate": 10.0}}
    config = write_config(folder, name="other", curve=CURVE, methods=methods)
    assert compare(config, classified, "--resume") == 2
    assert "methods.lora" in capsys.readouterr().err
    assert compare(config, classified, "--report", "only=[adamw]") == 0  # it has no part in this


def test_a_dial_may_have_other_values_but_no_other_path(folder, classified, capsys):
    """Rows name a path by its last key: those of another path would pass for its own."""
    for dial, status in (
        ({"section.filter.tau": [0.3, 2.0]}, 0),
        ({"section.filter.rest": [0.3, 1.0]}, 2),
        ({}, 2),
    ):
        methods = METHODS | {"retain": METHODS["retain"] | {"dial": dial}}
        config = write_config(folder, name="dials", curve=CURVE, methods=methods)
        assert compare(config, classified, "--report") == status
    assert 'with methods.retain = {"section"' in capsys.readouterr().err


def test_results_of_other_texts_are_not_mixed(folder, classified, capsys):
    general = folder / "general.txt"
    content = general.read_text()
    general.write_text(content + "one more\n")
    try:
        assert compare(folder / "config.yaml", classified, "--resume") == 2
    finally:
        general.write_text(content)
    assert "another content of general.other.data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"section": retain("{file}")}, "section.graph.edges.0.keep"),
        ({"section": retain("random", learn="{file}")}, "section.graph.edges.0.learn"),
        ({"after": "adamw", "by": "merge", "options": {"keep": "{file}"}}, "options.keep"),
        ({"after": "adamw", "by": "merge", "dial": {"options.learn": ["training", "{file}"]}},
         "dial.options.learn = {file}"),
    ],
    ids=["section", "learn", "options", "dial"],
)  # fmt: skip
def test_results_of_other_texts_that_methods_read_are_not_mixed(folder, tmp_path, method, key):
    file = tmp_path / "texts.txt"
    method, key = json.loads(json.dumps([method, key]).replace("{file}", str(file)))
    methods = {"adamw": None, "reads": method}
    comparison, written = load(write_config(folder, name="reads", methods=methods), [], False)
    state = State(tmp_path / "out")

    def begin(contents, goes_on):
        with state.begun(written, contents, goes_on, True):
            pass

    old = contents_of(comparison)
    assert not any(name.startswith("methods.") for name in old)
    begin(old, False)
    file.write_text("one")  # as results of a version that knew nothing of it
    begin(contents_of(comparison), True)
    begin(contents_of(comparison), True)
    file.write_text("two")
    with pytest.raises(UserError, match=f"another content of methods.reads.{key}$"):
        begin(contents_of(comparison), True)
    assert contents_of(replace(comparison, only=("adamw",))) == old  # it has no part in this


def test_words_that_name_no_file_are_not_taken_for_folders(folder, tmp_path, monkeypatch):
    """A folder `training` beside is not what `learn: training` means."""
    monkeypatch.chdir(tmp_path)
    for name in ("random", "training", "retain"):
        (tmp_path / name).mkdir()
    comparison, _ = load(write_config(folder, name="words"), [], False)
    assert {key.partition(".")[0] for key in contents_of(comparison)} == {
        "model", "tasks", "general"
    }  # fmt: skip


def test_a_folder_that_holds_something_is_not_written_over(folder, classified, tmp_path, capsys):
    assert compare(folder / "config.yaml", classified) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert compare(folder / "config.yaml", tmp_path / "new", "--resume") == 2
    assert "no comparison to go on with" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert compare(folder / "config.yaml", tmp_path / "file" / "new") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file" / "new") in line


def test_quick_sets_what_the_file_says(folder):
    config = write_config(folder, name="quick", quick={"seeds": [7]})
    assert load(config, [], True)[0].seeds == (7,)
    assert load(config, [], False)[0].seeds == (0, 1)
    assert load(config, ["seeds=[3]"], True)[0].seeds == (3,)


def test_a_file_may_extend_one_that_extends_another(folder, tmp_path, capsys):
    write_config(folder, name="first", quick={"seeds": [7]})
    (folder / "second.yaml").write_text("extends: first.yaml\nbatch_size: 5\ntest: 6\n")
    task = f"{{data: {folder / 'task.tsv'}}}"
    third = folder / "third.yaml"
    third.write_text(f"extends: second.yaml\ntest: 7\ntasks: {{own: {task}}}\n")
    found, written = load(third, [], True)
    assert (found.batch_size, found.test, found.seeds) == (5, 7, (7,))
    assert list(found.tasks) == ["own"]
    assert "extends" not in written
    (folder / "first.yaml").write_text("extends: third.yaml\n")
    assert compare(third, tmp_path / "out") == 2
    assert f"first.yaml extends {third}, and so on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "quick", "said"),
    [
        ("extends=other.yaml", None, "extends=other.yaml: extends can only stand at the top of"),
        ("quick.seeds=[7]", None, "quick.seeds=[7]: quick can only stand at the top of a file"),
        ("test=24", {"extends": "x"}, "quick: extends can only stand at the top of a file"),
        ("test=24", [1], "quick: cannot be merged into the file's keys"),
        ("seeds.0=4", None, "seeds.0=4: cannot be merged into the file's keys"),
        ("seeds=[4", None, "seeds=[4: cannot be merged into the file's keys"),
        ("only=adamw", None, 'only = "adamw": must be a list of methods\' names'),
        ("baseline=", None, "baseline = null: must be a method's name"),
        ("methods.lora.after=3", None, "methods.lora.after = 3: must be a method's name"),
    ],
)
def test_what_goes_over_the_file_and_cannot_be_used_is_named(folder, word, quick, said):
    (folder / "other.yaml").write_text("seeds: [9]\n")
    with pytest.raises(UserError, match=re.escape(said)):
        load(write_config(folder, name="over", quick=quick), [word], True)


def test_a_name_that_is_a_number_is_refused(folder):
    path = folder / "number.yaml"
    path.write_text("extends: config.yaml\ntasks: {2024: {data: task.tsv}}\n")
    write_config(folder)
    with pytest.raises(UserError, match=r"tasks\.2024: must be text"):
        load(path, [], False)


def test_a_control_is_made_of_the_statistics_that_are_there(folder, tmp_path, monkeypatch):
    comparison, _ = load(write_config(folder, name="controls"), [], False)
    control = prepare(comparison, tmp_path, 2).files["shuffled"]
    made = load_file(control)
    control.unlink()
    monkeypatch.setattr("spectral_ds.cli.compare.prepare.look", None)  # looking takes long
    again = load_file(prepare(comparison, tmp_path, 2).files["shuffled"])
    assert again.keys() == made.keys()
    assert all(np.array_equal(again[name], array) for name, array in made.items())
    control.unlink()
    (tmp_path / "statistics" / "random.safetensors").write_bytes(b"no statistics")
    with pytest.raises(UserError, match=r"random\.safetensors: it cannot be read.*delete it"):
        prepare(comparison, tmp_path, 2)


def test_the_diagonal_has_the_activity_of_each_node_and_no_edge():
    random = np.random.default_rng(0)
    vectors = np.linalg.qr(random.normal(size=(6, 6)))[0].astype(np.float32)
    spectrum = spectrum_of(np.array([3.0, 1.5, 0.9, 0.3, 0.2, 0.1]), vectors)
    graphs = Coactivation({"w": "w"}, {"w": [spectrum]})
    (diagonal,), (shuffled,) = (changed(graphs, how).of("w") for how in ("diagonal", "shuffled"))
    np.testing.assert_allclose(diagonal.matrix(), np.diag(np.diag(spectrum.matrix())), atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(shuffled.matrix()), np.linalg.eigvalsh(spectrum.matrix()), atol=1e-6
    )
    assert not np.allclose(shuffled.matrix(), spectrum.matrix(), atol=0.1)
