"""The space: counted exactly, within the budget by construction, and the same adapter whichever way it is written."""

from __future__ import annotations

import math
import pickle
import random
from dataclasses import replace
from itertools import combinations, permutations, product

import pytest
import torch

pytest.importorskip("optuna")
pytest.importorskip("scipy")

import optuna
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from bioadapt import list_primitives, primitive_info, register_primitive
from bioadapt.search.space import (
    Configuration,
    SearchedModel,
    SearchedModule,
    SearchSpace,
    Slot,
    add_adapters,
    learning_rates,
    load_adapters,
    save_adapters,
)
from bioadapt.search.space.places import HOME
from bioadapt.search.thompson import ThompsonSampler

POINTWISE, CAUSAL, WEIGHT = "lateral_inhibition", "leaky_integrator", "synaptic_tagging"


def bert(layers=2, hidden=16):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config).eval()


HOMES = {
    "logogen": SearchedModule("lm_head", 0, "lm_head", 16, 40),
    "sequence_memory": SearchedModule("embed_tokens", 0, "embed_tokens", 16, 16),
}


def host(layers=2, kinds=("attention.output.dense", "output.dense"), primitives=(POINTWISE, CAUSAL, WEIGHT), homes=()):
    sites = [SearchedModule(f"layer.{i}.{kind}", i, kind, 16, 16) for i in range(layers) for kind in kinds]
    return SearchedModel(tuple(sites), 10_000, tuple(primitives), homes=dict(homes))


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_params(space, generator):
    return {name: generator.choice(distribution.choices) for name, distribution in space.distributions.items()}


# -- the host --


def test_the_host_is_found_out_and_left_alone():
    model = bert()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    found = SearchedModel.of(model, [POINTWISE, CAUSAL, WEIGHT])
    assert [site.path for site in found.sites] == [
        f"encoder.layer.{i}.{kind}" for i in range(2) for kind in ("attention.output.dense", "output.dense")
    ]
    assert found.sites[1] == SearchedModule("encoder.layer.0.output.dense", 0, "output.dense", 32, 16)
    assert found.primitives == (POINTWISE, CAUSAL, WEIGHT) and not found.refused
    assert found.parameters == sum(p.numel() for p in model.parameters())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name].requires_grad == grad and torch.equal(after[name], p) for name, (grad, p) in before.items())
    assert SearchedModel.from_record(found.record()) == found


def test_what_a_causal_model_refuses_is_no_choice_and_is_named(monkeypatch):
    from bioadapt import registry
    from bioadapt.primitives.base import Primitive

    monkeypatch.setattr(registry, "_infos", dict(registry._infos))
    list_primitives()

    @register_primitive("looks_ahead", stage="memory", kind="global", zero_at="gate")
    class LooksAhead(Primitive):
        """Reads the next token.

        Biology: none.

        Equation: y = x'.

        Reference: none.
        """

        def transform(self, x, context):
            return x.roll(-1, dims=1)

    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    found = SearchedModel.of(gpt2, ["looks_ahead", POINTWISE])
    assert found.primitives == (POINTWISE,)
    assert "must not see" in found.refused["looks_ahead"]
    assert SearchedModel.of(bert(), ["looks_ahead"]).primitives == ("looks_ahead",)
    with pytest.raises(ValueError, match="none can act on this model: .*must not see"):
        SearchedModel.of(gpt2, ["looks_ahead"])


