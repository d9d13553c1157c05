"""Demonstrations as turns of a chat template: what is read is the template's own text of the whole conversation."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from build_tokenizer import FOLDER
from command_line import run_mend
from tiny_models import build_tiny_model, ids_of
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedTokenizerBase

from mend_hf import Demonstration, DistilledDemonstrations, MendConfig, get_mend_model
from mend_hf.data.collator import MendCollator
from mend_hf.demonstrations import parse_demonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.provenance import provenance_from_record
from mend_hf.scoring import score_options

CLOSE: dict[str, float] = {"atol": 2e-5, "rtol": 1e-5}
SHOTS = [("great film", "positive"), ("the food was bad", "negative")]
QUERY = "very funny"

TEMPLATES = {
    "chatml": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nhelp<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
}
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
every_template = pytest.mark.parametrize("name", TEMPLATES)


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    """A copy of the word-level tokenizer that knows the templates' marks and roles."""
    copy = AutoTokenizer.from_pretrained(FOLDER)
    copy.add_tokens(MARKS, special_tokens=True)
    copy.add_tokens(["user", "assistant", "system", "model", "help"])
    copy.chat_template = template
    return copy


def encoder(name: str, **settings: Any) -> PromptEncoder:
    return PromptEncoder(chat_tokenizer(TEMPLATES[name]), MendConfig(prompt_format="chat", **settings))


def parse(shots: Any) -> list[Demonstration]:
    return parse_demonstrations(shots)[0][0]


