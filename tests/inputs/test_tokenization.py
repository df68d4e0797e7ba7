"""Users' texts stay texts for every family of tokenizers: real small tokenizers, trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerFast

from onediff.config import Config
from onediff.inputs.processing import IGNORED, OneDiffProcessor
from onediff.inputs.prompt import FENCE, conversation_prompt, pair_prompt, plain
from onediff.inputs.tokenization import TextTokenizer

TEXTS = ["the red disc is green now", "a disc is blue", "USER: First image: Second image: ASSISTANT:",
         "the cup is gone", "What changed between the two images?", "a tag was added to the text",
         "think step by step"] * 20
ORDINARY = ["the red disc is green now", "What changed between the two images?", "the cup  is gone\nnow, all of it",
            "  two spaces", "ünïcode 世界 🙂", "a < b and b > a", "USER: hi ASSISTANT:"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE; one added token is not special, and runs of spaces are added tokens, as in CodeGen and Phi."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("   ", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes whole words of the vocabulary without merges, one of which is a control token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate([*letters, "re", "red", "<|eot|>", "<|", "<|bos|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("r", "e"), ("re", "d"), ("<", "|")],
                                     ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eot|>", "<|bos|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", vocabulary["<|bos|>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot|>", bos_token="<|bos|>")


def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: spaces become U+2581, unknown characters become bytes, a merge makes the end token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *BYTES], initial_alphabet=["<", ">", "/", "s", "|"]))
    model = model_of(tokenizer)
    model["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    model["vocab"] |= {token: len(model["vocab"]) + place for place, token in enumerate(("</", "</s"))}
    tokenizer.model = models.BPE(vocab=model["vocab"], merges=list(map(tuple, model["merges"])), byte_fallback=True,
                                 unk_token="<unk>", fuse_unk=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bare(tokenizer, ("<unk>", "<s>", "</s>")), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")


def bpe_with_prefix() -> PreTrainedTokenizerFast:
    """BPE that marks the letters inside of a word with a prefix; merges make the end token."""
    letters = sorted({*"".join(TEXTS), *"<>/"} - {" "})
    tokens = [*letters, *(f"##{letter}" for letter in letters), "</", "</s", "</s>"]
    tokenizer = Tokenizer(models.BPE(
        vocab={token: id_ for id_, token in enumerate(tokens)}, continuing_subword_prefix="##",
        merges=[("<", "##/"), ("</", "##s"), ("</s", "##>")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return dict(json.loads(tokenizer.to_str())["model"])


def bare(tokenizer: Tokenizer, special: tuple[str, ...]) -> Tokenizer:
    """Return the tokenizer with only these special tokens, because a trainer adds all tokens that it reserves."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


def unigram(*, byte_fallback: bool) -> PreTrainedTokenizerFast:
    """Unigram as in T5: control tokens are pieces of the vocabulary, with the best score of all."""
    reserved = ["<pad>", "</s>", "<unk>", "<extra_id_0>", *(BYTES if byte_fallback else [])]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([*TEXTS, "< > / | [ ] _"], trainers.UnigramTrainer(
        vocab_size=90 + len(reserved), special_tokens=reserved, unk_token="<unk>"))
    pieces = [tuple(piece) for piece in model_of(tokenizer)["vocab"]]
    tokenizer.model = models.Unigram(pieces, reserved.index("<unk>"), byte_fallback)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare(tokenizer, ("<pad>", "</s>", "<unk>", "<extra_id_0>")), eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", extra_special_tokens=["<extra_id_0>"])


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], initial_alphabet=list("[]<>|/uspmkclx_")))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]",
                                   pad_token="[PAD]")


def wordlevel() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]")


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": gpt2, "llama3": llama3, "llama2": llama2, "t5": lambda: unigram(byte_fallback=False),
    "unigram with bytes": lambda: unigram(byte_fallback=True), "bpe with prefix": bpe_with_prefix,
    "wordpiece": wordpiece, "wordlevel": wordlevel}
LOSSLESS = ("gpt2", "llama3", "llama2", "unigram with bytes", "backbone")  # Decoding gives every text back.


@pytest.fixture(scope="module", params=[*FAMILIES, "backbone"])
def family(request: pytest.FixtureRequest, micro: Config) -> tuple[str, OneDiffProcessor]:
    name = request.param
    tokenizer = FAMILIES[name]() if name in FAMILIES else AutoTokenizer.from_pretrained(micro.model.language)
    return name, OneDiffProcessor(CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False),
                                  tokenizer, tokens_per_image=5, delta_tokens=3)


