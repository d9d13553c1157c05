"""One check a feature, the same for every family of models: the tests and the table in the docs both run these.

A check takes a `Family` and returns how far two ways of computing the same thing lie apart.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf import Demonstration, DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.architectures import accepts
from mend_hf.prefix import EmbeddingPrefix, positions_of

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
TASKS = (SHOTS, SHOTS[:1], SHOTS[1:])
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
# fp32 logits of these models reach 30, so an absolute difference of 1e-5 is a rounding or two
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 2e-5, 1e-5
# How many times the rounding of the base model's own batches a batch behind a prefix may show: tasks distilled
# together differ from one distilled alone by a rounding of the vectors, which the base model then makes larger.
MAX_OWN_ROUNDINGS = 16.0
# How many times the base model's own error in bf16 a prefix may add
MAX_BF16_RATIO = 2.0


@dataclass(frozen=True)
class Measured:
    """What a check found.

    Attributes:
        difference: The largest absolute difference of numbers.
        is_exact: Whether it is within the tolerance, and no token differs.
        num_tokens: How many generated tokens differ.
        own_difference: What the bare base model makes of the same change, where that is measured.
    """

    difference: float
    is_exact: bool
    num_tokens: int = 0
    own_difference: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether it is exact, or a rounding of the size that the base model itself has."""
        is_rounding = self.difference <= MAX_OWN_ROUNDINGS * self.own_difference
        return self.is_exact or (is_rounding and self.num_tokens == 0)


@dataclass
class Family:
    """A tiny base model with its wrapped copies, made once and shared by all checks of the family.

    Attributes:
        name: One of `tiny_models.TINY_MODELS`.
        build: Returns the model, the same at every call.
        tokenizer: Its tokenizer.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    _wrapped: dict[str, MendModel] = field(default_factory=dict)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model as it is without a wrapper."""
        return self.build()

    def wrap(self, form: str, base: PreTrainedModel | None = None) -> MendModel:
        """Return a wrapped copy, or the given model wrapped, whose distiller differs from a newborn one."""
        if base is None and form in self._wrapped:
            return self._wrapped[form]
        torch.manual_seed(7)
        config = MendConfig(num_virtual_tokens=4, prefix_form=form)
        model = get_mend_model(copy.deepcopy(self.base) if base is None else base, config, self.tokenizer).eval()
        with torch.no_grad():
            for parameter in dict(model.distiller.trained_tensors()).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return self._wrapped.setdefault(form, model) if base is None else model

    @cached_property
    def query(self) -> Tensor:
        """The ids (1, T) of a query."""
        return self.wrap("embeds").tokenize(QUERIES[0])["input_ids"]

    def embed(self, vectors: Tensor) -> Tensor:
        """Return vectors (1, V, E) with the query's embeddings behind them."""
        return torch.cat([vectors, self.base.get_input_embeddings()(self.query)], dim=1)

    @property
    def text(self) -> Tensor:
        """The ids (1, N + T) of the demonstrations' text with the query behind it."""
        return self.text_ids(QUERIES[0], SHOTS)

    def text_ids(self, query: str, shots: Sequence[tuple[str, str]]) -> Tensor:
        """Return the ids (1, N + T) of a task's text with a query behind it."""
        model = self.wrap("embeds")
        [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in shots]).chunks
        return torch.cat([torch.tensor([chunk.input_ids]), model.tokenize(query)["input_ids"]], dim=1)


def greedy(**settings: object) -> dict:
    """Return settings under which `generate` picks the likeliest token."""
    return {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids (B, N) and their mask made of rows (1, n)."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    lengths = torch.tensor([row.shape[1] for row in rows])
    return ids, (torch.arange(longest) >= longest - lengths[:, None]).long()


def compare(got: Tensor, expected: Tensor, *, times: float = 1.0) -> Measured:
    """Compare numbers; `times` widens the tolerance."""
    difference = (got - expected).detach().abs()
    allowed = times * (ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * expected.detach().abs())
    return Measured(difference.max().item(), bool((difference <= allowed).all()))


def compare_tokens(got: Tensor, expected: Tensor) -> Measured:
    """Compare generated ids, of which one may go on longer with padding."""
    got, expected = got.tolist(), expected.tolist()
    different = sum(
        sum(a != b for a, b in zip(row, other, strict=False)) + abs(len(row) - len(other))
        for row, other in zip(got, expected, strict=True)
    )
    return Measured(0.0, different == 0, different)


def worst(measured: list[Measured]) -> Measured:
    """Return the largest of several differences."""
    return Measured(
        max(one.difference for one in measured),
        all(one.is_exact for one in measured),
        max(one.num_tokens for one in measured),
        max(one.own_difference for one in measured),
    )


@torch.no_grad()
def vectors_equal_prepended_embeddings(family: Family) -> Measured:
    """Logits behind distilled vectors are those of the bare model with the vectors in front of the query."""
    model = family.wrap("embeds")
    distilled = model.distill(SHOTS)
    got = model(input_ids=family.query, demonstrations=distilled).logits
    return compare(got, family.base(inputs_embeds=family.embed(distilled.vectors)).logits[:, -got.shape[1] :])


def gradients_equal_prepended_embeddings(family: Family) -> Measured:
    """Gradients of the vectors, too."""
    model, gradients = family.wrap("embeds"), []
    distilled = model.distill(SHOTS).vectors
    for is_prefix in (True, False):
        vectors = distilled.clone().requires_grad_(True)
        if is_prefix:
            prefix = EmbeddingPrefix(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))
            logits = model(input_ids=family.query, demonstrations=prefix).logits
        else:
            logits = family.base(inputs_embeds=family.embed(vectors)).logits[:, -family.query.shape[1] :]
        logits.log_softmax(-1)[..., 3].mean().backward()
        gradients.append(vectors.grad)
    family.base.zero_grad()
    return compare(*gradients)


