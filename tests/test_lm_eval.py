"""The lm-evaluation-harness with `mend`: what it distils, and that all else is the harness's own model type `hf`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from test_chat import chat_tokenizer
from tiny_models import build_tiny_model, ids_of, wrap_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mend_hf import MendModel
from mend_hf.auto import load_language_model
from mend_hf.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from mend_hf.scoring import score_options

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mend_hf.integrations.lm_eval import Conversation, MendLM, main  # noqa: E402

SHOTS = (("great film", "positive"), ("the food was bad", "negative"))
# No white space before an answer: `hf` would count its likelihood as the answer's.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
CHAT = {"apply_chat_template": True, "fewshot_as_multiturn": True}
ROWS = [
    {"text": "very funny", "label": "positive"},
    {"text": "the food was bad and slow", "label": "negative"},
    {"text": "great", "label": "positive"},
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
"""
MULTIPLE_CHOICE = 'output_type: multiple_choice\ndoc_to_choice: ["positive", "negative"]\n'
GENERATE = "output_type: generate_until\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 5}\n"
ROLLING = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
ROLLING += "metric_list: [{metric: word_perplexity}]\n"
CHOICE_METRIC = "metric_list: [{metric: acc}]\n"
GENERATE_METRIC = "metric_list: [{metric: exact_match}]\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny base model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chat_tokenizer(TEMPLATE)
    build_tiny_model("llama", **ids_of(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of the harness: every type of request, the shots fixed or drawn for every document."""
    folder = tmp_path_factory.mktemp("tasks")
    pool = [{"text": text, "label": label} for text, label in SHOTS] + [{"text": "slow", "label": "negative"}]
    for split, rows in (("train", pool), ("test", ROWS)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first_n = "fewshot_config: {sampler: first_n}\n"
    kinds = {
        "choose": MULTIPLE_CHOICE + CHOICE_METRIC + first_n,
        "choose_drawn": MULTIPLE_CHOICE + CHOICE_METRIC,
        "choose_described": MULTIPLE_CHOICE + CHOICE_METRIC + first_n + "description: the film was\n",
        "write": GENERATE + GENERATE_METRIC + first_n,
        "roll": ROLLING,
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, folder=folder) + text)
    return folder


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip, for seconds, what is installed, to log it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def evaluate(model: Any, tasks: Path, name: str, num_fewshot: int, **options: Any) -> list[Any]:
    """Return what a model said to every document of a task, as the harness logs it."""
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=num_fewshot,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"]]


def hf(base: str, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=base, device="cpu", batch_size=2, **options)


def mend(base: str | None, **options: Any) -> MendLM:
    return MendLM(base, device="cpu", batch_size=2, **options)


def likelihoods(responses: list[Any]) -> list[float]:
    return [float(response[0][0]) for response in responses]


@pytest.mark.parametrize("apply_chat_template", [False, True])
@pytest.mark.parametrize("name", ["choose", "write"])
def test_without_shots_mend_is_hf(base, tasks, name, apply_chat_template):
    answers = [
        evaluate(model, tasks, name, 0, apply_chat_template=apply_chat_template)
        for model in (hf(base), mend(base, allow_zero_shot=True))
    ]
    assert answers[0] == answers[1]


def test_the_likelihood_of_whole_texts_is_hfs(base, tasks):
    assert evaluate(mend(base), tasks, "roll", 0) == evaluate(hf(base), tasks, "roll", 0)


@pytest.mark.parametrize("name", ["choose", "choose_drawn"])
def test_a_prefix_that_keeps_every_token_gives_hfs_few_shot_likelihoods(base, tasks, name, monkeypatch):
    monkeypatch.setattr(MendModel, "distill", MendModel.read)
    expected = evaluate(hf(base), tasks, name, 2, **CHAT)
    found = evaluate(mend(base, prompt_format="chat"), tasks, name, 2, **CHAT)
    assert likelihoods(found) == pytest.approx(likelihoods(expected), abs=1e-4)
    assert [response[0][1] for response in found] == [response[0][1] for response in expected]


def test_a_prefix_that_keeps_every_token_writes_what_hf_writes(base, tasks, monkeypatch):
    monkeypatch.setattr(MendModel, "distill", MendModel.read)
    found = evaluate(mend(base, prompt_format="chat"), tasks, "write", 2, **CHAT)
    assert found == evaluate(hf(base), tasks, "write", 2, **CHAT)
    assert all(text for response in found for text in response)


@pytest.fixture(scope="module")
def distiller(base, tmp_path_factory) -> str:
    """A folder with a distiller of the base model, in the plain format, that training seems to have changed."""
    folder = tmp_path_factory.mktemp("distiller")
    model = wrap_tiny_model(
        AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), num_virtual_tokens=3, lora_r=2
    )
    model.save_pretrained(folder)
    return str(folder)


def test_a_distillers_likelihoods_are_those_of_its_own_prompt_format(base, distiller, tasks):
    model = mend(None, distiller=distiller)
    found = likelihoods(evaluate(model, tasks, "choose", 2, **CHAT))
    queries, options = [row["text"] for row in ROWS], ["positive", "negative"]
    prefix = model.model.distill(list(SHOTS)).prefix
    means = score_options(model.model, queries, [options] * len(ROWS), prefix)
    num_tokens = [len(model.model.prompt.encode_answer(option)) for option in options]
    expected = [mean * num for row in means for mean, num in zip(row, num_tokens, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_distiller_writes_what_it_writes_outside_the_harness(distiller, tasks):
    model = mend(None, distiller=distiller)
    found = [response[0] for response in evaluate(model, tasks, "write", 2, **CHAT)]
    queries = [row["text"] for row in ROWS]
    written = model.model.answer(queries, list(SHOTS), max_new_tokens=5)
    assert [text.strip() for text in found] == [text.split("\n")[0].strip() for text in written]


@pytest.mark.parametrize(("name", "num_sets"), [("choose", 1), ("choose_drawn", 3)])
def test_every_distinct_set_of_shots_is_distilled_once_and_several_at_once(base, tasks, name, num_sets, monkeypatch):
    sizes, distill = [], MendModel.distill
    monkeypatch.setattr(MendModel, "distill", lambda self, shots: sizes.append(len(shots)) or distill(self, shots))
    samples = evaluate(mend(base), tasks, name, 2, **CHAT)
    assert len(samples) == 6
    assert sizes == [min(2, num_sets - start) for start in range(0, num_sets, 2)]


def test_cached_requests_are_not_shared_with_hf(base, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    expected = evaluate(hf(base), tasks, "choose", 2, **CHAT)
    evaluate(mend(base), tasks, "choose", 2, cache_requests=True, **CHAT)
    assert evaluate(hf(base), tasks, "choose", 2, cache_requests=True, **CHAT) == expected


def test_a_description_is_distilled_with_the_first_shot(base, tasks, monkeypatch):
    seen, distill = [], MendModel.distill
    monkeypatch.setattr(MendModel, "distill", lambda self, shots: seen.extend(shots) or distill(self, shots))
    evaluate(mend(base), tasks, "choose_described", 2, **CHAT)
    assert seen == [[("the film was\n\ngreat film", "positive"), SHOTS[1]]]


@pytest.mark.parametrize("answer_start", ["", "The answer is"])
def test_a_conversation_survives_its_context(answer_start):
    conversation = Conversation(SHOTS, 'a "quoted"\nquery', answer_start)
    assert Conversation.from_context(conversation.to_context()) == conversation
    assert Conversation.from_context(conversation.query) is None


def test_an_answer_that_is_begun_goes_on_as_one_text(base):
    model = mend(base)
    ids, rest = model._encode_pair(Conversation(SHOTS, "very funny", "the film").to_context(), " was good")
    prompt = model.model.prompt
    assert ids + rest == prompt.encode_query("very funny") + prompt.encode_answer("the film was good")
    assert ids == prompt.encode_query("very funny") + prompt.encode_answer("the film")


@pytest.mark.parametrize(
    "how", [{}, {"apply_chat_template": True, "fewshot_as_multiturn": False}], ids=["one text", "one turn"]
)
def test_shots_that_cannot_be_told_apart_are_refused(base, tasks, how):
    with pytest.raises(DataError, match="give --num_fewshot and --apply_chat_template"):
        evaluate(mend(base), tasks, "choose", 2, **how)


def test_a_distiller_of_another_base_model_is_refused(distiller, tmp_path):
    tokenizer = chat_tokenizer(TEMPLATE)
    build_tiny_model("gpt2", **ids_of(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="base model"):
        mend(str(tmp_path), distiller=distiller)


@pytest.mark.parametrize(
    ("named", "options", "expected"),
    [(False, {}, "pinned"), (False, {"revision": "asked"}, "asked"), (True, {}, "main")],
)
def test_the_base_model_is_of_the_revision_that_the_distiller_names(
    base, distiller, tmp_path, monkeypatch, named, options, expected
):
    shutil.copytree(distiller, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "mend_config.json").read_text())
    (tmp_path / "mend_config.json").write_text(json.dumps(config | {"base_model_revision": "pinned"}))
    revisions, load = [], load_language_model
    monkeypatch.setattr(
        "mend_hf.integrations.lm_eval.load_language_model",
        lambda name, **kwargs: revisions.append(kwargs["revision"]) or load(name, **kwargs),
    )
    model = mend(base if named else None, distiller=str(tmp_path), **options)
    assert revisions == [expected]
    assert model.get_model_info()["model_revision"] == expected


@pytest.mark.parametrize("name", ["choose", "write"])
def test_examples_that_fill_the_window_are_refused(base, tasks, name):
    with pytest.raises(DataError, match=r"window of 20 tokens, got examples that take 20 positions.*--num_fewshot"):
        evaluate(mend(base, max_length=20), tasks, name, 2, **CHAT)


def test_models_that_are_not_named_or_not_there_are_refused(distiller, tmp_path):
    with pytest.raises(ConfigError, match="pretrained="):
        mend(None)
    with pytest.raises(ConfigError, match="in a folder or on the Hub"):
        mend(str(tmp_path))
    with pytest.raises(ConfigError, match="leave it out"):
        mend(None, distiller=distiller, prompt_format="chat")


def test_a_missing_harness_is_named_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mend_hf.integrations.lm_eval")
    with pytest.raises(MissingExtraError, match=r"mend_hf\[lm_eval\]"):
        importlib.import_module("mend_hf.integrations.lm_eval")


@pytest.mark.parametrize(
    ("prompt_format", "until", "expected"),
    [
        ("plain", ["Question:"], ["Question:", "\n\nInput:"]),
        ("plain", "\n", ["\n", "\n\nInput:"]),
        ("chat", None, ["</s>"]),
    ],
)
def test_writing_stops_where_another_demonstration_begins(base, prompt_format, until, expected):
    model = mend(base, prompt_format=prompt_format)
    request = Instance("generate_until", {}, (Conversation(SHOTS, "very funny").to_context(), {"until": until}), 0)
    assert model._stop_at_next_demonstration(request).args == (request.args[0], {"until": expected})
    assert request.args[1] == {"until": until}


def test_the_command_line_evaluates_a_distiller(distiller, tasks, monkeypatch, capsys):
    arguments = f"run --model mend --model_args distiller={distiller} --tasks choose --include_path {tasks}"
    arguments += " --num_fewshot 2 --apply_chat_template --device cpu --batch_size 2"
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments.split()])
    main()
    table = capsys.readouterr().out
    assert "|choose|" in table
    assert "2|acc" in table.replace(" ", "")


def test_the_command_line_says_a_known_error_in_one_line(monkeypatch, capsys):
    def refuse() -> None:
        raise DataError("Expected this, got that: do so.")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: Expected this, got that: do so.\n"
