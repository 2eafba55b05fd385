"""One record per primitive, complete, searchable, and open to third parties."""

import dataclasses
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

import bioadapt
from bioadapt import build_primitive, list_primitives, primitive_info, register_primitive, registry
from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.names import KINDS, STAGES
from bioadapt.primitives.primitive import MERGES, ZEROS


@pytest.fixture
def scratch(monkeypatch):
    """A registry that forgets what a test adds."""
    list_primitives()
    monkeypatch.setattr(registry, "_infos", dict(registry._infos))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


class Doubling(Primitive):
    """Adds the features once more.

    Biology: none, it serves the tests.

    Equation: delta = factor x.

    Reference: this file.
    """

    factor: float = setting(1.0, low=0.0, high=2.0, meaning="how much is added")
    mode: str = setting("all", choices=("all", "some"), meaning="of which units")
    loud: bool = setting(False, meaning="nothing")
    count: int = setting(3, low=1, high=9, meaning="nothing")

    def transform(self, x, context):
        return self.factor * x


DECLARED = dict(stage="memory", kind="pointwise", zero_at="gate")


def test_the_whole_catalogue_is_there():
    catalogue = {
        "acetylcholine_balance", "antihebbian_decorrelation", "apical_basal", "astrocyte_gain",
        "attention_gain", "basal_ganglia_gate", "bcm_threshold", "bump_attractor", "ca1_comparator",
        "cerebellar_granule", "complementary_fast_weights", "contrast_adaptation", "cortical_column",
        "dale_small_world", "dentate_separation", "divisive_normalization", "dopamine_rpe", "efference_copy",
        "excitation_inhibition_balance", "fly_lora", "gain_field", "gap_junction", "grid_cell_code",
        "hebbian_trace", "heterosynaptic_scaling", "homeostatic_scaling", "hopfield_completion",
        "intrinsic_plasticity", "k_winners_take_all", "kv_lif", "lateral_inhibition", "leaky_integrate_fire",
        "leaky_integrator", "liquid_reservoir", "logogen", "metaplasticity", "neuro_ada", "neuro_lora",
        "nmda_branches", "noradrenaline_reset", "oja_subspace", "on_off_rectification", "oscillatory_gating",
        "phase_coding", "place_fields", "population_code", "precision_weighted_error", "predictive_coding",
        "quadratic_dendrite", "resonate_and_fire", "san_scaling", "sequence_memory", "serotonin_horizon",
        "short_term_depression", "short_term_facilitation", "shunting_inhibition", "sparse_coding",
        "spike_frequency_adaptation",
        "stdp_trace", "surround_suppression", "synaptic_consolidation", "synaptic_pruning", "synaptic_tagging",
        "thalamic_relay", "travelling_wave", "trn_searchlight", "vesicle_release", "vip_disinhibition",
    }  # fmt: skip
    assert len(catalogue) == 68
    assert catalogue == {
        name for name in list_primitives() if primitive_info(name).factory.__module__.startswith("bioadapt.")
    }


@pytest.mark.parametrize("name", list_primitives())
def test_records_are_complete_and_frozen(name):
    info = primitive_info(name)
    assert info.name == name and info.stage in STAGES and info.kind in KINDS and info.zero_at in ZEROS
    assert info.merge is None or info.merge in MERGES
    assert info.mergeable is (info.merge is not None)
    assert info.stateful is (info.kind == "causal" or info.learns)
    for text in (info.summary, info.biology, info.equation, info.reference):
        assert len(text) > 15 and text.strip() == text
    assert any(character.isdigit() for character in info.reference), "a reference has a year"
    for key, spec in info.settings.items():
        assert spec.check(key, spec.default) == spec.default and spec.meaning and spec.accepted
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"
    assert info.parameter_count(64, 48) == sum(p.numel() for p in build_primitive(name, 64, 48).parameters())


def test_a_setting_cannot_hide_what_the_base_class_needs(scratch):
    """It would take the place of a method of every module, and nothing would say so."""
    hiding = type(
        "Hiding", (Doubling,), {"modules": setting(3, low=1, high=9, meaning="nothing"), "__doc__": Doubling.__doc__}
    )
    with pytest.raises(ValueError, match="'hiding': a setting cannot be called 'modules'"):
        register_primitive("hiding", **DECLARED)(hiding)


def test_lists_are_sorted_and_filtered():
    everything = list_primitives()
    assert everything == sorted(everything)
    assert sorted(name for stage in STAGES for name in list_primitives(stage=stage)) == everything
    assert sorted(name for kind in KINDS for name in list_primitives(kind=kind)) == everything
    both = set(list_primitives(stage="plasticity")) & set(list_primitives(kind="weight"))
    assert set(list_primitives(stage="plasticity", kind="weight")) == both > {"hebbian_trace", "san_scaling"}
    assert list_primitives("*lora") == ["fly_lora", "neuro_lora"] == list_primitives("*_lor?", kind="weight")
    assert list_primitives("lora") == []
    with pytest.raises(ValueError, match="unknown stage 'competiton'; did you mean 'competition'"):
        list_primitives(stage="competiton")
    with pytest.raises(ValueError, match="unknown kind 'causl'"):
        list_primitives(kind="causl")
    with pytest.raises(ValueError, match="no primitive is called 'memory', which is a stage: stage='memory'"):
        list_primitives("memory")


