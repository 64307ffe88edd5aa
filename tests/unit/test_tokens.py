"""Texts and ids in whatever form -> sequences, labels, and the BOS decision in words."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_tokenizer
from sinkscope.tokens import as_stream, key_positions, read_text, tokenize, whole_number
from tests.conftest import attempt

TOKENIZER, BERT = tiny_tokenizer(), tiny_tokenizer("bert")
A, B, BOS = 4, 5, 1  # ids of "a", "b" and BOS


def ids_of(texts, tokenizer=TOKENIZER, **how):
    return [s.ids.tolist() for s in tokenize(tokenizer, texts, **how).sequences]


def labels_of(texts, **how):
    return [s.label for s in tokenize(TOKENIZER, texts, **how).sequences]


# --- what may be given -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [[BOS, A, B]]),
        (["ab", "ba"], [[BOS, A, B], [BOS, B, A]]),
        (("ab", "ba"), [[BOS, A, B], [BOS, B, A]]),
        ((text for text in ["ab", "ba"]), [[BOS, A, B], [BOS, B, A]]),
        ({"x": "ab", "y": [7, 8]}, [[BOS, A, B], [7, 8]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 7], [8, 9]], [[5, 6, 7], [8, 9]]),
        (torch.tensor([5, 6, 7]), [[5, 6, 7]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([torch.tensor([5, 6, 7]), "ab"], [[5, 6, 7], [BOS, A, B]]),
        (np.array([5, 6, 7]), [[5, 6, 7]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([np.array([5, 6]), np.array([7, 8, 9])], [[5, 6], [7, 8, 9]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_input(given, expected):
    assert ids_of(given) == expected


def test_what_a_tokenizer_gives():
    pads = TOKENIZER(["ab", "a"], padding=True, padding_side="left")
    assert pads.input_ids == [[BOS, A, B], [0, BOS, A]]
    both = [[BOS, A, B], [BOS, A]]
    assert ids_of(pads) == ids_of(TOKENIZER(["ab", "a"], padding=True, return_tensors="pt")) == both
    assert ids_of(TOKENIZER(["ab", "a"])) == both
    assert ids_of(TOKENIZER("ab")) == ids_of({"input_ids": [BOS, A, B]}) == [[BOS, A, B]]
    assert labels_of({"input_ids": "ab", "b": "ba"}) == ["input_ids", "b"]


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": 5},
        {"input_ids": "ab"},
        {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1]]},
        {"input_ids": [[5, 6]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": [5, 6], "attention_mask": 1},
    ],
)
def test_what_no_tokenizer_gives(given):
    with pytest.raises(ss.SinkscopeError, match=r"must be (rows|one row)"):
        tokenize(TOKENIZER, given)


def test_a_table_is_its_column_of_texts():
    table = pd.DataFrame({"text": ["ab", "ba"], "label": [0, 1]})
    rows = as_stream(table)
    assert ids_of(rows) == ids_of(table["text"]) == [[BOS, A, B], [BOS, B, A]]


def test_a_path_given_as_text_is_not_measured_as_text(tmp_path):
    (tmp_path / "one.txt").write_text("ab", encoding="utf-8")
    for given in (str(tmp_path / "one.txt"), ["ab", str(tmp_path / "one.txt")]):
        with pytest.raises(ss.SinkscopeError, match=r"names a file: give Path\('.*one.txt'\)"):
            tokenize(TOKENIZER, given)
    for text in ("a.b", "\u597d" * 200 + ".b", "a\0.b"):
        assert ids_of(text)[0][0] == BOS


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3), np.array(3)], ids=repr)
def test_whole_numbers_of_any_type(number):
    assert whole_number(number, "key") == 3
    assert ids_of("abab", max_tokens=number) == [[BOS, A, B]]


@pytest.mark.parametrize("number", [True, 3.0, None, "3", np.float32(3)], ids=repr)
def test_what_is_no_whole_number(number):
    with pytest.raises(ss.SinkscopeError, match=r"key=.*: give a whole number"):
        whole_number(number, "key")


def test_files_are_texts_labelled_by_their_name(tmp_path):
    (tmp_path / "one.txt").write_text("ab", encoding="utf-8")
    (tmp_path / "two.txt").write_text("ba", encoding="utf-8")
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    assert ids_of(files) == [[BOS, A, B], [BOS, B, A]]
    assert labels_of(files) == ["one.txt", "two.txt"]
    assert labels_of(files[0]) == ["one.txt"]
    assert ids_of({"mine": files[1]}) == [[BOS, B, A]]


def test_labels():
    assert labels_of(["ab", "ba"]) == ["text 0", "text 1"]
    assert labels_of({"x": "ab", 3: "ba"}) == ["x", "3"]
    assert labels_of([[5, 6]]) == labels_of(torch.tensor([[5, 6]])) == ["text 0"]


@pytest.mark.parametrize("texts", [{"all": "ab"}, {"1": "ab", 1: "ba"}])
def test_labels_must_tell_texts_apart(texts):
    with pytest.raises(ss.SinkscopeError, match="labels must be distinct and not 'all'"):
        tokenize(TOKENIZER, texts)


def test_tokens_are_kept_as_text_too():
    (text,) = tokenize(TOKENIZER, "ab").sequences
    assert text.strings == ("<bos>", "a", "b")
    assert len(text) == 3
    (ids,) = tokenize(None, [5, 6]).sequences
    assert ids.strings == ("5", "6")


def test_what_is_tokenised_already_is_taken_as_it_is():
    tokens = tokenize(TOKENIZER, ["ab", "ba"])
    assert tokenize(TOKENIZER, tokens) is tokens
    assert len(tokens) == 2


# --- BOS ---------------------------------------------------------------------------------------------------------------

NO_BOS = tiny_tokenizer()
NO_BOS.bos_token = None


@pytest.mark.parametrize(
    ("how", "ids", "sentence"),
    [
        ({}, [BOS, A, B], "BOS '<bos>' (id 1) stands first (the model's convention)"),
        ({"bos": True}, [BOS, A, B], "BOS '<bos>' (id 1) stands first (as asked)"),
        ({"bos": False}, [A, B], "no BOS (as asked)"),
        ({"bos_by_default": False}, [A, B], "no BOS (the model's convention)"),
        ({"bos_by_default": False, "bos": True}, [BOS, A, B], "BOS '<bos>' (id 1) stands first (as asked)"),
    ],
)
def test_the_decision_about_bos_and_the_sentence_that_says_so(how, ids, sentence):
    tokens = tokenize(TOKENIZER, "ab", **how)
    assert tokens.sequences[0].ids.tolist() == ids
    assert tokens.bos == sentence


@pytest.mark.parametrize(
    ("how", "ids", "sentence"),
    [
        ({}, [1, A, B, 2], "special tokens added (the model's convention)"),
        ({"bos": True}, [1, A, B, 2], "special tokens added (as asked)"),
        ({"bos": False}, [A, B], "no special tokens (as asked)"),
    ],
)
def test_an_encoders_special_tokens_take_the_place_of_bos(how, ids, sentence):
    tokens = tokenize(BERT, "ab", causal=False, **how)
    assert tokens.sequences[0].ids.tolist() == ids
    assert tokens.bos == sentence


def test_a_bos_in_the_text_is_not_doubled():
    assert ids_of("<bos>ab") == [[BOS, A, B]]
    assert ids_of("<bos>ab", bos=True) == [[BOS, A, B]]


def test_a_tokenizer_without_bos():
    tokens = tokenize(NO_BOS, "ab")
    assert (tokens.sequences[0].ids.tolist(), tokens.bos) == ([A, B], "no BOS (the model's convention)")
    with pytest.raises(ss.SinkscopeError, match=r"no BOS token.*bos=False \(--no-bos\)"):
        tokenize(NO_BOS, "ab", bos=True)


@pytest.mark.parametrize("bos", [None, True, False])
def test_ids_get_no_bos_and_the_sentence_says_so(bos):
    tokens = tokenize(TOKENIZER, [[A, B]], bos=bos)
    assert tokens.sequences[0].ids.tolist() == [A, B]
    assert tokens.bos == "token ids were given and taken as they are"


# --- length ------------------------------------------------------------------------------------------------------------


def test_max_tokens_counts_bos():
    assert ids_of("abab", max_tokens=3) == [[BOS, A, B]]
    assert ids_of("abab", max_tokens=3, bos=False) == [[A, B, A]]
    assert ids_of([[5, 6, 7], [8, 9]], max_tokens=2) == [[5, 6], [8, 9]]
    assert tokenize(TOKENIZER, "abab", max_tokens=3).sequences[0].strings == ("<bos>", "a", "b")


def test_max_tokens_keeps_an_encoders_last_special_token():
    assert ids_of("abab", BERT, causal=False, max_tokens=4) == [[1, A, B, 2]]


@pytest.mark.parametrize("max_tokens", [1, 0, -3])
def test_max_tokens_below_two_makes_no_sense(max_tokens):
    with pytest.raises(ss.SinkscopeError, match=f"max_tokens={max_tokens}: at least 2"):
        tokenize(TOKENIZER, "ab", max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", r"text 0 is empty"),
        (["ab", " \n"], r"text 1 is empty"),
        ({"mine": ""}, r"text 0 \('mine'\) is empty"),
        ([[5, 6], [7]], r"text 1 has 1 token\(s\).*at least 2"),
        ([[5, 6], []], r"text 1 has 0 token\(s\)"),
        ([], "no texts given"),
        ({}, "no texts given"),
        ([5.5, 6.5], "text 0"),
        (torch.tensor([0.5, 1.5]), "one row of non-negative integers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), "one row of non-negative integers"),
        ([[5, -1]], "non-negative integers"),
        ([[True, False]], "one row of non-negative integers"),
        ([object()], "text 0 is a object: expected a string, a path or token ids"),
        ([None], "text 0 is a NoneType"),
    ],
)
def test_what_can_not_be_text_is_named(texts, message):
    with pytest.raises(ss.SinkscopeError, match=message):
        tokenize(TOKENIZER, texts)


def test_a_text_of_one_token_without_bos():
    with pytest.raises(ss.SinkscopeError, match=r"text 0 has 1 token\(s\)"):
        tokenize(TOKENIZER, "a", bos=False)
    assert ids_of("a") == [[BOS, A]]


def test_text_without_a_tokenizer():
    with pytest.raises(ss.SinkscopeError, match="text 1 is a string, but the model has no tokenizer: pass token ids"):
        tokenize(None, [[5, 6], "ab"])


# --- pads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1, 2, 7])
def test_a_mask_takes_pads_away_on_either_side(pad):
    ids = torch.tensor([[5, 6, 7, pad], [pad, pad, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    for kind in (torch.long, torch.bool, torch.float32):
        assert ids_of(ids, attention_mask=mask.to(kind)) == [[5, 6, 7], [8, 9]]
    assert ids_of(ids[1], attention_mask=mask[1]) == [[8, 9]]


def test_a_mask_of_another_shape():
    with pytest.raises(ss.SinkscopeError, match=r"attention_mask \(1, 2\) must be shaped like the ids \(1, 3\)"):
        tokenize(None, torch.tensor([[5, 6, 7]]), attention_mask=torch.tensor([[1, 1]]))


@pytest.mark.parametrize("texts", [[[5, 6, 0]], np.array([[5, 6, 0]]), "ab", ["ab"]])
def test_a_mask_is_never_ignored(texts):
    """Either the pads go, or the caller hears that a mask goes with a tensor only."""
    got = attempt(lambda: ids_of(texts, attention_mask=torch.tensor([[1, 1, 0]])))
    assert got == [[5, 6]] or "attention_mask" in str(got)


def test_batches_are_right_padded_and_their_mask_comes_from_lengths():
    tokens = tokenize(None, [[5, 6, 0], [7, 0], [8, 9, 9, 9, 9, 9, 9]])
    first, second = tokens.batches(8)
    assert first.ids.tolist() == [[7, 0, 0], [5, 6, 0]]
    assert first.valid.tolist() == [[True, True, False], [True, True, True]]
    assert first.lengths.tolist() == [2, 3]
    assert second.ids.tolist() == [[8, 9, 9, 9, 9, 9, 9]]  # would more than double the shortest


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batches_hold_every_text_once(size):
    tokens = tokenize(None, [[i] * (2 + i % 3) for i in range(3, 12)])
    batches = list(tokens.batches(size))
    assert max(len(b.sequences) for b in batches) <= size
    assert sorted(s.label for b in batches for s in b.sequences) == sorted(s.label for s in tokens.sequences)


# --- key positions -----------------------------------------------------------------------------------------------------

SEQUENCES = tokenize(BERT, ["ab", "bab"], causal=False).sequences


@pytest.mark.parametrize(
    ("key", "expected"), [(0, [0, 0]), (3, [3, 3]), (-1, [3, 4]), (-4, [0, 1]), ("[SEP]", [3, 4]), ("b", [2, 1])]
)
def test_key_positions(key, expected):
    assert key_positions(key, SEQUENCES).tolist() == expected


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (4, r"key=4 lies outside 'text 0', whose positions are 0 to 3"),
        (-5, r"key=-5 lies outside 'text 0', whose positions are 0 to 3"),
        ("[MASK]", r"key='\[MASK\]' does not occur in 'text 0'; its first tokens are \('\[CLS\]', 'a'"),
    ],
)
def test_key_positions_outside(key, message):
    with pytest.raises(ss.SinkscopeError, match=message):
        key_positions(key, SEQUENCES)


# --- files -------------------------------------------------------------------------------------------------------------


def test_read_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "t.txt").write_bytes("naïve → 汉字\r\n".encode())
    assert read_text(tmp_path / "t.txt").startswith("naïve → 汉字")
    assert read_text(str(tmp_path / "t.txt")) == read_text(tmp_path / "t.txt")


def test_read_text_says_what_is_wrong(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ss.SinkscopeError, match=r"latin.txt' is not UTF-8 text: byte 3 can't be decoded"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(ss.SinkscopeError, match=r"no such file: '.*gone.txt'"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(ss.SinkscopeError, match=r"can't read .*: Is a directory"):
        read_text(tmp_path)
