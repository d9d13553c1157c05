"""The option loss: what decides an answer in evaluation is what training lowers, and nothing else changes by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf import MendCollator, MendConfig, MendModel, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError
from mend_hf.losses import option_loss
from mend_hf.scoring import option_priors, score_options

SHOTS = [{"input": "great film", "output": "positive"}, {"input": "a bore", "output": "negative"}]
LABELS = ["positive", "very negative", "so funny a film"]  # of one, two and four words
ROWS = [
    {"demonstrations": SHOTS, "query": "good food", "target": "positive", "options": LABELS},
    {
        "demonstrations": SHOTS[:1],
        "query": ["bad", "a very very funny film"],
        "target": ["very negative", "positive"],
        "options": [LABELS[:2], LABELS],
    },
    {"demonstrations": SHOTS, "query": "the town", "target": "good", "options": []},
]
THREE_QUERIES = {
    "demonstrations": SHOTS,
    "query": ["bad", "a very very funny film", "the town"],
    "target": [LABELS[1], LABELS[0], LABELS[1]],
    "options": [LABELS, LABELS[::-1], LABELS],
}
NINE_LABELS = [f"label {number}" for number in range(9)]
ALONE = {"nll_loss_weight": 0.0, "kd_loss_weight": 0.0, "option_loss_weight": 1.0}

TinyModel = Callable[[str], PreTrainedModel]
Arguments = Callable[..., MendTrainingArguments]


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    def arguments(**settings: Any) -> MendTrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 3, "max_steps": 2,
            "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "use_cpu": True, "seed": 3,
        }  # fmt: skip
        return MendTrainingArguments(**{**defaults, **settings})

    return arguments


def make_model(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> MendModel:
    torch.manual_seed(0)
    return get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=2, **settings), tokenizer)


def collate(model: MendModel, rows: Sequence[Any] = ROWS, **settings: Any) -> dict[str, torch.Tensor]:
    return MendCollator(model.tokenizer, model.mend_config, **settings)(rows)


def losses_of(trainer: MendTrainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    with torch.no_grad():
        losses, _ = trainer._objective(trainer.model, batch)
    return {name: value.item() for name, value in losses.items()}


def test_it_is_the_cross_entropy_of_mean_log_likelihoods_worked_out_by_hand() -> None:
    probabilities = torch.tensor(
        [
            [[0.2, 0.8], [0.5, 0.5]],  # query 0: its target, 0 1
            [[0.6, 0.4], [0.9, 0.1]],  # query 1: its target, 0
            [[0.2, 0.8], [0.5, 0.5]],  # query 0: 1
            [[0.2, 0.8], [0.7, 0.3]],  # query 0: 1 0
            [[0.1, 0.9], [0.9, 0.1]],  # query 2, which has no other option
        ],
        dtype=torch.float64,
    )
    labels = torch.tensor([[0, 1], [0, -100], [1, -100], [1, 0], [1, 1]])
    queries = torch.tensor([0, 1, 0, 0, 2])
    scores = [math.log(0.2 * 0.5) / 2, math.log(0.8), math.log(0.8 * 0.7) / 2]
    expected = math.log(sum(map(math.exp, scores))) - scores[0]
    got = option_loss(probabilities.log(), labels, queries)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(expected)
    assert option_loss(probabilities.log(), labels, queries, num_items=4).item() == pytest.approx(expected / 4)


def test_calibrated_it_takes_off_what_an_option_gets_over_the_queries_of_its_demonstrations() -> None:
    likelihoods = torch.tensor([0.6, 0.3, 0.9, 0.2, 0.5, 0.7, 0.1, 0.4], dtype=torch.float64)
    labels = torch.tensor([[0], [1], [1], [0], [0], [1], [0], [1]])  # of every query its target first
    queries = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    tasks = torch.tensor([0, 0, 0, 0, 0, 0, 7, 7])  # the last query is asked behind other demonstrations, and alone
    logits = torch.stack([likelihoods, 1 - likelihoods], 1)
    logits[labels[:, 0] == 1] = logits[labels[:, 0] == 1].flip(1)
    zero, one = (0.6 + 0.2 + 0.5) / 3, (0.3 + 0.9 + 0.7) / 3
    right, wrong = [0.6 / zero, 0.9 / one, 0.5 / zero, 0.1], [0.3 / one, 0.2 / zero, 0.7 / one, 0.4]
    expected = -sum(math.log(good / (good + bad)) for good, bad in zip(right, wrong, strict=True)) / 4
    got = option_loss(logits.log()[:, None], labels, queries, task_rows=tasks)
    assert got.item() == pytest.approx(expected)


def test_calibrated_queries_with_an_option_of_their_own_keep_their_scores() -> None:
    logits = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0))
    labels, queries = torch.tensor([[0], [1], [2], [1], [3]]), torch.tensor([0, 0, 1, 1, 1])
    as_they_are = option_loss(logits, labels, queries)
    assert option_loss(logits, labels, queries, task_rows=torch.zeros(5, dtype=torch.long)) == as_they_are


def test_calibrated_a_preference_for_an_option_costs_nothing() -> None:
    logits = torch.randn(6, 1, 2, generator=torch.Generator().manual_seed(0))
    labels, queries = torch.tensor([[0], [1], [1], [0], [1], [0]]), torch.tensor([0, 0, 1, 1, 2, 2])
    tasks = torch.zeros(6, dtype=torch.long)
    scores = logits.log_softmax(-1) - torch.tensor([3.0, 0.0])  # option 0 is that much less likely, whatever is asked
    rest = scores.exp().sum(-1, keepdim=True)
    wider = torch.cat([scores, (1 - rest).log()], dim=-1)
    before, after = (option_loss(each, labels, queries, task_rows=tasks) for each in (logits, wider))
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    assert option_loss(wider, labels, queries).item() != pytest.approx(before.item(), rel=0.1)


def test_without_two_options_of_one_query_it_is_zero() -> None:
    logits = torch.randn(2, 1, 3, requires_grad=True)
    loss = option_loss(logits, torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "kv"), ("llama", "embeds"), ("gpt2", "kv"), ("gemma3_text", "kv")]
)
def test_it_lowers_the_scores_that_the_evaluation_compares(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments, family: str, form: str
) -> None:
    model = make_model(tiny_model(family), tokenizer, prefix_form=form)
    trainer = MendTrainer(model=model, args=arguments(**ALONE), train_dataset=ROWS)
    expected = []
    for row in ROWS[:2]:
        queries, targets, options = (
            row[name] if isinstance(row["query"], list) else [row[name]] for name in ("query", "target", "options")
        )
        prefix = model.distill(row["demonstrations"]).prefix
        for scores, target, choices in zip(
            score_options(model, queries, options, prefix), targets, options, strict=True
        ):
            expected.append(math.log(sum(map(math.exp, scores))) - scores[choices.index(target)])
    batch = collate(model, with_options=True, with_teacher=False)
    assert losses_of(trainer, batch) == {
        "nll_loss": pytest.approx(losses_of(trainer, batch)["nll_loss"]),
        "option_loss": pytest.approx(sum(expected) / 3, rel=1e-4),
    }


def test_calibrated_it_lowers_what_calibrated_evaluation_compares(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    model = make_model(tiny_model("llama"), tokenizer)
    queries, targets = THREE_QUERIES["query"], THREE_QUERIES["target"]
    rows = [THREE_QUERIES, {**THREE_QUERIES, "demonstrations": SHOTS[:1]}]
    expected = []
    for row in rows:
        prefix = model.distill(row["demonstrations"]).prefix
        priors = option_priors(model, queries, LABELS, prefix)
        for scores, target in zip(score_options(model, queries, [LABELS] * 3, prefix), targets, strict=True):
            calibrated = {label: score - priors[label] for label, score in zip(LABELS, scores, strict=True)}
            expected.append(math.log(sum(map(math.exp, calibrated.values()))) - calibrated[target])
    trainer = MendTrainer(model=model, args=arguments(**ALONE, calibrate_options=True), train_dataset=rows)
    batch = collate(model, rows, with_options=True, with_teacher=False)
    assert losses_of(trainer, batch)["option_loss"] == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_calibrated_an_encoder_decoders_options_are_known_again_whatever_the_padding(
    tiny_encoder_decoder: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    model = make_model(tiny_encoder_decoder("t5"), tokenizer, task_type="SEQ_2_SEQ_LM")
    likelihoods = []
    for query in THREE_QUERIES["query"]:
        alone = [
            collate(model, [{**ROWS[0], "query": query, "target": label}], with_teacher=False) for label in LABELS
        ]
        with torch.no_grad():
            likelihoods.append([math.exp(-model(**batch).loss.item()) for batch in alone])
    means = [sum(column) / 3 for column in zip(*likelihoods, strict=True)]
    expected = 0.0
    for row, target in zip(likelihoods, THREE_QUERIES["target"], strict=True):
        shares = [likelihood / mean for likelihood, mean in zip(row, means, strict=True)]
        expected -= math.log(shares[LABELS.index(target)] / sum(shares)) / 3
    trainer = MendTrainer(model=model, args=arguments(**ALONE, calibrate_options=True), train_dataset=ROWS)
    batch = collate(model, [THREE_QUERIES], with_options=True, with_teacher=False)
    assert losses_of(trainer, batch)["option_loss"] == pytest.approx(expected, rel=1e-4)


def test_an_encoder_decoders_options_are_scored_with_their_end(
    tiny_encoder_decoder: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    model = make_model(tiny_encoder_decoder("t5"), tokenizer, task_type="SEQ_2_SEQ_LM")
    trainer = MendTrainer(model=model, args=arguments(**ALONE), train_dataset=ROWS)
    row = ROWS[0]
    means = []
    for option in row["options"]:
        alone = collate(model, [{**row, "target": option}], with_teacher=False)
        with torch.no_grad():
            means.append(-model(**alone).loss.item())
    expected = math.log(sum(map(math.exp, means))) - means[0]
    batch = collate(model, [row], with_options=True, with_teacher=False)
    assert losses_of(trainer, batch)["option_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_wrong_options_leave_the_other_losses_as_they_are(
    tiny_model: TinyModel,
    tiny_encoder_decoder: TinyModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Arguments,
    family: str,
) -> None:
    is_t5 = family == "t5"
    base = tiny_encoder_decoder(family) if is_t5 else tiny_model(family)
    model = make_model(base, tokenizer, task_type="SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM")
    both = {"hidden_loss_weight": 1.0, "option_loss_weight": 1.0}
    with_options = losses_of(
        MendTrainer(model=model, args=arguments(**both), train_dataset=ROWS), collate(model, with_options=True)
    )
    without = losses_of(
        MendTrainer(model=model, args=arguments(hidden_loss_weight=1.0), train_dataset=ROWS), collate(model)
    )
    assert with_options.pop("option_loss") > 0
    assert with_options == pytest.approx(without, rel=1e-5)
    ignored = losses_of(
        MendTrainer(model=model, args=arguments(hidden_loss_weight=1.0), train_dataset=ROWS),
        collate(model, with_options=True),
    )
    assert ignored == pytest.approx(without, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens_per_pass": 1},
        {"max_tokens_per_pass": 120},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_tokens_per_pass": 0},
        {"max_tokens_per_pass": 1, "calibrate_options": True},
    ],
)
def test_parts_of_a_batch_add_up_to_it(
    tiny_model: TinyModel,
    tiny_encoder_decoder: TinyModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Arguments,
    family: str,
    settings: dict[str, Any],
) -> None:
    results = []
    is_t5 = family == "t5"
    calibrated = {"calibrate_options": settings.get("calibrate_options", False)}
    for changes in ({"max_tokens_per_pass": 0} | calibrated, settings):
        base = tiny_encoder_decoder(family) if is_t5 else tiny_model(family)
        model = make_model(base, tokenizer, task_type="SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM")
        args = arguments(optim="sgd", max_grad_norm=0.0, option_loss_weight=2.0, **changes)
        trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
        trainer.train()
        logged = [entry["option_loss"] for entry in trainer.state.log_history if "option_loss" in entry]
        results.append((logged, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    (whole_losses, whole), (part_losses, parts) = results
    assert len(whole_losses) == 2
    assert part_losses == pytest.approx(whole_losses, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-5)


def test_training_by_it_lowers_it_and_evaluation_reports_it(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    model = make_model(tiny_model("llama"), tokenizer)
    trainer = MendTrainer(
        model=model,
        args=arguments(max_steps=16, eval_strategy="no", **ALONE),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        probe_dataset=ROWS,
    )
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_option_loss"])
    trainer.train()
    assert trainer.evaluate()["eval_option_loss"] < 0.8 * before["eval_option_loss"]
    assert any("probe_kl" in entry for entry in trainer.state.log_history)


def test_a_language_model_that_is_tuned_itself_learns_to_choose_too(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    base = tiny_model("llama")
    args = arguments(max_steps=12, **ALONE)
    trainer = MendTrainer(model=base, args=args, train_dataset=ROWS[:2], processing_class=tokenizer)
    trainer.train()
    history = [entry["option_loss"] for entry in trainer.state.log_history if "option_loss" in entry]
    assert history[-1] < 0.8 * history[0]


def test_a_batch_holds_every_wrong_option_once_behind_its_query(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model(tiny_model("llama"), tokenizer)
    batch = collate(model, with_options=True)
    assert batch["option_query_rows"].tolist() == [0, 0, 1, 2, 2]
    answers = [tokenizer.decode(row[row != -100]).strip() for row in batch["option_labels"]]
    assert answers == ["very negative", "so funny a film", "positive", "very negative", "so funny a film"]
    prompt = model.prompt
    for ids, mask, query in zip(
        batch["option_input_ids"],
        batch["option_attention_mask"],
        ["good food", "good food", "bad", "a very very funny film", "a very very funny film"],
        strict=True,
    ):
        head = prompt.encode_query(query)
        assert ids[mask.bool()].tolist()[: len(head)] == head
    empty = collate(model, ROWS[2:], with_options=True)
    assert [empty[f"option_{name}"].shape for name in ("input_ids", "labels", "query_rows")] == [(0, 0), (0, 0), (0,)]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"options": "positive"}, "Row 0: expected options as a list of strings"),
        ({"options": [1, 2]}, "Row 0: expected options as a list of strings"),
        ({"query": ["a", "b"], "target": ["good"] * 2}, "for 2 queries, as so many lists"),
        ({"options": None}, "Row 0: expected options as a list of strings"),
    ],
)
def test_malformed_options_are_refused(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any], remedy: str
) -> None:
    model = make_model(tiny_model("llama"), tokenizer)
    with pytest.raises(DataError, match=remedy):
        collate(model, [{**ROWS[0], **change}], with_options=True)


def test_rows_without_options_and_batches_without_their_columns_are_refused_with_the_remedy(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    model = make_model(tiny_model("llama"), tokenizer)
    row = {name: value for name, value in ROWS[0].items() if name != "options"}
    with pytest.raises(DataError, match="an empty list where any text may be the answer, or set the weight to 0"):
        collate(model, [row], with_options=True)
    trainer = MendTrainer(model=model, args=arguments(**ALONE), train_dataset=ROWS)
    with pytest.raises(DataError, match=r"MendCollator\(\.\.\., with_options=True\), or set the weight to 0"):
        trainer.compute_loss(model, collate(model))
    with pytest.raises(ConfigError, match="option_loss_weight: expected 0 or more, got -1"):
        arguments(option_loss_weight=-1.0)
    with pytest.raises(ConfigError, match="calibrate_options: expected option_loss_weight above 0 beside it"):
        arguments(calibrate_options=True)


class TestMaxOptions:
    def test_the_target_and_a_few_others_are_kept_in_their_order(self) -> None:
        rows = make_rows(max_options=3)
        drawn = [choices for row in rows for choices in row["options"]]
        assert {len(choices) for choices in drawn} == {3}
        assert all(choices == sorted(choices) for choices in drawn)
        pairs = [pair for row in rows for pair in zip(row["target"], row["options"], strict=True)]
        assert all(target in choices for target, choices in pairs)
        assert {option for choices in drawn for option in choices} == {*NINE_LABELS}

    def test_everything_else_of_a_row_stays_as_it_was(self) -> None:
        few, every = (make_rows(max_options=number)[5] for number in (3, None))
        assert few.pop("options") != every.pop("options")
        assert few == every
        assert make_rows(max_options=9)[5]["options"] == [NINE_LABELS] * 4

    def test_fewer_than_two_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="Expected max_options of 2 or more, or None for all, got 1"):
            make_rows(max_options=1)


def make_rows(*, max_options: int | None) -> list[dict[str, Any]]:
    tasks = {"a": [Example("a", f"text {n}", f"label {n % 9}", options=tuple(NINE_LABELS)) for n in range(60)]}
    rows = FewShotDataset(
        tasks, num_demonstrations=2, queries_per_demonstrations=4, num_rows=20, seed=0, max_options=max_options
    )
    return [rows[index] for index in range(len(rows))]
