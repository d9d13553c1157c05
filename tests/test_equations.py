"""The equations that every base model must satisfy, in fp32 to 1e-5."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import wrap_tiny_model

from mend_hf import Demonstration, DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.prefix import EmbeddingPrefix, make_cache, read_embeddings

FAMILIES = ["gpt2", "llama", "qwen3", "opt", "gpt_neox", "gemma3_text", "mistral"]
FORMS = ["kv", "embeds"]
SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# fp32 logits of these models reach 30, so an absolute difference of 1e-5 is a rounding or two
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def wrap(base, tokenizer, form="kv", **settings):
    return wrap_tiny_model(base, tokenizer, num_virtual_tokens=4, prefix_form=form, **settings)


@pytest.fixture(params=FAMILIES)
def base(request, tiny_model):
    return tiny_model(request.param)


def greedy(**settings):
    return {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}


class TestCachedPrefixEqualsPrependedEmbeddings:
    def embed(self, model, vectors, ids):
        return torch.cat([vectors, model.base_model.get_input_embeddings()(ids)], dim=1)

    def test_logits(self, base, tokenizer):
        model = wrap(base, tokenizer, "embeds")
        distilled, ids = model.distill(SHOTS), model.tokenize(QUERIES[0])["input_ids"]
        cached = model(input_ids=ids, demonstrations=distilled).logits
        prepended = base(inputs_embeds=self.embed(model, distilled.vectors, ids)).logits[:, -ids.shape[1] :]
        torch.testing.assert_close(cached, prepended, **CLOSE)

    def test_gradients_of_the_vectors(self, base, tokenizer):
        model = wrap(base, tokenizer, "embeds")
        ids = model.tokenize(QUERIES[0])["input_ids"]
        gradients = []
        for cached in (True, False):
            vectors = model.distill(SHOTS).vectors.clone().requires_grad_(True)
            if cached:
                prefix = EmbeddingPrefix(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))
                logits = model(input_ids=ids, demonstrations=prefix).logits
            else:
                logits = base(inputs_embeds=self.embed(model, vectors, ids)).logits[:, -ids.shape[1] :]
            logits.log_softmax(-1)[..., 3].mean().backward()
            gradients.append(vectors.grad)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generated_tokens(self, base, tokenizer, beams):
        model = wrap(base, tokenizer, "embeds")
        distilled, ids = model.distill(SHOTS), model.tokenize(QUERIES[0])["input_ids"]
        cached = model.generate(ids, demonstrations=distilled, **greedy(num_beams=beams))
        prepended = base.generate(inputs_embeds=self.embed(model, distilled.vectors, ids), **greedy(num_beams=beams))
        assert cached[:, : ids.shape[1]].equal(ids)
        assert cached[:, ids.shape[1] :].tolist() == prepended.tolist()


class TestCachedTextEqualsTheText:
    def full(self, model, ids):
        [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in SHOTS]).chunks
        return torch.cat([torch.tensor([chunk.input_ids]), ids], dim=1)

    def test_logits(self, base, tokenizer):
        model = wrap(base, tokenizer)
        ids = model.tokenize(QUERIES[0])["input_ids"]
        cached = model(input_ids=ids, demonstrations=model.read(SHOTS)).logits
        torch.testing.assert_close(cached, base(self.full(model, ids)).logits[:, -ids.shape[1] :], **CLOSE)

    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_generated_tokens(self, base, tokenizer, settings):
        model = wrap(base, tokenizer)
        ids = model.tokenize(QUERIES[0])["input_ids"]
        full = self.full(model, ids)
        plain = base.generate(full, attention_mask=torch.ones_like(full), **greedy(**settings))
        cached = model.generate(ids, demonstrations=model.read(SHOTS), **greedy(**settings))
        assert cached[:, ids.shape[1] :].tolist() == plain[:, full.shape[1] :].tolist()

    def test_sampled_tokens_with_the_same_seed(self, base, tokenizer):
        model = wrap(base, tokenizer)
        ids = model.tokenize(QUERIES[0])["input_ids"]
        full, tokens = self.full(model, ids), []
        for ask in (
            lambda **kw: base.generate(full, attention_mask=torch.ones_like(full), **kw)[:, full.shape[1] :],
            lambda **kw: model.generate(ids, demonstrations=model.read(SHOTS), **kw)[:, ids.shape[1] :],
        ):
            torch.manual_seed(3)
            tokens.append(ask(**greedy(do_sample=True, num_return_sequences=3)).tolist())
        assert tokens[0] == tokens[1]


class TestABatchEqualsEachRowAlone:
    TASKS = (SHOTS, SHOTS[:1], SHOTS[1:])

    @pytest.mark.parametrize("form", FORMS)
    def test_logits_of_different_tasks_lengths_and_paddings(self, base, tokenizer, form):
        model = wrap(base, tokenizer, form)
        batch = model.tokenize(QUERIES)
        together = model(**batch, demonstrations=model.distill(list(self.TASKS))).logits
        for row, (query, task) in enumerate(zip(QUERIES, self.TASKS, strict=True)):
            alone = model(**model.tokenize(query), demonstrations=model.distill(task)).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("beams", [1, 2])
    def test_generated_tokens(self, base, tokenizer, form, beams):
        model = wrap(base, tokenizer, form)
        batch = model.tokenize(QUERIES)
        distilled = model.distill(list(self.TASKS))
        together = model.generate(**batch, demonstrations=distilled, **greedy(num_beams=beams))
        for row, query in enumerate(QUERIES):
            own = model.tokenize(query)
            alone = model.generate(**own, demonstrations=distilled[row], **greedy(num_beams=beams))
            new = together[row, batch["input_ids"].shape[1] :].tolist()
            assert new[: alone.shape[1] - own["input_ids"].shape[1]] == alone[0, own["input_ids"].shape[1] :].tolist()

    def test_one_task_answers_all_rows(self, base, tokenizer):
        model = wrap(base, tokenizer)
        batch, distilled = model.tokenize(QUERIES), model.distill(SHOTS)
        picked = model(**batch, demonstrations=distilled.select([0, 0, 0])).logits
        torch.testing.assert_close(model(**batch, demonstrations=distilled).logits, picked, **TOLERANCE)


class TestWithoutDemonstrationsItIsTheBaseModel:
    @pytest.mark.parametrize("form", FORMS)
    def test_bit_for_bit(self, base, tokenizer, form):
        bare = copy.deepcopy(base)
        model = wrap(base, tokenizer, form)
        batch = model.tokenize(QUERIES[0])
        expected = bare(**batch).logits
        assert model(**batch).logits.equal(expected)
        with model.use_demonstrations(SHOTS), model.disable_adapter():
            assert model(**batch).logits.equal(expected)
            assert model.generate(**batch, **greedy()).equal(bare.generate(**batch, **greedy()))
        assert not model(**batch, demonstrations=SHOTS).logits.equal(expected)

    def test_unloading_leaves_the_model_as_it_was(self, base, tokenizer):
        bare = copy.deepcopy(base)
        base.train()
        next(base.parameters()).requires_grad_(False)
        flags = [parameter.requires_grad for parameter in base.parameters()]
        unloaded = get_mend_model(base, MendConfig(num_virtual_tokens=2), tokenizer).unload()
        assert unloaded is base
        assert base.training
        assert [parameter.requires_grad for parameter in base.parameters()] == flags
        assert not hasattr(base, "peft_config")
        assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in bare.named_modules()]
        for (name, tensor), (other, expected) in zip(
            base.state_dict().items(), bare.state_dict().items(), strict=True
        ):
            assert name == other
            assert tensor.equal(expected)


class TestSavingAndLoadingChangesNothing:
    @pytest.mark.parametrize("form", FORMS)
    def test_of_a_distiller(self, base, tokenizer, tmp_path, form):
        bare = copy.deepcopy(base)
        model = wrap(base, tokenizer, form)
        batch = model.tokenize(QUERIES[0])
        model.save_pretrained(tmp_path)
        loaded = MendModel.from_pretrained(bare, tmp_path, tokenizer)
        assert loaded(**batch, demonstrations=SHOTS).logits.equal(model(**batch, demonstrations=SHOTS).logits)
        assert not loaded.training
        assert loaded.distill(SHOTS).provenance.distiller_hash == model.distill(SHOTS).provenance.distiller_hash

    @pytest.mark.parametrize("form", FORMS)
    def test_of_distilled_demonstrations(self, base, tokenizer, tmp_path, form):
        model = wrap(base, tokenizer, form)
        batch, distilled = model.tokenize(QUERIES[0]), model.distill([SHOTS, SHOTS[:1]])
        distilled.save_pretrained(tmp_path)
        loaded = DistilledDemonstrations.from_pretrained(tmp_path)
        assert loaded.provenance == distilled.provenance
        for row in range(2):
            before = model(**batch, demonstrations=distilled[row]).logits
            assert model(**batch, demonstrations=loaded[row]).logits.equal(before)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(base, tokenizer):
    for form in FORMS:
        model = wrap(copy.deepcopy(base), tokenizer, form).train()
        batch = model.tokenize(QUERIES[0])
        model(**batch, labels=batch["input_ids"], demonstrations=SHOTS).loss.backward()
        trained = dict(model.distiller.trained_tensors())
        last_layer = {name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.any()}
        # of the kv form, what the last layer computes after its keys and values reaches no one
        allowed = {name for name in last_layer if form == "kv" and ".2." in name}
        assert last_layer == allowed
        trained_ids = {id(tensor) for tensor in trained.values()}
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained_ids)


def test_a_prefix_can_be_used_again_and_again(base, tokenizer):
    model = wrap(base, tokenizer)
    batch, distilled = model.tokenize(QUERIES[0]), model.distill(SHOTS)
    first = model(**batch, demonstrations=distilled).logits
    model.generate(**batch, demonstrations=distilled, **greedy())
    assert model(**batch, demonstrations=distilled).logits.equal(first)
    assert make_cache(distilled.prefix, base).get_seq_length() == distilled.num_slots


def test_reading_embeddings_of_another_width_is_refused(base):
    with pytest.raises(ValueError, match="distil again with this one"):
        read_embeddings(base, torch.zeros(1, 2, 7), torch.ones(1, 2))
