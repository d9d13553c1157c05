"""Several threads, or asyncio tasks, on one model: the same as one after the other."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

import pytest
import torch
from tiny_models import wrap_tiny_model

from mend_hf import MendModel

SHOTS = [("great film", "positive"), ("a bore", "negative")]
TASKS = [SHOTS, [("good food", "negative"), ("bad film", "positive"), ("funny", "negative")]]
QUERY = "moving and funny"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def build(tiny_model, tokenizer, name="llama", form="kv"):
    settings = {"num_virtual_tokens": 3, "prefix_form": form}
    return wrap_tiny_model(tiny_model(name), tokenizer, seed=0, spread=0.1, **settings)


@pytest.fixture
def model(tiny_model, tokenizer):
    return build(tiny_model, tokenizer)


def run_together(*works: Callable[[], object]) -> list[object]:
    """Start all at the same moment and return what each returned."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> object:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, work) for work in works]]


@contextmanager
def stopping_inside(module: torch.nn.Module):
    """Let the first thread through a module stop there until `resume` is set, by then others may have passed."""
    reached, resume, first = threading.Event(), threading.Event(), threading.Lock()

    def stop(*_: object) -> None:
        if first.acquire(blocking=False):
            reached.set()
            assert resume.wait(timeout=60)

    handle = module.register_forward_pre_hook(stop)
    try:
        yield reached, resume
    finally:
        resume.set()
        handle.remove()


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_threads_with_demonstrations_of_their_own_answer_as_one_after_the_other(tiny_model, tokenizer, form):
    model = build(tiny_model, tokenizer, form=form)
    distilled = [model.distill(task) for task in TASKS]
    alone = [model.generate(QUERY, demonstrations=task, **GREEDY).tolist() for task in distilled]
    assert alone[0] != alone[1]
    works = [lambda task=task: model.generate(QUERY, demonstrations=task, **GREEDY).tolist() for task in distilled]
    assert run_together(*works, *works) == alone + alone


def test_a_block_binds_its_own_thread_alone(model):
    bare = model.generate(QUERY, **GREEDY).tolist()
    alone = [model.generate(QUERY, demonstrations=task, **GREEDY).tolist() for task in TASKS]
    everyone_inside = threading.Barrier(3)

    def ask(task):
        with model.use_demonstrations(task):
            everyone_inside.wait(60)
            return model.generate(QUERY, **GREEDY).tolist()

    def ask_bare():
        everyone_inside.wait(60)
        return model.generate(QUERY, **GREEDY).tolist()

    together = run_together(lambda: ask(TASKS[0]), lambda: ask(TASKS[1]), ask_bare)
    assert together == [*alone, bare]
    assert model.generate(QUERY, **GREEDY).tolist() == bare


def test_a_block_binds_its_own_asyncio_task_alone(model):
    alone = [model.generate(QUERY, demonstrations=task, **GREEDY).tolist() for task in TASKS]

    async def ask(task, entered, may_answer, answered):
        with model.use_demonstrations(task):
            entered.set()
            await may_answer.wait()
            tokens = model.generate(QUERY, **GREEDY).tolist()
            answered.set()
            return tokens

    async def ask_both():
        first_in, second_in, first_done, second_done = (asyncio.Event() for _ in range(4))
        first = ask(TASKS[0], first_in, second_in, first_done)  # answers while the second is inside its block
        return await asyncio.gather(first, ask(TASKS[1], second_in, first_done, second_done))

    assert asyncio.run(ask_both()) == alone


def test_a_thread_that_copies_the_context_takes_part_in_the_block(model):
    expected = model.generate(QUERY, demonstrations=SHOTS, **GREEDY).tolist()
    with model.use_demonstrations(SHOTS):
        context = copy_context()
        assert run_together(lambda: context.run(model.generate, QUERY, **GREEDY).tolist()) == [expected]


def test_what_is_set_for_the_model_reaches_every_thread_outside_of_blocks(model):
    expected = [model.generate(QUERY, demonstrations=task, **GREEDY).tolist() for task in TASKS]
    model.set_demonstrations(TASKS[0])
    assert run_together(lambda: model.generate(QUERY, **GREEDY).tolist()) == [expected[0]]
    with model.use_demonstrations(TASKS[1]):
        model.set_demonstrations(None)
        assert model.generate(QUERY, **GREEDY).tolist() == expected[1]