def test_what_has_a_home_is_offered_there_alone():
    model = language_model()
    found = SearchedModel.of(model, [POINTWISE, "logogen", "sequence_memory"])
    assert found.primitives == (POINTWISE, "logogen", "sequence_memory") and not found.refused
    assert {name: (home.path, home.d_in, home.d_out) for name, home in found.homes.items()} == {
        "logogen": ("lm_head", 16, 40), "sequence_memory": ("model.embed_tokens", 16, 16),
    }  # fmt: skip
    assert all("layers" in site.path for site in found.sites)
    assert SearchedModel.from_record(found.record()) == found
    lora = get_peft_model(language_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert SearchedModel.of(lora, ["logogen"]).homes == {"logogen": found.homes["logogen"]}
    # A model without a head is no home for it: it can be anywhere.
    assert SearchedModel.of(model.model, ["logogen"]).homes == SearchedModel.of(bert(), ["logogen"]).homes == {}


def test_a_search_of_before_homes_goes_on():
    record = host().record()
    del record["homes"]
    assert SearchedModel.from_record(record) == host()


def test_an_unknown_primitive_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'lateral_inhibition'"):
        SearchedModel.of(bert(), ["lateral_inhibitio"])


# -- its size --


def adapters(space):
    """Every distinct adapter, by brute force: what each module does, as far as order and settings mean something."""
    found = set()
    kind = {name: primitive_info(name).kind for name in space.primitives}
    everywhere = [(place, set(sites)) for place, sites in space.places.items()]
    homes = {name: home.kind for name, home in space.host.homes.items()}
    options = {
        name: [
            (sites, strength)
            for (layers, modules), sites in everywhere
            if (modules == homes.get(name) if layers == HOME else name not in homes)
            for strength in space.strengths
        ]
        for name in space.primitives
    }
    for count in range(space.slots + 1):
        for names in permutations(space.primitives, count):
            for chosen in product(*(options[name] for name in names)):
                slots = [(name, *place) for name, place in zip(names, chosen, strict=True)]
                free = [slot for slot in slots if kind[slot[0]] != "weight" and slot[0] not in homes]
                shared = any(a[1] & b[1] for a, b in combinations(free, 2))
                what = frozenset((name, frozenset(sites), s) for name, sites, s in slots)
                for composition, rank, rate in product(space.compositions, space.ranks, space.learning_rates):
                    order = frozenset(
                        (a[0], b[0]) for a, b in combinations(free, 2) if composition == "serial" and a[1] & b[1]
                    )
                    found.add(
                        (what, order, composition if shared else None, rank if free else None, rate if slots else None)
                    )
    return found


@pytest.mark.parametrize(
    ("layers", "kinds", "settings"),
    [
        (2, ("a", "b"), {"slots": 2, "ranks": ("full", 4), "strengths": (1, 3), "learning_rates": (0.1, 0.2)}),
        (3, ("a",), {"slots": 3, "ranks": (4,), "strengths": (1,), "learning_rates": (0.1,)}),
        (1, ("a", "b"), {"slots": 3, "ranks": ("full",), "strengths": (1,), "compositions": ("serial", "parallel")}),
        (2, ("a",), {"slots": 3, "ranks": ("full", 2), "strengths": (1, 3), "compositions": ("staged",)}),
    ],
)
def test_the_size_is_the_number_of_distinct_adapters(layers, kinds, settings):
    space = SearchSpace(host(layers, kinds), **settings)
    assert space.size() == len(adapters(space))
    at_home = SearchSpace(host(layers, kinds, (POINTWISE, CAUSAL, "logogen", "sequence_memory"), HOMES), **settings)
    assert at_home.size() == len(adapters(at_home)) > space.size() / 2


def test_the_whole_registry_on_six_layers_is_at_least_1e22():
    space = SearchSpace(host(6, primitives=list_primitives()))
    assert len(space.places) == 27
    assert space.size() >= 10**22
    assert str(space.size()) == space.record()["size"]


def test_distinct_features_are_distinct_adapters_and_the_other_way_round():
    space = SearchSpace(host(1, ("a", "b")), slots=2, ranks=("full", 4), strengths=(1, 3), learning_rates=(0.1,))
    everything = [dict(zip(space.distributions, values, strict=True)) for values in product(
        *(distribution.choices for distribution in space.distributions.values())
    )]  # fmt: skip
    realised = {space.realise(params) for params in everything}
    keys = {frozenset(space.features(params).items()) for params in everything}
    assert len(realised) == len(keys) == space.size()


# -- from parameters to a configuration --


def test_every_configuration_is_within_the_budget_and_slots_are_dropped_from_the_last():
    space = SearchSpace(host(3), budget=900)
    generator = random.Random(0)
    counts = []
    for _ in range(300):
        params = random_params(space, generator)
        configuration = space.realise(params)
        counts.append(len(configuration.slots))
        assert space.parameters(configuration) <= 900
        wanted = [params[f"slot{i}.primitive"] for i in range(1, 7) if params[f"slot{i}.primitive"] != "none"]
        kept = {slot.primitive for slot in configuration.slots}
        assert kept == set(list(dict.fromkeys(wanted))[: len(kept)])
    assert min(counts) == 0 and max(counts) >= 2


def test_what_never_fits_the_budget_is_left_out_and_named():
    space = SearchSpace(host(), budget=150, ranks=("full",))
    assert space.too_large == (CAUSAL,)
    assert set(space.primitives) | set(space.too_large) == {POINTWISE, CAUSAL, WEIGHT}
    for name in space.primitives:
        assert [slot.primitive for slot in space.realise(space.alone(name)).slots] == [name]
    with pytest.raises(ValueError, match="budget of 3 parameters: no primitive is so small"):
        SearchSpace(host(), budget=3)


def test_a_primitive_twice_counts_once_and_an_empty_slot_not_at_all():
    space = SearchSpace(host())
    params = {name: distribution.choices[0] for name, distribution in space.distributions.items()}
    assert space.realise(params).slots == ()
    assert space.realise({}) == space.realise(params)
    params["slot2.primitive"] = params["slot4.primitive"] = CAUSAL
    params["slot4.layers"] = "1"
    assert space.realise(params).slots == (Slot(CAUSAL, "all", "all", 0.3),)


def test_order_is_kept_where_it_means_something():
    space = SearchSpace(host())
    params = {name: distribution.choices[0] for name, distribution in space.distributions.items()}
    params |= {"slot1.primitive": CAUSAL, "slot2.primitive": POINTWISE, "slot3.primitive": WEIGHT}
    swapped = params | {"slot1.primitive": POINTWISE, "slot2.primitive": CAUSAL}

    def order(chosen):
        return [slot.primitive for slot in space.realise(chosen).slots if slot.primitive != WEIGHT]

    assert (order(params), order(swapped)) == ([CAUSAL, POINTWISE], [POINTWISE, CAUSAL])
    apart = {"slot1.layers": "0", "slot2.layers": "1"}
    assert space.realise(params | apart) == space.realise(swapped | {"slot1.layers": "1", "slot2.layers": "0"})
    staged = {"composition": "staged"}
    assert space.realise(params | staged) == space.realise(swapped | staged)
    before = ("lateral_inhibition before leaky_integrator",)
    assert space.features(params)[before] == -space.features(swapped)[before] < 0
    assert before not in space.features(params | staged)


def test_a_rank_beyond_a_modules_width_is_no_choice():
    assert SearchSpace(host()).ranks == ("full", 4, 8, 16)
    with pytest.raises(ValueError, match=r"ranks=\[32\]: a module of this model has 16 features"):
        SearchSpace(host(), ranks=(32,))


def test_a_trial_is_asked_for_nothing_about_an_empty_slot():
    space = SearchSpace(host(), slots=2)
    trial = optuna.trial.FixedTrial(
        {"composition": "serial", "learning_rate": 0.001, "rank": 4, "slot1.primitive": "none",
         "slot2.primitive": CAUSAL, "slot2.layers": "all", "slot2.modules": "all", "slot2.strength": 3.0}
    )  # fmt: skip
    params = space.suggest(trial)
    assert set(params) == set(trial.params)
    assert space.realise(params) == Configuration((Slot(CAUSAL, "all", "all", 3.0),), 4, "serial", 0.001)


def test_the_space_and_its_configurations_survive_json_and_pickle():
    space = SearchSpace(host(), budget=2_000, slots=3)
    again = SearchSpace.from_record(space.record())
    assert again.record() == space.record()
    params = random_params(space, random.Random(3))
    assert again.features(params) == pickle.loads(pickle.dumps(space)).features(params) == space.features(params)
    configuration = space.realise(params)
    assert Configuration.from_record(configuration.record()) == configuration


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slots": 0}, "slots=0: an integer of at least 1"),
        ({"ranks": ()}, "ranks=.*at least one choice"),
        ({"ranks": ("ful",)}, "ranks: 'ful' is not accepted"),
        ({"strengths": (0,)}, "strengths: 0 is not accepted"),
        ({"strengths": (1, 1)}, "strengths=.*each once"),
        ({"learning_rates": (math.nan,)}, "learning_rates: nan is not accepted"),
        ({"compositions": ("stagd",)}, "did you mean 'staged'"),
    ],
)
def test_wrong_choices_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SearchSpace(host(), **settings)