def as_messages(shots: Any, *query: str) -> list[dict[str, str]]:
    texts = [text for shot in shots for text in shot] + list(query)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def ids_of_the_template(tokenizer: PreTrainedTokenizerBase, shots: Any, query: str) -> list[int]:
    text = tokenizer.apply_chat_template(as_messages(shots, query), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def wrap(name: str, form: str = "kv", base: str = "llama", **settings: Any) -> Any:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    config = MendConfig(prompt_format="chat", prefix_form=form, num_virtual_tokens=4, lora_r=2, **settings)
    return get_mend_model(build_tiny_model(base, **ids_of(tokenizer)), config, tokenizer).eval()


@every_template
@pytest.mark.parametrize("shots", [[], SHOTS[:1], SHOTS, [("  great film ", " positive "), *SHOTS]])
def test_demonstrations_and_query_are_the_templates_own_ids(name, shots):
    prompt = encoder(name)
    assert prompt.tokenizer.unk_token_id not in ids_of_the_template(prompt.tokenizer, shots, QUERY)
    if shots:
        [chunk] = prompt.encode_demonstrations(parse(shots)).chunks
        ids = chunk.input_ids + prompt.encode_query(QUERY)
    else:
        ids = prompt.encode_query(QUERY, is_alone=True)
    assert ids == ids_of_the_template(prompt.tokenizer, shots, QUERY)


@every_template
def test_answer_and_separator_are_what_the_template_writes_behind_a_query(name):
    prompt = encoder(name)
    turns = [prompt.encode_query(text) + prompt.encode_answer(answer) + prompt.separator_ids for text, answer in SHOTS]
    [chunk] = prompt.encode_demonstrations(parse(SHOTS)).chunks
    assert chunk.input_ids[-sum(map(len, turns)) :] == [*itertools.chain(*turns)]


@every_template
def test_dropping_a_demonstration_drops_exactly_its_ids(name):
    prompt = encoder(name, overflow="concat", max_demonstrations_per_chunk=1)
    first, second = prompt.encode_demonstrations(parse(SHOTS)).chunks
    [whole] = encoder(name).encode_demonstrations(parse(SHOTS)).chunks
    num_opening = len(first.input_ids) + len(second.input_ids) - len(whole.input_ids)
    assert first.input_ids[:num_opening] == second.input_ids[:num_opening]
    assert whole.input_ids == first.input_ids + second.input_ids[num_opening:]


@pytest.mark.parametrize(
    ("name", "shot", "tokens", "anchors"),
    [
        (
            "llama3",
            ("great film", "positive"),
            "<s> <|start_header_id|> user <|end_header_id|> \n\n great ▁film <|eot_id|> <|start_header_id|> assistant "
            "<|end_header_id|> \n\n positive <|eot_id|>",
            [11, 12, 13],
        ),
        (
            "chatml",
            ("great film", "very good"),
            "<|im_start|> system \n help <|im_end|> \n <|im_start|> user \n great ▁film <|im_end|> \n <|im_start|> "
            "assistant \n very ▁good <|im_end|> \n",
            [15, 16, 17, 18],
        ),
        ("mistral", ("bad", "negative"), "<s> [INST] ▁bad ▁ [/INST] ▁negative </s>", [4, 5, 6]),
    ],
)
def test_anchors_are_the_answer_the_token_before_and_the_end_of_its_turn(name, shot, tokens, anchors):
    prompt = encoder(name)
    [chunk] = prompt.encode_demonstrations(parse([shot])).chunks
    words = [word.replace("▁", " ") for word in tokens.split(" ")]
    assert chunk.input_ids == prompt.tokenizer.convert_tokens_to_ids(words)
    assert chunk.anchor_positions == anchors
    [bare] = encoder(name, anchor_tokens="none").encode_demonstrations(parse([shot])).chunks
    assert (bare.input_ids, bare.anchor_positions) == (chunk.input_ids, [])


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_long_input_loses_its_end_inside_its_turn(name):
    prompt = encoder(name)
    around = len(prompt.empty_prompt_ids)
    short = encoder(name, max_demonstration_tokens=around + 4)
    task = short.encode_demonstrations(parse([("the film was good and the food", "positive")]), warn=False)
    [expected] = prompt.encode_demonstrations(parse([("the film was", "positive")])).chunks
    assert task.chunks[0].input_ids == expected.input_ids
    assert task.num_lost_tokens == 4


@pytest.mark.parametrize(("name", "least"), [("max_demonstration_tokens", 12), ("max_distiller_tokens", 18)])
def test_a_budget_that_the_turns_alone_exceed_is_refused(name, least):
    task = encoder("chatml", **{name: least}).encode_demonstrations(parse(SHOTS[:1]), warn=False)
    assert task.num_tokens == 18
    with pytest.raises(ConfigError, match=f"{name}: expected room for {least} .* got {least - 1}: raise it"):
        encoder("chatml", **{name: least - 1})


def test_the_empty_prompt_is_one_pair_of_turns_without_the_opening():
    prompt = encoder("llama3")
    texts = "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert prompt.tokenizer.decode(prompt.empty_prompt_ids) == texts + "<|eot_id|>"


def test_plain_texts_stand_without_turns():
    prompt = encoder("llama3")
    [chunk] = prompt.encode_demonstrations(parse(["the film was good"])).chunks
    assert chunk.input_ids == prompt.tokenizer("").input_ids + prompt.encode_text("the film was good")


@every_template
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_what_was_read_answers_as_the_whole_conversation(name, base):
    model = wrap(name, base=base)
    query = model.tokenize(QUERY)
    whole = torch.tensor([ids_of_the_template(model.tokenizer, SHOTS, QUERY)])
    expected = model.base_model(whole).logits[:, -query["input_ids"].shape[1] :]
    torch.testing.assert_close(model(**query, demonstrations=model.read(SHOTS)).logits, expected, **CLOSE)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.base_model.generate(whole, attention_mask=torch.ones_like(whole), **settings)[:, whole.shape[1] :]
    for given in (query["input_ids"], QUERY):
        ids = model.generate(given, demonstrations=model.read(SHOTS), **settings)
        assert ids[:, query["input_ids"].shape[1] :].equal(tokens)


def test_a_query_without_demonstrations_begins_the_conversation():
    model = wrap("chatml")
    whole = torch.tensor([ids_of_the_template(model.tokenizer, [], QUERY)])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.base_model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert model.generate(QUERY, **settings).equal(expected)
    model.set_demonstrations(SHOTS)
    with model.disable_adapter():
        assert model.generate(QUERY, **settings).equal(expected)
    assert not model.generate(QUERY, **settings)[:, : whole.shape[1]].equal(whole)


@pytest.mark.parametrize("shots", [[], SHOTS])
def test_options_are_scored_as_answers_in_the_conversation(shots):
    model, options = wrap("chatml"), ["positive", "very good"]
    [scores] = score_options(model, [QUERY], [options], model.read(shots).prefix if shots else None)
    for option, score in zip(options, scores, strict=True):
        before, answer = ids_of_the_template(model.tokenizer, shots, QUERY), model.prompt.encode_answer(option)
        logits = model.base_model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(answer)[:, None]).mean().item()
        assert score == pytest.approx(expected, abs=2e-5)


