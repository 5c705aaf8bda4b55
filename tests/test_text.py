"""Local text as launch/finetune.py reads it: every format, every kind of bad file."""

import json
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))

from spectral_ds.cli.examples import Corpus, batches, language_modelling_examples, load_corpus
from spectral_ds.cli.inspect.batches import token_batches
from spectral_ds.coactivation import text_batches
from spectral_ds.text import (
    Chat,
    DataError,
    begin_of,
    encoded,
    pieces_of,
    read_learnable,
    read_texts,
)

ROWS = [("a fine film", 1), ("no plot", 0), ("the best cast", 1)]


def write(path, kind):
    """ROWS in one of the formats; the path to load."""
    if kind == "headless.tsv":
        content = "".join(f"{i}\t{2 * label - 1}\t{text}\n" for i, (text, label) in enumerate(ROWS))
    elif kind == "header.tsv":
        content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
    elif kind == "objects.jsonl":
        content = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS)
    elif kind == "lines.txt":
        content = "\n".join(text for text, _ in ROWS)
    elif kind == "passages.txt":
        content = "\n\n".join(text for text, _ in ROWS)
    else:
        columns = {"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}
        datasets.Dataset.from_dict(columns).save_to_disk(str(path / kind))
        return path / kind
    (path / kind).write_text(content)
    return path / kind


@pytest.mark.parametrize(
    "kind",
    ["headless.tsv", "header.tsv", "objects.jsonl", "lines.txt", "passages.txt", "dataset"],
)
def test_each_format_gives_the_texts(tmp_path, kind):
    corpus = load_corpus(write(tmp_path, kind), labelled=False)
    assert corpus.texts == [text for text, _ in ROWS]
    assert corpus.labels is None


@pytest.mark.parametrize("kind", ["headless.tsv", "header.tsv", "objects.jsonl", "dataset"])
def test_labels_become_classes(tmp_path, kind):
    corpus = load_corpus(write(tmp_path, kind), labelled=True)
    assert corpus.labels == [label for _, label in ROWS]
    assert corpus.num_classes == 2


@pytest.mark.parametrize(
    ("name", "content", "labelled", "message"),
    [
        ("gone.tsv", None, False, "no such file"),
        ("null.jsonl", '{"text": "good"}\n{"text": null}', False, "line 2 has no 'text': null"),
        ("empty.tsv", "\n \n", False, "no text"),
        ("one.tsv", "text only\n", True, "line 1 has only 1 column"),
        ("cut.jsonl", '{"text": "a"}\n{"text"\n', False, "line 2 is not JSON"),
        ("keys.jsonl", '{"words": "a"}\n', False, "line 1 is not an object with 'text'"),
        ("plain.txt", "a film", True, "no labels"),
        ("same.tsv", "a\tgood\tfilm\nb\tgood\tplot\n", True, "only one class"),
        ("ones.tsv", "1\tfilm\n1\tplot\n", True, "only one class"),
        ("header.tsv", "sentence\tlabel\na film\t0\n", False, "no column 'text', only sentence"),
        ("header.tsv", "sentence\tlabel\na film\t0\n", True, "no column 'text', only sentence"),
        ("table.csv", "text,label\na film,0\n", False, "CSV is not read"),
        ("none.tsv", "0\tfilm\n2\tplot\n-1\tcast\n", True, "labels -1 to 2"),
        ("stars.tsv", "0.5\tfilm\n4.5\tplot\n", True, "labels 0.5 to 4.5"),
        ("names.tsv", "mood\treview\n0\tfilm\n1\tplot\n", True, "line 1 has the label 'mood', and"),
        ("name.tsv", "0\tfilm\n1\tplot\nx\tcast\n", True, "line 3 has the label 'x', and all o"),
        ("blank.tsv", "0\tfilm\n1\tplot\n\tcast\n", True, "line 3 has the label '': leave out"),
        ("null.jsonl", '{"text": "a", "label": null}', True, "line 1 has the label None: leave"),
        ("nan.jsonl", '{"text": "a", "label": NaN}', True, "line 1 has the label nan: leave"),
        ("nan.tsv", "-1\tfilm\nnan\tplot\n1\tcast\n", True, "has the label nan"),
        ("tab.tsv", "label\ttext\n0\ta\tb\n", True, "line 2 has 3 columns, and the header 2: a t"),
        ("tab.tsv", "label\ttext\n0\ta\tb\n", False, "line 2 has 3 columns, and the header 2"),
        ("tab.tsv", "0\ta\n1\tb\tc\n", True, "line 2 has 3 columns, and line 1 2"),
        ("ids.tsv", "100001\ta\n100000\tb\n", True, "2 classes, with numbers up to 100001: number"),
    ],
)
def test_bad_data_is_one_message(tmp_path, name, content, labelled, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_corpus(tmp_path / name, labelled=labelled)


@pytest.mark.parametrize(
    ("content", "labels", "num_classes"),
    [
        ("1\ta\n2\tb\n5\tc\n4\td\n", [1, 2, 5, 4], 6),
        ("7\t0\ta\n8\t1\tb\n0\tc\n", [0, 1, 0], 2),
        ("text\tlabel\tid\na\tno\nb\t3\t9\n", [1, 0], 2),
        ("no\ta\n3\tb\n", [1, 0], 2),
    ],
)
def test_gaps_of_classes_and_short_lines_are_read(tmp_path, content, labels, num_classes):
    (tmp_path / "data.tsv").write_text(content)
    corpus = load_corpus(tmp_path / "data.tsv", labelled=True)
    assert (corpus.labels, corpus.num_classes) == (labels, num_classes)


def test_a_dataset_without_a_label_names_the_row(tmp_path):
    columns = {"text": ["a", "b"], "label": [1, None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match="row 1 has the label None"):
        load_corpus(tmp_path / "data", labelled=True)


def test_plain_text_has_no_columns(tmp_path):
    (tmp_path / "plain.txt").write_text("a film")
    with pytest.raises(DataError, match="no column 'review'"):
        read_texts(tmp_path / "plain.txt", "review")


MESSAGES = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "no plot"}]
TRAINED_ON = [
    ({"messages": MESSAGES}, "<user>a film<assistant>no plot"),
    ({"messages": MESSAGES, "tools": '[{"name": "see"}]'}, "[see]<user>a film<assistant>no plot"),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "<user>a film<assistant>no plot"),
    ({"prompt": "a film: ", "completion": "no plot"}, "^a film: no plot"),
    ({"text": "the cast", "messages": MESSAGES}, "^the cast"),
]


