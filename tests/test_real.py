"""What must hold on a real language model: SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mend_hf import Demonstration, MendCollator, MendConfig, MendModel, get_mend_model
from mend_hf.caches import continue_inputs
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import load_tasks, sample_demonstrations
from mend_hf.losses import kd_loss
from mend_hf.scoring import score_options

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).parents[1] / "examples"
DISTILLER = EXAMPLES / "distillers" / "smollm2-135m-kv"


@pytest.fixture(scope="module")
def batch_rows():
    return list(
        FewShotDataset(
            load_tasks(EXAMPLES / "data"), num_demonstrations=6, queries_per_demonstrations=4, num_rows=2, seed=3
        )
    )


@torch.no_grad()
def kl_to_full_text(model, rows, *, zero_shot=False):
    batch = MendCollator(model.tokenizer, model.mend_config)(rows)
    batch.pop("labels")
    text = model.read_tokens(batch.pop("teacher_input_ids"), batch.pop("teacher_attention_mask"))
    query = {name: batch[name] for name in ("input_ids", "attention_mask")}
    behind_text = continue_inputs(text.select(batch["query_task_rows"]), query["attention_mask"], model.base_model)
    teacher = model.base_model(input_ids=query["input_ids"], **behind_text).logits[:, :-1]
    student = (model.base_model(**query) if zero_shot else model(**batch)).logits[:, :-1]
    mask = query["attention_mask"].bool()
    return kd_loss(student, teacher, mask[:, 1:] & mask[:, :-1]).item()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_virtual_tokens": 0},
        {"num_virtual_tokens": 100},
        {"num_virtual_tokens": 100, "anchor_tokens": "none"},
        {"num_virtual_tokens": 100, "prefix_form": "embeds"},
        {"num_virtual_tokens": 16, "prefix_form": "embeds"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_an_untrained_prefix_costs_at_most_a_tenth_of_a_nat_over_zero_shot(smollm2, batch_rows, settings):
    base, tokenizer = smollm2
    model = get_mend_model(base, MendConfig(**settings), tokenizer)
    try:
        assert kl_to_full_text(model, batch_rows) <= kl_to_full_text(model, batch_rows, zero_shot=True) + 0.1
    finally:
        model.unload()


@pytest.fixture(scope="module")
def shipped(smollm2):
    base, tokenizer = smollm2
    model = MendModel.from_pretrained(base, DISTILLER, tokenizer)
    yield model
    model.unload()


def count_right(model, task, prefix):
    queries = load_tasks(EXAMPLES / "data", split="test")[task]
    scores = score_options(model, [query.input for query in queries], [query.options for query in queries], prefix)
    answers = [query.options[row.index(max(row))] for query, row in zip(queries, scores, strict=True)]
    return sum(answer == query.output for answer, query in zip(answers, queries, strict=True))


def demonstrations_of(task):
    examples = sample_demonstrations(load_tasks(EXAMPLES / "data")[task], 16, 13)
    return [(example.input, example.output) for example in examples]


def test_the_shipped_distiller_answers_better_than_zero_shot_on_tasks_it_never_saw(shipped):
    right = {"zero-shot": 0, "distilled": 0}
    for task in ("support_tickets", "restaurant_notes"):
        right["zero-shot"] += count_right(shipped, task, None)
        right["distilled"] += count_right(shipped, task, shipped.distill(demonstrations_of(task)).prefix)
    assert right["distilled"] > right["zero-shot"], right


def test_cached_text_answers_as_the_text_itself_does(shipped):
    demonstrations = demonstrations_of("support_tickets")[:4]
    read = shipped.read(demonstrations)
    [chunk] = shipped.prompt.encode_demonstrations([Demonstration(*pair) for pair in demonstrations]).chunks
    query = shipped.tokenize("Where is my parcel?")["input_ids"]
    full = torch.cat([torch.tensor([chunk.input_ids]), query], dim=1)
    plain = shipped.base_model.generate(
        full, attention_mask=torch.ones_like(full), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    cached = shipped.generate(query, demonstrations=read, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert plain[0, full.shape[1] :].tolist() == cached[0, query.shape[1] :].tolist()


def test_a_batch_of_tasks_generates_what_each_generates_alone(shipped):
    tasks = [demonstrations_of("support_tickets"), demonstrations_of("restaurant_notes")[:5]]
    queries = ["I was charged twice this month.", "The soup was cold and the waiter was rude, sadly."]
    together = shipped.answer(queries, shipped.distill(tasks), max_new_tokens=6)
    alone = [shipped.answer([query], task, max_new_tokens=6)[0] for query, task in zip(queries, tasks, strict=True)]
    assert together == alone