class Say(LogitsProcessor):
    """Makes a model say these ids, one a step, and counts the steps."""

    def __init__(self, ids):
        self.ids, self.num_steps = ids, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[self.num_steps]] = 0.0
        self.num_steps += 1
        return forced


@every_template
@pytest.mark.parametrize("shots", [None, SHOTS])
def test_answers_end_at_the_end_of_turn(name, shots):
    model = wrap(name)
    ids = model.tokenizer(f"very good{ENDS[name]}\nbad", add_special_tokens=False).input_ids
    model.base_model.generation_config.eos_token_id = None
    say = Say(ids)
    assert model.answer([QUERY, "bad"], shots, logits_processor=[say], max_new_tokens=len(ids)) == ["very good"] * 2
    assert say.num_steps == 3
    on_and_on = {"eos_token_id": model.tokenizer.pad_token_id, "max_new_tokens": len(ids)}
    say = Say(ids)
    assert model.answer([QUERY], shots, logits_processor=[say], **on_and_on) == ["very good"]
    assert say.num_steps == len(ids)


def test_an_end_of_turn_of_several_tokens_is_cut_away():
    tokenizer = chat_tokenizer(TEMPLATES["chatml"].replace("<|im_end|>", "!?"))
    prompt = PromptEncoder(tokenizer, MendConfig(prompt_format="chat"))
    assert prompt.stop_token_id is None
    assert prompt.decode_answers([prompt.encode_text("good! bad!?\nvery")]) == ["good! bad"]


def test_student_and_teacher_read_the_conversation():
    tokenizer = chat_tokenizer(TEMPLATES["chatml"])
    prompt = PromptEncoder(tokenizer, MendConfig(prompt_format="chat"))
    row = {"demonstrations": as_messages(SHOTS), "query": QUERY, "target": "positive"}
    batch = MendCollator(tokenizer, MendConfig(prompt_format="chat"))([row])
    answer = prompt.encode_answer("positive")
    teacher = torch.cat([batch["teacher_input_ids"], batch["input_ids"]], dim=1)[0].tolist()
    assert teacher == ids_of_the_template(tokenizer, SHOTS, QUERY) + answer + prompt.separator_ids
    assert batch["demo_input_ids"].equal(batch["teacher_input_ids"])
    assert batch["labels"][batch["labels"] != -100].tolist() == answer


