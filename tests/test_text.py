"""Words become the tokens of their sentence, with their times, whatever the tokenizer."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, BertConfig, PreTrainedTokenizerFast, RobertaConfig

from mmemo.core.batch import Stream
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.models.text import TextEncoder, Tokenizer, count_positions
from mmemo.synthetic.known_answer import known_answer

SENTENCES = [
    "I am not happy about it",
    "what a wonderful day it is, isn't it?",
    "happy happy sad",
    "don't you think so? I don't.",
    "naïve café — 東京は雨です 😀 ok",
] * 20
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]


def word_piece():
    fast = Fast(models.WordPiece(unk_token="<unk>"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False
    )


def byte_level(prefix=False, trim=True):
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=trim)
    return fast, trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def unigram(split=True, prepend="always"):
    fast = Fast(models.Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=split)
    return fast, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


KINDS = {
    "word piece": word_piece,
    "byte level": byte_level,
    "byte level with a space before the first word": lambda: byte_level(prefix=True),
    "byte level whose tokens include their space": lambda: byte_level(trim=False),
    "unigram": unigram,
    "unigram that joins words": lambda: unigram(split=False),
    "unigram without a space before the first word": lambda: unigram(prepend="never"),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    "A folder of weights (without weights) whose tokenizer is made on the spot."
    fast, trainer = KINDS[request.param]()
    fast.train_from_iterator(SENTENCES, trainer)
    marks = [(mark, fast.token_to_id(mark)) for mark in ("<s>", "</s>")]
    frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    steps = [step for step in (fast.post_processor, frame) if step]
    fast.post_processor = processors.Sequence(steps)
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    size = fast.get_vocab_size()
    sizes = {"max_position_embeddings": 64, "hidden_size": 8, "intermediate_size": 8}
    BertConfig(vocab_size=size, num_attention_heads=2, **sizes).save_pretrained(path)
    return path


ANSWERS = [
    "I am not happy",
    "don't you? I don't.",
    "wait -- what ?! isn't it",
    "I  am   happy",
    " happy sad ",
    "東京は雨です",
    "東京は 雨です ok",
    "so 😀 👩‍👩‍👧 happy😀",
    "naïve café e\u0301 ﬁne",
    "\u062a\u0639\u0628\u062a \u0634\u0648\u064a\u0629",
    "happy",
    "I'm I’m",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_words_become_the_tokens_of_the_whole_sentence(folder, answer):
    tokenizer = Tokenizer(folder, 64)
    # several spaces make empty words
    words = answer.split(" ")
    spans = torch.stack([torch.arange(len(words)) * 1.0, torch.arange(len(words)) + 0.5], 1)
    ids, times = tokenizer(words, spans)
    whole = PreTrainedTokenizerFast.from_pretrained(folder)(answer)
    assert ids.tolist() == whole.input_ids
    assert times[0] == 0 and times[-1] == spans[-1, 1] and len(times) == len(ids)
    inner = times[1:-1]
    assert (inner.diff() >= 0).all()
    # every word that can be seen has tokens, each at a time within the words it covers
    said = [k for k, word in enumerate(words) if word]
    assert inner.min() >= said[0] + 0.25 and inner.max() <= said[-1] + 0.25


def test_each_piece_stands_at_the_middle_of_its_word(folder):
    words = ["sad", "I", "don't", "", "happy,", "so"]
    spans = torch.tensor([[0, 1], [1, 1.5], [2, 4], [4, 4.1], [5, 6], [7, 9]])
    tokenizer = Tokenizer(folder, 64)
    ids, times = tokenizer(words, spans)
    sentence = " ".join(words)
    coded = tokenizer.fast(sentence, return_offsets_mapping=True)
    starts = [0, 4, 6, 12, 13, 20]
    for (start, stop), time in list(zip(coded["offset_mapping"], times.tolist()))[1:-1]:
        covered = {
            k
            for k, (word, at) in enumerate(zip(words, starts))
            if word and start < at + len(word) and stop > at
        }
        # a lone space belongs to the word behind it
        covered = covered or {next(k for k, at in enumerate(starts) if words[k] and at >= start)}
        want = (spans[min(covered), 0] + spans[max(covered), 1]) / 2
        assert time == want, (sentence[start:stop], time)


def test_pieces_without_spaces_are_not_those_of_the_sentence(tmp_path):
    "What the mending is about: bare words have lost the space that begins a token."
    fast, trainer = byte_level()
    fast.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(tmp_path)
    BertConfig(vocab_size=400).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids, _ = tokenizer(["I", "am", "not", "happy"])
    assert tokenizer.fast.convert_ids_to_tokens(ids) == ["I", "Ġam", "Ġnot", "Ġhappy"]


@pytest.mark.parametrize("words", [[], [""], ["", " "], ["\t", ""]])
def test_an_answer_of_empty_words_is_a_missing_modality(words):
    stream = Tokenizer().stream([words, ["calm"]])
    assert not stream.mask[0].any() and stream.mask[1].sum() == 3


def test_a_cut_answer_keeps_its_beginning_and_its_marks(folder):
    tokenizer = Tokenizer(folder, 6)
    ids, times = tokenizer(["happy"] * 30)
    whole = PreTrainedTokenizerFast.from_pretrained(folder)(
        " ".join(["happy"] * 30), truncation=True, max_length=6
    )
    assert ids.tolist() == whole.input_ids and len(ids) == 6
    assert times[-1] == pytest.approx(30 * 0.4)


def test_the_packaged_weights_give_what_they_gave():
    "WordPiece knows no spaces: word by word and as a sentence are one."
    tokenizer = Tokenizer()
    for words in known_answer(20, seed=5).meta["words"]:
        ids, _ = tokenizer(words)
        assert ids.tolist() == tokenizer.fast(words, is_split_into_words=True).input_ids


# ------------------------------------------------------------------ positions
def test_more_tokens_than_positions_are_refused(folder, tmp_path):
    assert Tokenizer(folder).max_length == 64 and Tokenizer().max_length == 256
    with pytest.raises(ConfigError, match="max_length 65 .* 64 tokens"):
        Tokenizer(folder, 65)
    with pytest.raises(ConfigError, match="max_length 4096 .* 256 tokens"):
        Tokenizer("mmemo-tiny", 4096)
    for few in (0, -3, 2):
        with pytest.raises(ConfigError, match=f"max_length {few} leaves no room"):
            Tokenizer("mmemo-tiny", few)
    # positions of RoBERTa begin behind the padding's
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).max_length == 62
    with pytest.raises(ConfigError, match="62 tokens"):
        Tokenizer(tmp_path, 64)


def test_positions_of_published_architectures():
    assert count_positions(BertConfig()) == 512
    assert count_positions(RobertaConfig(max_position_embeddings=514)) == 512
    assert count_positions(AutoConfig.for_model("distilbert")) == 512
    assert count_positions(AutoConfig.for_model("gpt2")) == 1024
    assert count_positions(AutoConfig.for_model("t5")) is None
    assert count_positions(AutoConfig.for_model("deberta-v2", position_biased_input=False)) is None


def test_an_encoder_refuses_more_tokens_than_it_has_positions():
    long = Stream.of(torch.full((1, 257), 5), rate=1)
    with pytest.raises(ShapeError, match="257 tokens.* 256"):
        TextEncoder.pretrained()(long)