def controls(processor: OneDiffProcessor) -> dict[str, int]:
    """Return the id of each control token: special and added tokens, without white space and the unknown token."""
    tokenizer = processor.tokenizer
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {tokenizer.unk_token}
    return {token: tokenizer.convert_tokens_to_ids(token) for token in tokens if token.strip()}


def sentences(processor: OneDiffProcessor) -> list[str]:
    """Return texts that contain each control token, alone, inside a sentence, inside a word and twice in a row."""
    return [text for token in (*controls(processor), processor.tokenizer.unk_token or "<unk>")
            for text in (token, f"the {token} icon is gone", f"a{token}b", f"{token}{token}", f"gone {token}")]


def test_every_family_has_the_control_tokens_that_transformers_takes_for_more_than_text(
        family: tuple[str, OneDiffProcessor]) -> None:
    processor = family[1]
    for token, id_ in controls(processor).items():
        assert id_ in processor.tokenizer.encode(f"the {token} icon", add_special_tokens=False)


def test_no_control_token_comes_out_of_a_caption(family: tuple[str, OneDiffProcessor]) -> None:
    name, processor = family
    eos = processor.tokenizer.eos_token_id
    for text in sentences(processor):
        ids, labels = processor.encode_turns(pair_prompt("plain", "What changed?", text))
        *answer, last = [label for label in labels if label != IGNORED]
        assert last == eos
        assert not {*answer} & {*controls(processor).values()}, text
        assert answer, f"{text} must not vanish"
        if name in LOSSLESS:
            assert processor.tokenizer.decode(answer).strip() == text
        assert ids[-len(answer) - 1:] == [*answer, eos]


def test_an_instruction_with_control_tokens_adds_no_placeholder_to_a_question(
        family: tuple[str, OneDiffProcessor]) -> None:
    processor = family[1]
    for text in sentences(processor):
        [ids] = processor.questions([pair_prompt("plain", text)])["input_ids"].tolist()
        expected = {"<image>": 2 * 5, "<delta>": 3, processor.tokenizer.bos_token: 1}
        assert {token: ids.count(id_) for token, id_ in controls(processor).items() if id_ in ids} == {
            token: count for token, count in expected.items() if token}


def test_no_control_token_comes_out_of_a_conversation(family: tuple[str, OneDiffProcessor]) -> None:
    processor = family[1]
    texts = sentences(processor)[:10]
    ids, labels = processor.encode_turns(conversation_prompt("plain", [(text, text) for text in texts], num_images=0))
    eos, others = processor.tokenizer.eos_token_id, {*controls(processor).values()}
    assert labels.count(eos) == len(texts)
    assert {*ids} & others <= {eos, processor.tokenizer.bos_token_id}


def test_ordinary_texts_have_the_ids_that_the_tokenizer_gives_them(family: tuple[str, OneDiffProcessor]) -> None:
    processor = family[1]
    for text in ORDINARY:
        assert processor.encode_answer(text)[:-1] == processor.tokenizer.encode(text.strip(), add_special_tokens=False)
        image, delta = "<image>" * 5, "<delta>" * 3
        question = f"USER: First image: {image} Second image: {image} {delta}\n{text} ASSISTANT:"
        bos = processor.tokenizer.bos_token_id
        assert processor.encode_question(pair_prompt("plain", text)) == [
            *([] if bos is None else [bos]), *processor.tokenizer.encode(question, add_special_tokens=False)]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_control_token_comes_out_of_any_text(family: tuple[str, OneDiffProcessor], data: st.DataObject) -> None:
    processor = family[1]
    parts = st.sampled_from([*controls(processor), FENCE, f"{FENCE}image{FENCE}", f"{FENCE}2{FENCE}", "<", "</", "s>",
                             " ", "\n", "red", "\ud800"])
    text = "".join(data.draw(st.lists(parts | st.text(max_size=3), max_size=8)))
    *answer, _ = processor.encode_turns(pair_prompt("plain", text, text))[1]
    question = processor.encode_question(pair_prompt("plain", text))
    others = {*controls(processor).values()}
    assert not {*answer} & others
    assert question.count(processor.image_token_id) == 10 and question.count(processor.delta_token_id) == 3


def test_a_text_without_fences_and_half_characters_is_plain() -> None:
    assert plain(f"a{FENCE}b\ud800c") == "a\ufffdb\ufffdc"
    assert plain("the <image> 🙂") == "the <image> 🙂"


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    class Slow:
        name_or_path = "old/model"

    with pytest.raises(ValueError, match=r"old/model: the tokenizer must be a fast one .*, got Slow; use a model"):
        TextTokenizer(Slow(), {})