def test_messages_are_demonstrations_in_both_formats(tokenizer):
    assert parse(as_messages(SHOTS)) == parse(SHOTS)
    given = [as_messages(SHOTS), as_messages(SHOTS[:1])]
    assert parse_demonstrations(given) == ([parse(SHOTS), parse(SHOTS[:1])], True)
    for prompt in (encoder("llama3"), PromptEncoder(tokenizer, MendConfig())):
        assert prompt.encode_demonstrations(parse(as_messages(SHOTS))) == prompt.encode_demonstrations(parse(SHOTS))


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        ([{"role": "system", "content": "help"}, *as_messages(SHOTS)], "message 0: .*in front of the first user's"),
        (as_messages(SHOTS, QUERY), "message 4: .*leave the query out"),
        (as_messages(SHOTS)[1:], "message 0: expected the role 'user', got 'assistant'.* take turns"),
        ([*as_messages(SHOTS), ("a", "b")], "message 4: .*do not mix"),
        ([{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}], "message 0: .*give text"),
        ([as_messages(SHOTS), as_messages(SHOTS)[:3]], "task 1, message 2"),
    ],
)
def test_malformed_conversations_are_refused_with_their_place(messages, remedy):
    with pytest.raises(DataError, match=remedy):
        parse_demonstrations(messages)


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        (None, "set tokenizer.chat_template, .* or use prompt_format"),
        ("{{ raise_exception('One turn only') }}", "One turn only: give the tokenizer a chat_template"),
        ("{{ messages[-1].content }}", "writes every turn once, got one that writes it 0 times"),
        (
            TEMPLATES["chatml"].replace("m.role +", "m.role + (loop.index | string if m.role == 'user' else '') +"),
            "turns follow each other",
        ),
        (TEMPLATES["chatml"].replace("assistant\n' }}", "assistant\nhelp' }}"), "generation prompt .*in front"),
        (TEMPLATES["chatml"].replace("<|im_end|>\n' }}{% endfor", "' }}{% endfor"), "end with a mark"),
    ],
)
def test_templates_whose_turns_cannot_be_told_apart_are_refused(template, remedy):
    with pytest.raises(ConfigError, match=f"(?s){remedy}"):
        PromptEncoder(chat_tokenizer(template), MendConfig(prompt_format="chat"))


def test_a_text_around_which_the_template_changes_is_refused():
    odd = TEMPLATES["llama3"].replace("{{ bos_token }}", "{{ bos_token if 'bad' not in messages[0].content }}")
    prompt = PromptEncoder(chat_tokenizer(odd), MendConfig(prompt_format="chat"))
    assert prompt.encode_query("good")
    with pytest.raises(ConfigError, match="Expected the chat template to write 'bad' between"):
        prompt.encode_query("bad")


def test_prefixes_of_ones_own_are_refused_beside_a_chat():
    with pytest.raises(ConfigError, match='input_prefix: with prompt_format="chat" the chat template says'):
        MendConfig(prompt_format="chat", input_prefix="Q: ")


def test_the_provenance_tells_chat_from_plain_and_older_files_are_plain():
    chat = wrap("chatml")
    record = chat.distill(SHOTS).provenance
    assert record.prompt_format["prompt_format"] == "chat"
    older = {"chunks": [], "base_model_name_or_path": None, "base_model_fingerprint": {}, "distiller_hash": None}
    older |= {"distiller_name_or_path": None, "prompt_format": {"input_prefix": "Input: "}}
    assert provenance_from_record(older, 2).prompt_format["prompt_format"] == "plain"


def test_prompt_format_reaches_a_new_distiller_through_the_cli(tmp_path):
    model = wrap("chatml")
    model.unload().save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the film was good and the food was bad ." * 12}))
    (tmp_path / "mine.jsonl").write_text(json.dumps({"input": "good", "output": "positive"}))
    words = ["--base-model", tmp_path / "base", "--text", tmp_path / "text.jsonl", "--output-dir", tmp_path / "out"]
    words += ["--set", "prompt_format=chat", "--num-virtual-tokens", 3, "--num-rows", 1, "--batch-size", 1]
    assert run_mend(["pretrain", *words, "--device", "cpu"]) == 0
    assert MendConfig.from_pretrained(tmp_path / "out").prompt_format == "chat"
    words = ["--distiller", tmp_path / "out", "--demonstrations", tmp_path / "mine.jsonl", "--output-dir", tmp_path]
    assert run_mend(["distill", *words, "--device", "cpu"]) == 0
    assert DistilledDemonstrations.from_pretrained(tmp_path).provenance.num_tokens == [18]
