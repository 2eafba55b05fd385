"""Trainable numbers, gate included, against the formulas that the catalogue gives."""

from __future__ import annotations

import pytest
import torch

from bioadapt import build_primitive, primitive_info

# n and d are the sizes of the layer's input and output; the last number is the count at n = d = 384.
FORMULAS = {
    "divisive_normalization": (lambda n, d: 2 * d + 1 + d, 1153),
    "lateral_inhibition": (lambda n, d: 2 * 4 * d + d, 3456),
    "k_winners_take_all": (lambda n, d: d, 384),
    "nmda_branches": (lambda n, d: n + 16 * d + 2 * 16 + 1, 6561),
    "vesicle_release": (lambda n, d: 2 * d + d, 1152),
    "neuro_ada": (lambda n, d: 8 * d, 3072),
    "short_term_depression": (lambda n, d: 2 * 32 + 1 + d, 449),
    "oscillatory_gating": (lambda n, d: 2 * d + 1 + d, 1153),
    "predictive_coding": (lambda n, d: 2 * 8 * d + 8 + d, 6536),
    "precision_weighted_error": (lambda n, d: 2 * 16 + 1 + 1 + d, 418),
    "dopamine_rpe": (lambda n, d: 2 * d + 3 + d, 1155),
    "hebbian_trace": (lambda n, d: 8 * (n + d) + 8 * 8 + 1, 6209),
    "homeostatic_scaling": (lambda n, d: d, 384),
    "logogen": (lambda n, d: 1, 1),
    "heterosynaptic_scaling": (lambda n, d: 8 * d + 1, 3073),
    "leaky_integrator": (lambda n, d: 2 * 8 * d + 8 + 1, 6153),
    "short_term_facilitation": (lambda n, d: 2 * 32 + 1 + d, 449),
    "spike_frequency_adaptation": (lambda n, d: d + 16 + d, 784),
    "travelling_wave": (lambda n, d: 2 * d + 2 * 8 * d + 2 + 1, 6915),
    "liquid_reservoir": (lambda n, d: 2 * 8 * d + 1, 6145),
    "phase_coding": (lambda n, d: 3 * 4 * d + 2 * 4 + 1, 4617),
    "resonate_and_fire": (lambda n, d: 2 * 8 * d + 3 * 8 + 1, 6169),
    "astrocyte_gain": (lambda n, d: 4 * 16 + 2 + d, 450),
    "cortical_column": (lambda n, d: 4 * 8**2 + 8 + 2 + d, 650),
    "bump_attractor": (lambda n, d: 6 * d + 16 * d + 2 + 2 + 2 + 1, 8455),
    "basal_ganglia_gate": (lambda n, d: 2 * 2 * d + 2 * 8 * d + 3 * 2 + 1, 7687),
    "hopfield_completion": (lambda n, d: 2 * 8 * d + 32 * 8 + 1 + 1, 6402),
    "dentate_separation": (lambda n, d: 2 * 8 * d + 128 * 8 + 128 + 1, 7297),
    "sequence_memory": (lambda n, d: 3 + 1, 4),
    "ca1_comparator": (lambda n, d: 8 * d + 3 + d, 3459),
    "grid_cell_code": (lambda n, d: 2 * d + 16 * d + 4 + 4 + 1, 6921),
    "place_fields": (lambda n, d: 3 * d + 16 * d + 48 + 16 + 1, 7361),
    "cerebellar_granule": (lambda n, d: 8 * 256 + 8 * d + 1 + 1, 5122),
    "complementary_fast_weights": (lambda n, d: 3 * 8 * d + 2 + 1, 9219),
    "on_off_rectification": (lambda n, d: 4 * d + d, 1920),
    "contrast_adaptation": (lambda n, d: 2 * 16 + 1 + d, 417),
    "surround_suppression": (lambda n, d: 2 * 4 + d, 392),
    "thalamic_relay": (lambda n, d: 5 * 16 + 1 + d, 465),
    "trn_searchlight": (lambda n, d: d + 8 + 3 + d, 779),
    "gain_field": (lambda n, d: 8 * (d + n) + 1, 6145),
    "attention_gain": (lambda n, d: 2 * 4 * d + d + 1 + d, 3841),
    "efference_copy": (lambda n, d: d, 384),
    "acetylcholine_balance": (lambda n, d: 16 + 3 + d, 403),
    "noradrenaline_reset": (lambda n, d: 2 * 8 * d + 8 + 3 + 1, 6156),
    "serotonin_horizon": (lambda n, d: 8 * d + d + 5 + 1, 3462),
    "oja_subspace": (lambda n, d: 8 + 1, 9),
    "bcm_threshold": (lambda n, d: d, 384),
    "stdp_trace": (lambda n, d: 2 * 6 * d + 2 + 1, 4611),
    "metaplasticity": (lambda n, d: 8 * (n + d) + 1, 6145),
    "synaptic_consolidation": (lambda n, d: d + 1, 385),
    "synaptic_tagging": (lambda n, d: 8 * d + 1, 3073),
    "shunting_inhibition": (lambda n, d: 4 * (n + d) + 2 * d + 1 + d, 4225),
    "quadratic_dendrite": (lambda n, d: 2 * 6 * n + 6 * d + 1, 6913),
    "apical_basal": (lambda n, d: 2 * 8 * d + 8 + 2 * d + 1 + 1, 6922),
    "leaky_integrate_fire": (lambda n, d: 2 * d + 2 + d, 1154),
    "kv_lif": (lambda n, d: 2 * d + 6 + d, 1158),
    "intrinsic_plasticity": (lambda n, d: d, 384),
    "synaptic_pruning": (lambda n, d: 2 * d + d, 1152),
    "excitation_inhibition_balance": (lambda n, d: max(1, min(8, d // 32)) + d, 392),
    "vip_disinhibition": (lambda n, d: 8 * (n + 1) + 3 * 8 + 1 + d, 3489),
    "sparse_coding": (lambda n, d: 2 * 8 * d + 8 + 1, 6153),
    "antihebbian_decorrelation": (lambda n, d: 2 * 8 * d + 1, 6145),
    "gap_junction": (lambda n, d: 2 * d + 1, 769),
    "dale_small_world": (lambda n, d: 4 * d + d, 1920),
    "population_code": (lambda n, d: 6 * d + 1, 2305),
}

# The sizes that shrink to a layer of 3 -> 5 features: the count that is left.
SMALL = {
    "nmda_branches": 3 + 3 * 5 + 2 * 3 + 1,
    "neuro_ada": 3 * 5,
    "short_term_depression": 2 * 5 + 1 + 5,
    "predictive_coding": 2 * 5 * 5 + 5 + 5,
    "precision_weighted_error": 2 * 5 + 1 + 1 + 5,
    "hebbian_trace": 3 * (3 + 5) + 3 * 3 + 1,
    "heterosynaptic_scaling": 3 * 5 + 1,
    "contrast_adaptation": 2 * 5 + 1 + 5,
    "thalamic_relay": 5 * 5 + 1 + 5,
    "trn_searchlight": 5 + 5 + 3 + 5,
    "gain_field": 3 * (3 + 5) + 1,
    "acetylcholine_balance": 5 + 3 + 5,
    "noradrenaline_reset": 2 * 5 * 5 + 5 + 3 + 1,
    "oja_subspace": 5 + 1,
    "stdp_trace": 2 * 5 * 5 + 2 + 1,
    "metaplasticity": 3 * (3 + 5) + 1,
    "synaptic_tagging": 3 * 5 + 1,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_count(name):
    formula, at_384 = FORMULAS[name]
    count = primitive_info(name).parameter_count
    assert count(384, 384) == at_384
    assert count(29, 37) == formula(29, 37)
    assert formula(384, 384) == at_384


@pytest.mark.parametrize("name", SMALL)
def test_count_on_a_layer_smaller_than_the_settings(name):
    assert primitive_info(name).parameter_count(3, 5) == SMALL[name]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("lateral_inhibition", {"rank": 2}, 2 * 2 * 37 + 37),
        ("nmda_branches", {"branches": 5}, 29 + 5 * 37 + 2 * 5 + 1),
        ("neuro_ada", {"k": 20, "selection": "random"}, 20 * 37),
        ("short_term_depression", {"groups": 4}, 2 * 4 + 1 + 37),
        ("predictive_coding", {"rank": 3, "auxiliary": 0.5}, 2 * 3 * 37 + 3 + 37),
        ("precision_weighted_error", {"groups": 1}, 2 + 1 + 1 + 37),
        ("hebbian_trace", {"rank": 2}, 2 * (29 + 37) + 4 + 1),
        ("heterosynaptic_scaling", {"rank": 1}, 37 + 1),
    ],
)
def test_count_follows_the_settings(name, settings, expected):
    assert primitive_info(name).parameter_count(29, 37, **settings) == expected


@pytest.mark.parametrize("name", FORMULAS)
def test_a_newborn_changes_nothing(name):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    assert torch.count_nonzero(build_primitive(name, 12, 12)(x)) == 0


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_layers_smaller_than_the_settings(name, width):
    torch.manual_seed(0)
    module = build_primitive(name, width, width)
    module.wake()
    x = torch.randn(2, 3, width, requires_grad=True)
    module(x).sum().backward()
    assert torch.isfinite(x.grad).all()