# -- the adapter --


def test_the_adapter_is_what_the_configuration_says_and_costs_what_the_space_says():
    model = bert()
    space = SearchSpace(SearchedModel.of(model, [POINTWISE, CAUSAL, WEIGHT, "predictive_coding"]))
    generator = random.Random(1)
    for _ in range(12):
        configuration = space.realise(random_params(space, generator))
        if not configuration.slots:
            continue
        configs = space.configs(configuration)
        adapted = add_adapters(bert(), configs)
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == space.parameters(configuration)
        for slot in configuration.slots:
            sites = {space.host.sites[i].path for i in space.places[slot.layers, slot.modules]}
            named = {
                name.partition("base_model.model.")[2].partition(".nrn_")[0]
                for name, _ in adapted.named_parameters()
                if slot.primitive in name.split(".")
            }
            assert named == sites
        for config in configs:
            if any(primitive_info(entry["name"]).kind == "weight" for entry in config.primitives):
                assert config.rank is None


def test_at_home_it_is_wherever_its_slot_is_and_no_rank_holds_for_it():
    space = SearchSpace(SearchedModel.of(language_model(), ["logogen", POINTWISE, "sequence_memory"]), slots=3)
    assert HOME not in space.layers and len(space.places) == 2 + len(space.layers) * len(space.modules)
    params = {name: distribution.choices[0] for name, distribution in space.distributions.items()}
    params |= {"rank": 4, "slot1.primitive": "logogen", "slot2.primitive": POINTWISE, "slot2.layers": "upper"}
    params |= {"slot3.primitive": "sequence_memory", "slot3.strength": 3.0}
    configuration = space.realise(params)
    assert configuration.slots == (
        Slot(POINTWISE, "upper", "all", 0.3),
        Slot("logogen", HOME, "lm_head", 0.3),
        Slot("sequence_memory", HOME, "embed_tokens", 3.0),
    )
    assert space.realise(params | {"slot1.layers": "0", "slot1.modules": space.modules[-1]}) == configuration
    assert space.features(params).keys() & {"logogen", "logogen @ home lm_head"} == {"logogen"}
    alone = space.realise(space.alone("logogen") | {"rank": 8})
    assert (alone.slots, alone.rank, space.parameters(alone)) == ((Slot("logogen", HOME, "lm_head", 1.0),), None, 1)

    configs = space.configs(configuration)
    adapted = add_adapters(language_model(), configs)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == space.parameters(configuration)
    assert {tuple(entry["name"] for entry in config.primitives): config.rank for config in configs} == {
        ("logogen",): None, (POINTWISE,): 4, ("sequence_memory",): None,
    }  # fmt: skip


