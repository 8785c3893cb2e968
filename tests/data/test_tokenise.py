from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.data import tiny
from tuner.data.examples import Opening, Segment
from tuner.data.plain_text import Windows
from tuner.data.tokenise import Fate, TokenisedRow, Tokeniser

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>\0"), max_size=40)
FILLED = TEXTS.filter(lambda text: bool(text.strip()))
PLAIN = tiny.byte_level()
WITH_BOS = tiny.byte_level(bos=True)
LLAMA_2 = tiny.sentencepiece()
TOKENISERS = {name: Tokeniser(t) for name, t in (("plain", PLAIN), ("bos", WITH_BOS), ("llama", LLAMA_2))}


def row(
    tokeniser: Tokeniser,
    *segments: tuple[str, bool],
    loss_on: Literal["completion", "all"] = "completion",
    max_length: int = 1000,
) -> TokenisedRow:
    pieces = tuple(Segment(text, is_target) for text, is_target in segments)
    [only] = tokeniser.rows([pieces], Opening.TEXT, loss_on=loss_on, max_length=max_length)
    return only


@given(TEXTS, FILLED)
def test_the_targets_are_the_completion_and_eos(prompt: str, completion: str) -> None:
    for tokenizer, name in ((PLAIN, "plain"), (WITH_BOS, "bos")):
        made = row(TOKENISERS[name], ("P" + prompt, False), (completion, True))
        assert tokenizer.decode(made.tokens[made.targets]) == completion + "</s>"
        assert tokenizer.decode(made.tokens[~made.targets]).removeprefix("<s>") == "P" + prompt


@given(TEXTS, FILLED, st.sampled_from(sorted(TOKENISERS)))
def test_a_prompt_for_inference_is_the_beginning_of_the_example(
    prompt: str, completion: str, name: str
) -> None:
    made = row(TOKENISERS[name], (prompt, False), (completion, True))
    ids = TOKENISERS[name].prompt([Segment(prompt, is_target=False)], Opening.TEXT)
    assert made.tokens[: len(ids)].tolist() == ids
    assert not made.targets[: len(ids)].any()
    assert made.targets[max(1, len(ids)) :].all()


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=5), st.integers(1, 30))
def test_truncation_keeps_the_beginning_and_drops_rows_without_targets(
    segments: list[tuple[str, bool]], max_length: int
) -> None:
    whole = row(TOKENISERS["bos"], *segments)
    cut = row(TOKENISERS["bos"], *segments, max_length=max_length)
    assert cut.full_length == whole.full_length
    if whole.fate is Fate.EMPTY:
        assert cut.fate is Fate.EMPTY
    elif not whole.targets[:max_length].any():
        assert cut.fate is Fate.CUT_OFF
    else:
        assert cut.fate is (Fate.KEPT if len(whole.tokens) <= max_length else Fate.TRUNCATED)
        assert cut.tokens.tolist() == whole.tokens[:max_length].tolist()
        assert cut.targets.tolist() == whole.targets[:max_length].tolist()
    if not cut.fate.is_kept:
        assert len(cut.tokens) == len(cut.targets) == 0