@torch.no_grad()
def cached_text_equals_the_text(family: Family) -> Measured:
    """Logits behind the text of the demonstrations, kept as a prefix, are those of the whole text."""
    model = family.wrap("embeds")
    got = model(input_ids=family.query, demonstrations=model.read(SHOTS)).logits
    return compare(got, family.base(family.text).logits[:, -got.shape[1] :])


def _generate_both_ways(family: Family, **settings: object) -> Measured:
    """Compare tokens behind distilled vectors with those of the bare model, and behind a text with the whole text."""
    model, start = family.wrap("embeds"), family.query.shape[1]
    distilled, text, tokens = model.distill(SHOTS), family.text, []
    for ask in (
        lambda: model.generate(family.query, demonstrations=model.read(SHOTS), **settings)[:, start:],
        lambda: family.base.generate(text, attention_mask=torch.ones_like(text), **settings)[:, text.shape[1] :],
        lambda: model.generate(family.query, demonstrations=distilled, **settings)[:, start:],
        lambda: family.base.generate(
            inputs_embeds=family.embed(distilled.vectors),
            attention_mask=torch.ones(1, start + distilled.num_slots, dtype=torch.long),
            **settings,
        ),
    ):
        torch.manual_seed(3)
        tokens.append(ask())
    return worst([compare_tokens(*tokens[:2]), compare_tokens(*tokens[2:])])


def greedy_tokens(family: Family) -> Measured:
    """Greedy tokens are those of the bare model that reads the same in front of the query."""
    return _generate_both_ways(family, **greedy())


def beam_tokens(family: Family) -> Measured:
    """Beams too."""
    return _generate_both_ways(family, **greedy(num_beams=3))


def sampled_tokens(family: Family) -> Measured:
    """Samples too, with the same seed."""
    return _generate_both_ways(family, **greedy(do_sample=True, num_return_sequences=3))


def _other_way_of_generating(family: Family, **settings: object) -> Measured:
    model, differences = family.wrap("embeds"), []
    for demonstrations in (model.read(SHOTS), model.distill(SHOTS)):
        plain = model.generate(family.query, demonstrations=demonstrations, **greedy())
        got = model.generate(family.query, demonstrations=demonstrations, **greedy(**settings))
        differences.append(compare_tokens(got, plain))
    return worst(differences)


def prompt_lookup_tokens(family: Family) -> Measured:
    """Prompt lookup gives the greedy tokens."""
    return _other_way_of_generating(family, prompt_lookup_num_tokens=3)


def static_cache_tokens(family: Family) -> Measured:
    """A static cache gives the greedy tokens."""
    return _other_way_of_generating(family, cache_implementation="static")


@torch.no_grad()
def _batch_logits(family: Family, form: str) -> Measured:
    model, differences, own_differences = family.wrap(form), [], [0.0]
    together = model(**model.tokenize(QUERIES), demonstrations=model.distill(list(TASKS))).logits
    for row, (query, task) in enumerate(zip(QUERIES, TASKS, strict=True)):
        alone = model(**model.tokenize(query), demonstrations=model.distill(task)).logits[0]
        differences.append(compare(together[row, -len(alone) :], alone))
    result = worst(differences)
    if not result.is_exact:
        texts = [family.text_ids(query, task) for query, task in zip(QUERIES, TASKS, strict=True)]
        ids, mask = pad_left(texts)
        positions = {"position_ids": positions_of(mask)} if accepts(family.base, "position_ids") else {}
        plain = family.base(ids, attention_mask=mask, **positions).logits
        for row, text in enumerate(texts):
            alone = family.base(text).logits[0]
            own_differences.append((plain[row, -len(alone) :] - alone).abs().max().item())
    return replace(result, own_difference=max(own_differences))