class Characters:
    """A tokenizer of characters, with a token before each text and a chat template."""

    name_or_path, chat_template = "characters", "its own"

    def __call__(self, texts, truncation, max_length, verbose):
        return {"input_ids": [[*map(ord, f"^{text}")][:max_length] for text in texts]}

    def apply_chat_template(self, messages, tools, return_dict):
        if any(set(message) != {"role", "content"} for message in messages):
            raise KeyError("a key that no message has")
        names = "".join(f"[{tool['name']}]" for tool in tools or ())
        return {"input_ids": [*map(ord, names + "".join("<{role}>{content}".format(**m)
                                                        for m in messages))]}  # fmt: skip


@pytest.mark.parametrize("kind", ["rows.jsonl", "dataset"])
@pytest.mark.parametrize(("row", "expected"), TRAINED_ON)
def test_conversations_are_formed_as_training_forms_them(tmp_path, kind, row, expected):
    rows = [row, row]
    if kind == "dataset":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / kind))
    else:
        (tmp_path / kind).write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = read_learnable(tmp_path / kind)
    ids = encoded(["before", *found], Characters())
    assert ["".join(map(chr, each)) for each in ids] == ["^before", expected, expected]
    cut = encoded(found, Characters(), 3)
    assert ["".join(map(chr, each)) for each in cut] == [expected[:3]] * 2