def test_being_bare_in_one_thread_leaves_the_others_alone(model):
    model.set_demonstrations(SHOTS)
    expected, everyone_inside = model.generate(QUERY, **GREEDY).tolist(), threading.Barrier(2)

    def ask_bare():
        with model.disable_adapter():
            everyone_inside.wait(60)
            return model.generate(QUERY, **GREEDY).tolist()

    def ask():
        everyone_inside.wait(60)
        return model.generate(QUERY, **GREEDY).tolist()

    bare, bound = run_together(ask_bare, ask)
    assert bound == expected != bare
    model.set_demonstrations(None)
    assert model.generate(QUERY, **GREEDY).tolist() == bare


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answering_while_another_thread_is_in_the_middle_of_distilling(tiny_model, tokenizer, name):
    model = build(tiny_model, tokenizer, name)
    distilled = model.distill(TASKS[1])
    alone = model.generate(QUERY, demonstrations=distilled, **GREEDY).tolist()
    bare = model(**model.tokenize(QUERY)).logits
    middle = next(layer for layer in model.distiller.adapter_layers()[1:])
    with stopping_inside(middle) as (reached, resume), ThreadPoolExecutor(1) as pool:
        distilling = pool.submit(model.distill, SHOTS)
        assert reached.wait(60)
        assert model.generate(QUERY, demonstrations=distilled, **GREEDY).tolist() == alone
        assert model(**model.tokenize(QUERY)).logits.equal(bare)
        resume.set()
        interrupted = distilling.result(60)
    assert all(a.equal(b) for a, b in zip(interrupted.prefix.keys, model.distill(SHOTS).prefix.keys, strict=True))


def test_training_in_one_thread_and_answering_in_others(model):
    query, distilled = model.tokenize(QUERY), model.distill(TASKS[1])
    alone = model(**query, demonstrations=distilled).logits

    def train() -> list[torch.Tensor]:
        model.zero_grad()
        for _ in range(3):  # raw demonstrations: read with the adapter on, answered with it off, then backward
            model(**query, labels=query["input_ids"], demonstrations=SHOTS).loss.backward()
        return [tensor.grad.clone() for _, tensor in model.distiller.trained_tensors() if tensor.grad is not None]

    def answer() -> bool:
        with torch.no_grad():
            return all(model(**query, demonstrations=distilled).logits.equal(alone) for _ in range(6))

    expected = train()
    assert len(expected) > 10
    gradients, *answers = run_together(train, answer, answer)
    assert answers == [True, True]
    assert all(a.equal(b) for a, b in zip(gradients, expected, strict=True))


def test_an_error_while_distilling_leaves_the_adapter_off(model):
    query = model.tokenize(QUERY)
    bare = model(**query).logits

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    handle = model.distiller.adapter_layers()[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.distill(SHOTS)
    handle.remove()
    assert model(**query).logits.equal(bare)


def test_a_model_is_copied_whole_also_while_demonstrations_are_bound(model, tmp_path):
    query = model.tokenize(QUERY)
    expected, bare = model(**query, demonstrations=SHOTS).logits, model(**query).logits
    model.set_demonstrations(SHOTS)
    with model.use_demonstrations(SHOTS):
        twin = copy.deepcopy(model)
    assert twin(**query).logits.equal(expected)
    with twin.use_demonstrations(TASKS[1]):
        assert model(**query).logits.equal(expected)
    model.set_demonstrations(None)
    assert model(**query).logits.equal(bare)
    twin.set_demonstrations(None)
    with torch.no_grad():
        for _, tensor in twin.distiller.trained_tensors():
            tensor.add_(1.0)
    assert twin(**query).logits.equal(bare)
    assert model(**query, demonstrations=SHOTS).logits.equal(expected)
    model.save_pretrained(tmp_path)
    loaded = MendModel.from_pretrained(model.unload(), tmp_path, model.tokenizer)
    assert loaded(**query, demonstrations=SHOTS).logits.equal(expected)


def test_a_module_around_the_model_saves_the_distiller_alone(model):
    wrapped = torch.compile(model, backend="eager")
    assert set(wrapped.state_dict()) == {f"_orig_mod.{name}" for name in model.state_dict()}
    assert all(tensor.requires_grad for tensor in model.state_dict(keep_vars=True).values())
    assert not any(tensor.requires_grad for tensor in model.state_dict().values())


@torch.no_grad()
def test_a_compiled_layer_is_read_past_its_adapter_and_distilled_through_it(model):
    query = model.tokenize(QUERY)
    expected, bare, keys = model(**query, demonstrations=SHOTS).logits, model(**query).logits, model.distill(SHOTS)
    model.distiller.adapter_layers()[1].compile(backend="eager", fullgraph=True, dynamic=True)

    def check() -> bool:
        assert all(a.equal(b) for a, b in zip(model.distill(SHOTS).prefix.keys, keys.prefix.keys, strict=True))
        assert model(**query).logits.equal(bare)
        return model(**query, demonstrations=SHOTS).logits.equal(expected)

    assert check()
    assert run_together(check, check) == [True, True]


def test_hooks_on_a_layer_with_an_adapter_are_called_on_and_off(model):
    layer, calls = model.distiller.adapter_layers()[0], []
    expected = model(**model.tokenize(QUERY)).logits
    handle = layer.register_forward_hook(lambda *_: calls.append("seen"))
    assert model(**model.tokenize(QUERY)).logits.equal(expected)
    assert len(calls) == 1
    model.distill(SHOTS)
    assert len(calls) == 2
    handle.remove()
    assert model(**model.tokenize(QUERY)).logits.equal(expected)
    assert len(calls) == 2