def test_bos_is_what_the_tokenizer_puts_before_a_text() -> None:
    for tokenizer, name in ((PLAIN, "plain"), (WITH_BOS, "bos"), (LLAMA_2, "llama")):
        ids = row(TOKENISERS[name], ("Red", True)).tokens.tolist()
        assert ids == [*tokenizer("Red").input_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", sorted(TOKENISERS))
def test_an_eos_that_is_there_is_not_added_again(name: str) -> None:
    once = row(TOKENISERS[name], ("a", False), ("b", True))
    assert row(TOKENISERS[name], ("a", False), ("b</s>", True)).tokens.tolist() == once.tokens.tolist()
    assert (once.tokens == LLAMA_2.convert_tokens_to_ids("</s>")).sum() == (name == "llama")


def test_a_truncated_example_does_not_end_with_eos() -> None:
    made = row(TOKENISERS["plain"], ("a", False), ("Red, green and blue", True), max_length=3)
    assert made.fate is Fate.TRUNCATED
    assert PLAIN.eos_token_id not in made.tokens


def test_loss_on_all_sees_everything_but_the_first_token() -> None:
    made = row(TOKENISERS["plain"], ("Name", False), ("Red", True), loss_on="all")
    assert made.targets.tolist() == [False] + [True] * (len(made.tokens) - 1)


def test_what_follows_the_last_target_is_left_out_unless_the_loss_sees_it() -> None:
    segments = (("a", False), ("b", True), ("c", False))
    assert PLAIN.decode(row(TOKENISERS["plain"], *segments).tokens) == "ab</s>"
    assert PLAIN.decode(row(TOKENISERS["plain"], *segments, loss_on="all").tokens) == "abc</s>"


def test_a_completion_gets_no_space_of_its_own() -> None:
    made = row(TOKENISERS["llama"], ("name:\n", False), ("Red", True))
    assert LLAMA_2.convert_ids_to_tokens(made.tokens[made.targets].tolist()) == ["R", "e", "d", "</s>"]
    assert made.tokens[:-1].tolist() == LLAMA_2("name:\nRed").input_ids


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_an_example_without_words_to_learn_is_empty(text: str) -> None:
    assert row(TOKENISERS["plain"], ("a", False), (text, True)).fate is Fate.EMPTY
    assert row(TOKENISERS["plain"], ("a", False), (text, True), loss_on="all").fate is Fate.KEPT
    assert row(TOKENISERS["plain"]).fate is Fate.EMPTY


def test_rows_tokenised_together_are_those_tokenised_alone() -> None:
    rows = [(Segment(f"p{n}", False), *(Segment(f"c{i}", i % 2 == 0) for i in range(n))) for n in range(5)]
    tokeniser = TOKENISERS["llama"]
    together = tokeniser.rows(rows, Opening.TEXT, loss_on="completion", max_length=9)
    for segments, made in zip(rows, together, strict=True):
        [alone] = tokeniser.rows([segments], Opening.TEXT, loss_on="completion", max_length=9)
        assert made.tokens.tolist() == alone.tokens.tolist()
        assert made.targets.tolist() == alone.targets.tolist()


def test_padding_and_truncation_of_the_given_tokenizer_are_ignored_and_left_alone() -> None:
    tokenizer = tiny.byte_level()
    before = Tokeniser(tokenizer).fingerprint
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    made = Tokeniser(tokenizer)
    assert made.fingerprint == before
    assert len(row(made, ("Red, green and blue", True)).tokens) not in (2, 50)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_a_tokenizer_that_reads_special_tokens_as_text_goes_on_doing_so() -> None:
    tokenizer = tiny.byte_level()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    made = row(Tokeniser(tokenizer), ("a", False), ("b</s>", True))
    assert (made.tokens == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(made.tokens) == "ab</s></s>"
    assert Tokeniser(tokenizer).fingerprint != Tokeniser(PLAIN).fingerprint


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    tokenizers = [PLAIN, WITH_BOS, LLAMA_2, tiny.byte_level(chat_template=tiny.CHATML)]
    assert len({Tokeniser(tokenizer).fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert Tokeniser(tiny.byte_level()).fingerprint == Tokeniser(PLAIN).fingerprint


BOS = [(WITH_BOS, "bos"), (LLAMA_2, "llama")]


@pytest.mark.parametrize(("tokenizer", "name"), BOS, ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("before", ["<s>", "<s><s>"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_bos_that_is_there_is_not_added_again(
    tokenizer: PreTrainedTokenizerBase, name: str, before: str, loss_on: Literal["completion", "all"]
) -> None:
    """As the tokenizer has the text without it."""
    for pieces in ([("Red", True)], [("Name:", False), ("Red", True)], [("", False), ("Red", True)]):
        at = 1 if pieces[0][0] == "" else 0
        said = [
            (before + text if index == at else text, learned) for index, (text, learned) in enumerate(pieces)
        ]
        once, twice = (row(TOKENISERS[name], *texts, loss_on=loss_on) for texts in (pieces, said))
        assert twice.tokens.tolist() == once.tokens.tolist()
        assert twice.targets.tolist() == once.targets.tolist()
        assert twice.tokens.tolist().count(tokenizer.bos_token_id) == 1
        assert not twice.targets[0]
    ids = TOKENISERS[name].prompt([Segment(f"{before}Red", is_target=False)], Opening.TEXT)
    assert ids == tokenizer("Red").input_ids


def test_a_bos_that_the_tokenizer_does_not_put_stays_as_written() -> None:
    """GPT-2's tokenizer puts none; a chat template writes its own."""
    assert row(TOKENISERS["plain"], ("<s>Red", True)).tokens[0] == PLAIN.bos_token_id
    pieces = (Segment("<s>Hi", is_target=False), Segment("Red", is_target=True))
    [made] = TOKENISERS["bos"].rows([pieces], Opening.WRITTEN, loss_on="completion", max_length=99)
    assert WITH_BOS.decode(made.tokens) == "<s>HiRed</s>"


def test_a_bos_that_is_text_to_the_tokenizer_stays_text() -> None:
    tokenizer = tiny.byte_level(bos=True)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    made = row(Tokeniser(tokenizer), ("<s>Red", True))
    assert tokenizer.decode(made.tokens) == "<s><s>Red</s>"


@pytest.mark.parametrize(("tokenizer", "name"), BOS, ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("fills", [True, False])
def test_windows_begin_with_one_bos(tokenizer: PreTrainedTokenizerBase, name: str, fills: bool) -> None:
    windows = Windows(overlap_tokens=0, fills=fills, separator="\n")
    made, plain = (
        [
            (example.tokens.tolist(), example.targets.tolist())
            for _, examples in TOKENISERS[name].windowed([texts], windows, max_length=9)
            for example in examples
        ]
        for texts in (["<s>Red and green", "<s>Blue"], ["Red and green", "Blue"])
    )
    assert made[0] == plain[0]
    assert all(tokens[0] == tokenizer.bos_token_id != tokens[1] for tokens, _ in made)
    assert not any(targets[0] for _, targets in made)


def test_what_is_masked_no_loss_sees() -> None:
    pieces = (Segment("xy", is_target=False), Segment("b", is_target=False, is_masked=True))
    [made] = TOKENISERS["plain"].rows([pieces], Opening.TEXT, loss_on="all", max_length=9)
    assert PLAIN.decode(made.tokens) == "xyb</s>"
    assert made.targets.tolist() == [False, True, False, False]
    [made] = TOKENISERS["plain"].rows(
        [(*pieces, Segment("c", is_target=True))], Opening.TEXT, loss_on="all", max_length=9
    )
    assert made.targets.tolist() == [False, True, False, True, True]