def test_aliases_lead_to_the_catalogues_name():
    assert primitive_info("dendritic_branches").name == "nmda_branches"
    assert "dendritic_branches" not in list_primitives()
    config = bioadapt.BioConfig(primitives=["precision_weighted_prediction_error"])
    assert config.primitives[0]["name"] == "precision_weighted_error"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown primitive 'lateral_inhibitoin'; did you mean 'lateral_inhibition'"):
        primitive_info("lateral_inhibitoin")
    with pytest.raises(ValueError, match="string"):
        primitive_info(3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factr": 1.0}, "unknown setting 'factr'; did you mean 'factor'"),
        ({"factor": 2.5}, "'factor' must be a number from 0.0 to 2.0, got 2.5"),
        ({"factor": float("nan")}, "got nan"),
        ({"factor": "big"}, "got 'big'"),
        ({"factor": True}, "got True"),
        ({"mode": "none"}, "'mode' must be one of 'all', 'some', got 'none'"),
        ({"loud": 1}, "'loud' must be True or False, got 1"),
        ({"count": 2.5}, "'count' must be an integer from 1 to 9, got 2.5"),
    ],
)
def test_wrong_settings_are_named(scratch, settings, words):
    register_primitive("doubling", **DECLARED)(Doubling)
    with pytest.raises(ValueError, match="doubling: ") as refusal:
        build_primitive("doubling", 4, 4, **settings)
    assert words in str(refusal.value)


@pytest.mark.parametrize("given", [{"factor": 2, "count": 4.0}, {"factor": np.float32(2), "count": np.int64(4)}])
def test_settings_are_cast_to_their_type(scratch, given):
    register_primitive("doubling", **DECLARED)(Doubling)
    module = build_primitive("doubling", 4, 4, loud=np.bool_(True), **given)
    assert (module.factor, module.count, module.loud) == (2.0, 4, True)
    assert [type(value) for value in (module.factor, module.count, module.loud)] == [float, int, bool]


def test_a_bare_primitive_runs_on_any_leading_shape(scratch):
    register_primitive("doubling", **DECLARED)(Doubling)
    module = build_primitive("doubling", 4, 4)
    module.gate.data.fill_(1.0)
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 5, 3, 4)):
        x = torch.randn(shape)
        assert torch.equal(module(x), x)


def test_the_layers_input_is_asked_for_where_it_cannot_be_guessed():
    module = build_primitive("nmda_branches", 6, 4)
    with pytest.raises(ValueError, match="reads the layer's input \\(6 features\\)"):
        module(torch.randn(2, 3, 4))
    assert module(torch.randn(2, 3, 4), Context(x_in=torch.randn(2, 3, 6))).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "memori"}, "stage='memori'; did you mean 'memory'"),
        ({"kind": "pointwize"}, "kind='pointwize'"),
        ({"zero_at": "nowhere"}, "zero_at='nowhere'"),
        ({"merge": "right"}, "merge='right'"),
    ],
)
def test_wrong_declarations_are_refused(scratch, changes, words):
    with pytest.raises(ValueError, match="doubling") as refusal:
        register_primitive("doubling", **{**DECLARED, **changes})(Doubling)
    assert words in str(refusal.value)
    assert "doubling" not in registry._infos


def test_a_name_must_be_an_identifier(scratch):
    with pytest.raises(ValueError, match="identifier"):
        register_primitive("Doubling!", **DECLARED)


def test_a_docstring_must_say_where_the_mechanism_comes_from(scratch):
    class Nameless(Doubling):
        """Only a summary."""

    with pytest.raises(ValueError, match="docstring of Nameless lacks biology, equation, reference"):
        register_primitive("nameless", **DECLARED)(Nameless)


def test_replacing_a_primitive_warns(scratch):
    class Other(Doubling):
        __doc__ = Doubling.__doc__

    register_primitive("doubling", **DECLARED)(Doubling)
    with pytest.warns(UserWarning, match="'doubling' is registered twice"):
        register_primitive("doubling", **DECLARED)(Other)
    assert primitive_info("doubling").factory is Other


def test_numeric_settings_need_a_range():
    with pytest.raises(TypeError, match="low and high"):
        setting(1.0, meaning="unbounded")


def test_packages_are_found_by_entry_point_and_a_broken_one_only_warns(scratch, monkeypatch, tmp_path):
    (tmp_path / "third_party.py").write_text(
        "from bioadapt import register_primitive\n"
        "from test_registry_parts import Doubling\n"
        "register_primitive('from_outside', stage='memory', kind='pointwise', zero_at='gate')(Doubling)\n"
    )
    (tmp_path / "test_registry_parts.py").write_text(
        "from bioadapt.primitives.base import Primitive\n"
        "class Doubling(Primitive):\n"
        f"    '''{Doubling.__doc__}'''\n"
        "    def transform(self, x, context):\n"
        "        return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [
        EntryPoint("good", "third_party", registry.ENTRY_POINT_GROUP),
        EntryPoint("broken", "no_such_module_anywhere", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._load.cache_clear()
    with pytest.warns(UserWarning, match="'broken' .* could not be loaded"):
        assert "from_outside" in list_primitives(stage="memory")


def test_frozen_randomness_depends_on_seed_and_purpose_alone():
    torch.manual_seed(0)
    first = Host(seed=1).normal("projection", 3, 4)
    torch.manual_seed(99)
    assert torch.equal(Host(seed=1).normal("projection", 3, 4), first)
    assert not torch.equal(Host(seed=2).normal("projection", 3, 4), first)
    assert not torch.equal(Host(seed=1).normal("other", 3, 4), first)


def test_host_estimates_the_level_of_its_output():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    output = torch.randn(2000, 256) @ weight.T
    assert Host(weight).level == pytest.approx(output.square().mean().sqrt().item(), rel=0.05)
    assert Host(lambda: weight).weight.dtype == torch.float32
    assert Host(None).level == 1.0