def both(space):
    slots = (
        Slot(CAUSAL, "lower", "all", 3.0),
        Slot(POINTWISE, "all", "output.dense", 0.3),
        Slot(WEIGHT, "upper", "all", 3.0),
    )
    return Configuration(slots, 4, "serial", 0.01)


def test_adapters_over_a_lora_are_saved_and_loaded(tmp_path):
    space = SearchSpace(SearchedModel.of(bert()))
    configs = space.configs(both(space))
    assert len(configs) > 1
    get_peft_model(bert(), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")

    def below():
        return PeftModel.from_pretrained(bert(), str(tmp_path / "lora"))

    for config in configs:
        config.init_weights = False
    adapted = add_adapters(below(), configs).eval()
    tokens = torch.arange(12).view(2, 6)
    expected = adapted(tokens).last_hidden_state
    assert not torch.equal(expected, below()(tokens).last_hidden_state)
    save_adapters(adapted, tmp_path / "bio")
    loaded = load_adapters(below(), tmp_path / "bio")
    assert torch.equal(loaded(tokens).last_hidden_state, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="no adapter 'bio'"):
        load_adapters(below(), tmp_path / "lora")


def test_a_strength_is_a_factor_on_what_is_zero_at_birth():
    space = SearchSpace(SearchedModel.of(bert(), [POINTWISE, CAUSAL, WEIGHT]))
    scales = {}
    for rank in (4, None):
        for config in space.configs(replace(both(space), rank=rank)):
            scales |= {(entry["name"], rank): entry["zero_scale"] for entry in config.primitives}
    usual = {name: primitive_info(name).fresh_zero_scale for name in (POINTWISE, CAUSAL, WEIGHT)}
    # Under a rank the up-projection is the zero, and what the primitives share with it is 1.
    assert scales == {
        (CAUSAL, 4): 3.0, (CAUSAL, None): 3.0 * usual[CAUSAL],
        (POINTWISE, 4): 0.3, (POINTWISE, None): pytest.approx(0.3 * usual[POINTWISE]),
        (WEIGHT, 4): 3.0 * usual[WEIGHT], (WEIGHT, None): 3.0 * usual[WEIGHT],
    }  # fmt: skip


def test_a_strength_is_how_fast_it_learns():
    space = SearchSpace(SearchedModel.of(bert(), [POINTWISE]))
    tokens, moved = torch.arange(12).view(2, 6), {}
    for strength in (1.0, 3.0):
        slots = (Slot(POINTWISE, "all", "output.dense", strength),)
        torch.manual_seed(0)
        model = add_adapters(bert().eval(), space.configs(Configuration(slots, None, "serial", 1e-4)))
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        before = model(tokens).last_hidden_state
        (before * torch.linspace(-1, 1, before.shape[-1])).sum().backward()
        optimiser.step()
        moved[strength] = (model(tokens).last_hidden_state - before).norm().item()
    assert moved[3.0] / moved[1.0] == pytest.approx(3.0, rel=0.05)


def test_the_rates_that_strengths_were_are_none():
    with pytest.warns(DeprecationWarning, match="zero_scale"):
        assert learning_rates(bert(), both(None).slots, 0.01) == {}


def test_the_rate_of_a_gate_times_s_is_the_gate_times_s():
    """With Adam: h + s gate f at rate r moves as h + gate f at rate s r, whatever s is."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randn(32, 4)

    def trained(scale, factor):
        inner, gate = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.zeros(4))
        with torch.no_grad():
            inner.weight.copy_(torch.eye(4))
            inner.bias.zero_()
        groups = [{"params": inner.parameters(), "lr": 0.01}, {"params": [gate], "lr": 0.01 * factor}]
        optimizer = torch.optim.Adam(groups, eps=1e-16)
        for _ in range(30):
            optimizer.zero_grad()
            ((x + scale * gate * inner(x).tanh() - y) ** 2).mean().backward()
            optimizer.step()
        return (x + scale * gate * inner(x).tanh()).detach()

    assert torch.allclose(trained(3.0, 1.0), trained(1.0, 3.0), atol=1e-5)
    assert not torch.allclose(trained(1.0, 1.0), trained(1.0, 3.0), atol=1e-2)


def test_a_search_finds_what_has_a_home():
    space = SearchSpace(SearchedModel.of(language_model(), ["logogen", POINTWISE, CAUSAL, "sequence_memory"]), slots=3)
    worth = {"logogen": 2.0, "sequence_memory": 1.0, POINTWISE: -0.5, CAUSAL: -0.5}

    def score(trial):
        return sum(worth[slot.primitive] for slot in space.realise(space.suggest(trial)).slots)

    study = optuna.create_study(direction="maximize", sampler=ThompsonSampler(seed=0, features=space.features))
    # As a search begins: all other slots are empty, so that the sampler first proposes primitives without a strength.
    for name, rate in product(space.primitives, space.learning_rates[:3]):
        study.enqueue_trial(space.alone(name, rate))
    study.optimize(score, n_trials=40)
    assert {slot.primitive for slot in space.realise(study.best_params).slots} == {"logogen", "sequence_memory"}