def test_keys_that_datasets_add_to_a_message_are_left_out(tmp_path):
    rows = [{"messages": MESSAGES}, {"messages": [{**MESSAGES[0], "name": "x"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    [chat, other] = read_learnable(tmp_path / "data")
    assert isinstance(chat, Chat)
    assert chat.messages == MESSAGES
    with pytest.raises(DataError, match="row 1: the chat template of characters does not take it"):
        encoded([other], Characters())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, "an object with 'text', 'messages', or 'prompt' and 'completion'"),
        ({"messages": "a film"}, "line 1: 'messages' must be a list of messages, each with its"),
        ({"messages": []}, "line 1: 'messages' must be a list"),
        ({"messages": [{"content": "a"}]}, "line 1: 'messages' must be a list"),
        ({"prompt": "a", "completion": MESSAGES}, "line 1: 'prompt' and 'completion' must be two"),
        ({"messages": MESSAGES, "tools": "see"}, "line 1: 'tools' is not JSON"),
        ({"messages": [{"role": "user", "content": ""}]}, "holds no text"),
    ],
)
def test_a_bad_conversation_is_one_message(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read_learnable(tmp_path / "rows.jsonl")


def test_a_tokenizer_without_a_chat_template_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    tokenizer = Characters()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tokenizer of characters has no chat template"):
        encoded(read_learnable(tmp_path / "rows.jsonl"), tokenizer)


BEGIN, END = 0, 1


def words(begins):
    """A tokenizer of the words 2 to 99, which puts the begin token first or not."""
    vocabulary = {"<begin>": BEGIN, "<end>": END} | {str(n): n for n in range(2, 100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>"
    )


@pytest.mark.parametrize("begins", [True, False])
def test_every_sequence_begins_as_the_tokenizer_begins_a_text(begins):
    tokenizer, texts = words(begins), ["2 3 4 5 6 7 8 9 10", "11 12", "13 14 15 16 17 18"]
    begin, room = ([BEGIN], 4) if begins else ([], 5)
    assert begin_of(tokenizer) == begin

    def assert_beginning(found, is_joined):
        for sequence in found:
            assert sequence[: len(begin)] == begin
            assert BEGIN not in sequence[len(begin) :]
            assert len(sequence) == 5 or not is_joined
        held = sorted(token for each in found for token in each[len(begin) :] if token != END)
        assert len({*held}) == len(held)
        return held

    cut = language_modelling_examples(
        Corpus(texts, None, 0), tokenizer, 5, num_held_out=0, seed=0
    ).training
    assert len(cut) == 20 // room
    assert_beginning([each.tolist() for each in cut], True)
    drawn = token_batches(
        texts, tokenizer, batches=2, batch_size=2, sequence_length=5, seed=0
    ).flatten(0, 1)
    assert len(drawn) == 4
    assert_beginning(drawn.tolist(), True)

    class Seen(torch.nn.Module):
        config = transformers.LlamaConfig(vocab_size=100, max_position_embeddings=5)

        def forward(self, input_ids, attention_mask):
            rows = zip(input_ids, attention_mask.bool(), strict=True)
            seen.extend(ids[mask].tolist() for ids, mask in rows)

    seen = []
    for batch in text_batches(Seen(), texts, tokenizer, 99, 64, seed=0):
        batch(Seen())
    assert assert_beginning(seen, False) == list(range(2, 19))


def test_pieces_of_a_text_have_its_begin_token_if_it_has_one():
    assert pieces_of([0, 5, 6, 7, 8, 9], [0], 3) == [[0, 5, 6], [0, 7, 8], [0, 9]]
    assert pieces_of([5, 6, 7, 8], [0], 3) == [[5, 6, 7], [8]]
    assert pieces_of([0, 5, 6], [0], 1) == [[0], [5], [6]]
    assert pieces_of([5, 6, 7], [], 2) == [[5, 6], [7]]
    assert pieces_of([], [], 2) == pieces_of([0], [0], 2) == []


def collate(chosen):
    return {"index": torch.tensor(chosen)}


def test_batches_of_all_ranks_cover_an_epoch_once_and_resume_where_they_stopped():
    def of_rank(rank, first=0):
        place = {"batch_size": 2, "rank": rank, "world_size": 3, "seed": 5, "first": first}
        return [b["index"].tolist() for b in islice(batches(range(20), collate, **place), 7)]

    ranks = [of_rank(rank) for rank in range(3)]
    epoch = [i for rank in ranks for batch in rank[:3] for i in batch]
    assert len(epoch) == 18
    assert len(set(epoch)) == 18
    assert ranks[0][:3] != ranks[0][3:6]
    assert of_rank(1, first=4)[:3] == ranks[1][4:7]


def test_too_few_examples_for_one_batch_is_an_error():
    with pytest.raises(DataError, match="too short: 3 example"):
        batches(range(3), collate, batch_size=2, rank=0, world_size=2, seed=0)
