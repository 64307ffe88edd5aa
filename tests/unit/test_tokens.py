"""Texts and ids in whatever form -> sequences, labels, and the BOS decision in words."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import sinkscope as ss
from sinkscope.testing import tiny_tokenizer
from sinkscope.tokens import as_stream, key_positions, portions, read_text, tokenize, whole_number
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


ROW = {"input_ids": [BOS, A, B, A], "attention_mask": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    "beside",
    [
        {"labels": [-100, A, B, A]},
        {"labels": [BOS, A, B, A], "label": 1, "idx": 7, "text": "aba", "words": ["ab", "a"]},
        {"token_type_ids": [0, 0, 0, 0], "special_tokens_mask": [1, 0, 0, 0], "offset_mapping": [(0, 0)] * 4, "length": [4]},
        {"position_ids": [0, 1, 2, 3], "assistant_masks": [0, 0, 1, 1], "token_type_ids": None},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_beside_ids_changes_nothing(beside):
    both = {name: [value] * 2 for name, value in (ROW | beside).items() if value is not None}
    tensors = {name: torch.tensor(v) for name, v in both.items() if np.asarray(v).dtype.kind == "i"}
    assert ids_of(ROW | beside) == ids_of([ROW | beside]) == ids_of(iter([ROW | beside])) == [ROW["input_ids"]]
    assert ids_of(both) == ids_of(tensors) == ids_of([both]) == [ROW["input_ids"]] * 2
    assert labels_of(both) == ["text 0", "text 1"]
    assert labels_of({"mine": ROW | beside, "pair": both}) == ["mine", "pair 0", "pair 1"]


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids that are not all 0.*each sentence by itself"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids other than 0, 1, 2.*rows of their own"),
        ({"position_ids": [2, 3, 4, 5]}, "position_ids other than"),
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask of .* with holes"),
        ({"attention_mask": [1, 1, 2, 2]}, "attention_mask of .* numbers packed texts"),
        ({"pixel_values": torch.zeros(1, 3)}, "'pixel_values' beside its ids.*if nothing depends on it"),
        ({"inputs_embeds": [[0.0]], "labels": [1]}, "'inputs_embeds' beside its ids"),
        ({"seq_lengths": [2, 2]}, "'seq_lengths' beside its ids.*select_columns"),
        ({"token_type_ids": [0, 0]}, "token_type_ids rows of the same lengths"),
    ],
)
def test_what_beside_ids_would_change_a_result_is_refused_by_name(beside, message):
    for given in (ROW | beside, {name: [value] for name, value in (ROW | beside).items()}, {"mine": ROW | beside}):
        with pytest.raises(ss.SinkscopeError, match=message):
            tokenize(TOKENIZER, given)
    with pytest.raises(ss.SinkscopeError, match=f"(text 1.*)?{message}"):
        tokenize(TOKENIZER, [ROW, ROW | beside])


def test_positions_and_types_of_pads_do_not_matter():
    left = {
        "input_ids": [0, 0, A, B],
        "attention_mask": [0, 0, 1, 1],
        "position_ids": [1, 1, 0, 1],
        "token_type_ids": [3, 3, 0, 0],
    }
    assert ids_of(left) == ids_of({name: torch.tensor([row]) for name, row in left.items()}) == [[A, B]]
    assert ids_of({"input_ids": [[A, B], [B, A]], "position_ids": [[0, 1]]}) == [[A, B], [B, A]]


def test_ids_beside_texts_are_never_labels():
    for given in ({"input_ids": "ab", "b": "ba"}, {"input_ids": [A, B], "b": [B, A]}):
        with pytest.raises(ss.SinkscopeError, match=r"input_ids must be rows|'b' beside its ids"):
            tokenize(TOKENIZER, given)


def test_rows_of_data_sets_and_loaders():
    rows = [{"input_ids": [A, B]}, {"input_ids": [B, A, A], "attention_mask": [1, 1, 1]}, {"tokens": [A, A]}]
    expected = [[A, B], [B, A, A], [A, A]]
    assert ids_of(rows) == ids_of(iter(rows)) == expected
    table = pd.DataFrame({"input_ids": [[A, B], [B, A]], "attention_mask": [[1, 1], [1, 1]], "label": [0, 1]})
    assert ids_of(as_stream(table)) == [[A, B], [B, A]]
    assert ids_of({"tokens": torch.tensor([[A, B], [B, A]])}) == [[A, B], [B, A]]
    loader = DataLoader([TOKENIZER(t) for t in ("ab", "a", "b")], batch_size=2, collate_fn=lambda b: TOKENIZER.pad(b))
    streamed = [(first, labels_of(some, first=first), ids_of(some)) for first, some in portions(loader, 2)]
    assert streamed == [(0, ["text 0", "text 1"], [[BOS, A, B], [BOS, A]]), (2, ["text 2"], [[BOS, B]])]
    assert ids_of(iter([torch.tensor([[A, B], [B, A]]), [A, A]])) == [[A, B], [B, A], [A, A]]
    with pytest.raises(ss.SinkscopeError, match=r"text 0 has no field 'text'.*its fields: tokens, n.*row\['tokens'\]"):
        tokenize(TOKENIZER, [{"tokens": ["ab", "ba"], "n": 2}])


@pytest.mark.parametrize(
    "row",
    [
        np.array([A, B], dtype=np.uint16),
        pd.Series([A, B]),
        pd.Series([A, B], dtype="Int64"),
        pd.Index([A, B]),
        range(A, B + 1),
        [np.int64(A), np.int64(B)],
        [torch.tensor(A), torch.tensor(B)],
        (np.uint8(A), B),
        torch.tensor([A, B], dtype=torch.uint16),
    ],
    ids=lambda row: type(row).__name__,
)
def test_integers_of_any_kind_are_ids(row):
    assert ids_of(row) == ids_of([row]) == ids_of({"mine": row}) == ids_of({"input_ids": row}) == [[A, B]]
    assert as_stream(row) is None


@pytest.mark.parametrize("ids", [[5, 2**40], [5, 2**70], [5, 2**63]])
def test_ids_beyond_any_vocabulary_are_refused_or_kept(ids):
    assert attempt(lambda: ids_of(ids)) == [ids] or isinstance(attempt(lambda: ids_of(ids)), ss.SinkscopeError)


# --- chats -----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def chatty(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return tokenizer


def test_a_chat_is_one_text_as_its_template_writes_it(chatty):
    expected = chatty.apply_chat_template(CHAT, return_dict=False)
    assert expected == [BOS, A, B, B]
    for given in (CHAT, {"messages": CHAT}, [{"messages": CHAT, "id": "7"}], {"mine": CHAT}, tuple(CHAT)):
        assert ids_of(given, chatty) == [expected]
        assert ids_of(given, chatty, bos=True) == [expected]
    assert ids_of([CHAT, CHAT[:1]], chatty) == ids_of(iter([CHAT, CHAT[:1]]), chatty) == [expected, [BOS, A, B]]
    assert ids_of(CHAT[0], chatty) == [[BOS, A, B]]
    assert ids_of(CHAT, chatty, max_tokens=3) == [[BOS, A, B]]
    assert "as their template says" in tokenize(chatty, CHAT).bos
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert (ids_of(CHAT, chatty), ids_of(CHAT, chatty, bos=True)) == ([[A, B, B]], [expected])


def test_a_chat_without_a_template_or_with_a_broken_one(chatty):
    with pytest.raises(ss.SinkscopeError, match=r"text 1 is a chat.*no chat template for apply_chat_template: set"):
        tokenize(TOKENIZER, ["ab", CHAT])
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ss.SinkscopeError, match=r"apply_chat_template fails on text 0: .*roles must alternate"):
        tokenize(chatty, CHAT)


# --- what a tokenizer refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ab\ud83d", "ab\ud83d\ude00"])
def test_half_of_a_surrogate_pair_is_named(text):
    with pytest.raises(
        ss.SinkscopeError, match=r"text 1 \('mine'\) holds half of a surrogate pair .* at character 2.*utf-16"
    ):
        tokenize(TOKENIZER, {"fine": "ab", "mine": text})
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ids_of(mended)[0][:3] == [BOS, A, B]


@pytest.mark.parametrize("error", [TypeError("TextEncodeInput"), OverflowError("too big"), RuntimeError("x\ny")], ids=repr)
def test_whatever_a_tokenizer_raises_names_the_text(error, monkeypatch):
    def refuses(*_, **__):
        raise error

    monkeypatch.setattr(type(TOKENIZER), "__call__", refuses)
    with pytest.raises(ss.SinkscopeError, match=f"the tokenizer refuses text 0: {type(error).__name__}: .*Give token ids"):
        tokenize(TOKENIZER, "ab")


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


def test_long_labels_are_cut_and_stay_distinct(tmp_path):
    long = "x" * 10**6
    one, two, short = labels_of({long: "ab", long + "y": "ba", "y" * 200: "ab"})
    assert (len(one), len(two), short) == (200, 200, "y" * 200)
    assert one != two
    assert one[:180] == two[:180] == long[:180]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes("ab".encode("utf-8-sig" if name == "b.txt" else "utf-8"))
    (tmp_path / "c.jsonl").write_bytes('{"text": "ab"}\n'.encode("utf-8-sig"))
    for given in (tmp_path / "a.txt", tmp_path / "b.txt", as_stream(tmp_path / "c.jsonl")):
        assert ids_of(given, bos=False) == [[A, B]]
    assert ids_of(as_stream(tmp_path), bos=False) == [[A, B]] * 2
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(ss.SinkscopeError, match="byte 6 can't be decoded"):
        read_text(tmp_path / "b.txt")


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


class _Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **how):
        self.characters += len(text)
        return self.tokenizer(text, **how)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "text", ["so it goes, and on. " * 10_000, "a" * 200_000, "1234567890" * 20_000, " " * 9_000 + "ab" * 200_000]
)
def test_of_a_long_text_no_more_is_tokenised_than_is_kept(text, causal):
    counting = _Counting(TOKENIZER if causal else BERT)
    (short,) = ids_of(text, counting, causal=causal, max_tokens=50)
    assert counting.characters < 0.4 * len(text)
    (whole,) = ids_of(text[: len(text) // 2], counting.tokenizer, causal=causal, max_tokens=50)
    assert short == whole
    assert len(short) == 50


def grouping():
    """A tokenizer that groups digits in threes from the right, and takes a long word for one token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<u>": 0, "1": 1, "11": 2, "111": 3, "a": 4}, unk_token="<u>"))
    splits = [Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), Regex(r"\s+")]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(s, "isolated") for s in splits])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<u>")


@pytest.mark.parametrize("text", ["1" * 12_600, "1" * 12_601, "1" * 12_602, "a" * 40_000 + " 1"], ids=len)
def test_tokens_that_depend_on_the_whole_text_are_those_of_the_whole_text(text):
    tokenizer = grouping()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids_of(text, tokenizer, bos=False, max_tokens=3) == [whole[:3]]


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
