"""The lm-evaluation-harness with `mend`: what it distils, and that all else is the harness's own model type `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import chat_tokenizer
from tiny_models import build_tiny_model, ids_of

from mend_hf import MendModel

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from mend_hf.integrations.lm_eval import MendLM  # noqa: E402

SHOTS = (("great film", "positive"), ("the food was bad", "negative"))
# No white space before an answer: `hf` would count its likelihood as the answer's.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
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
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    expected = evaluate(hf(base), tasks, name, 2, **chat)
    found = evaluate(mend(base, prompt_format="chat"), tasks, name, 2, **chat)
    assert likelihoods(found) == pytest.approx(likelihoods(expected), abs=1e-4)
    assert [response[0][1] for response in found] == [response[0][1] for response in expected]


def test_a_prefix_that_keeps_every_token_writes_what_hf_writes(base, tasks, monkeypatch):
    monkeypatch.setattr(MendModel, "distill", MendModel.read)
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    found = evaluate(mend(base, prompt_format="chat"), tasks, "write", 2, **chat)
    assert found == evaluate(hf(base), tasks, "write", 2, **chat)
    assert all(text for response in found for text in response)