def _batch_tokens(family: Family, form: str) -> Measured:
    model, differences = family.wrap(form), []
    batch, distilled = model.tokenize(QUERIES), model.distill(list(TASKS))
    start = batch["input_ids"].shape[1]
    together = model.generate(**batch, demonstrations=distilled, **greedy())
    for row, query in enumerate(QUERIES):
        own = model.tokenize(query)
        alone = model.generate(**own, demonstrations=distilled[row], **greedy())[:, own["input_ids"].shape[1] :]
        differences.append(compare_tokens(together[row : row + 1, start : start + alone.shape[1]], alone))
    return worst(differences)


def kv_batch_equals_rows_alone(family: Family) -> Measured:
    """Rows with other tasks, prefix lengths and padding give what each gives alone, kv form: logits and tokens."""
    return worst([_batch_logits(family, "kv"), _batch_tokens(family, "kv")])


def embeds_batch_equals_rows_alone(family: Family) -> Measured:
    """The same in the embeds form."""
    return worst([_batch_logits(family, "embeds"), _batch_tokens(family, "embeds")])


@torch.no_grad()
def bare_model_bit_for_bit(family: Family) -> Measured:
    """Without demonstrations, and switched off, it is the base model.

    Its weights are frozen for both: torch has other kernels for products with weights that take gradients, and on
    some CPUs these round otherwise.
    """
    model = family.wrap("embeds")
    expected = copy.deepcopy(family.base).requires_grad_(False)(family.query).logits
    with model.use_demonstrations(SHOTS), model.disable_adapter():
        switched_off = model(family.query).logits
    differences = [(got - expected).abs().max().item() for got in (model(family.query).logits, switched_off)]
    return Measured(max(differences), max(differences) == 0)


@torch.no_grad()
def _save_and_load(family: Family, form: str) -> Measured:
    model = family.wrap(form)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = MendModel.from_pretrained(family.build(), folder, family.tokenizer)
    distilled = model.distill(SHOTS)
    with tempfile.TemporaryDirectory() as folder:
        distilled.save_pretrained(folder)
        reloaded = DistilledDemonstrations.from_pretrained(folder)
    expected = model(family.query, demonstrations=distilled).logits
    answers = [loaded(family.query, demonstrations=SHOTS), model(family.query, demonstrations=reloaded)]
    difference = max((answer.logits - expected).abs().max().item() for answer in answers)
    return Measured(difference, difference == 0)


def kv_saved_and_loaded(family: Family) -> Measured:
    """Distiller and artefact give the same logits after saving and loading, bit for bit, kv form."""
    return _save_and_load(family, "kv")


def embeds_saved_and_loaded(family: Family) -> Measured:
    """The same in the embeds form."""
    return _save_and_load(family, "embeds")


@torch.no_grad()
def bf16_error_within_the_base_models_own(family: Family) -> Measured:
    """In bf16, the way of the prefix errs no more than the base model reading the same in one piece.

    Returns:
        The mean error over the base model's own mean error, both against fp32.
    """
    model = family.wrap("embeds")
    half = copy.deepcopy(family.base).to(torch.bfloat16)
    vectors, num_tokens = model.distill(SHOTS).vectors.to(torch.bfloat16), family.query.shape[1]
    exact = family.base(inputs_embeds=family.embed(vectors.float())).logits[:, -num_tokens:]
    inputs = torch.cat([vectors, half.get_input_embeddings()(family.query)], dim=1)
    whole = half(inputs_embeds=inputs).logits[:, -num_tokens:].float()
    prefix = EmbeddingPrefix(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))
    got = family.wrap("embeds", half)(family.query, demonstrations=prefix).logits.float()
    ratio = ((got - exact).abs().mean() / (whole - exact).abs().mean()).item()
    return Measured(ratio, ratio <= MAX_BF16_RATIO)


# Columns of the table, in order.
FEATURES: dict[str, Callable[[Family], Measured]] = {
    "embeds: logits": vectors_equal_prepended_embeddings,
    "embeds: gradients": gradients_equal_prepended_embeddings,
    "text kept: logits": cached_text_equals_the_text,
    "greedy": greedy_tokens,
    "beams": beam_tokens,
    "sampling": sampled_tokens,
    "prompt lookup": prompt_lookup_tokens,
    "static cache": static_cache_tokens,
    "kv: batch = rows": kv_batch_equals_rows_alone,
    "embeds: batch = rows": embeds_batch_equals_rows_alone,
    "bare model": bare_model_bit_for_bit,
    "kv: save, load": kv_saved_and_loaded,
    "embeds: save, load": embeds_saved_and_loaded,
    "bf16": bf16_error_within_the_base_models_own,
}
