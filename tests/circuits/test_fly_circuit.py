"""The fly's olfactory circuit against a plain reference, its invariants, and what inhibition and adaptation are for."""

import math

import numpy as np
import pytest
import torch

from bioadapt.circuits.fly_circuit import (
    ADAPTATION,
    FAN_IN,
    GAIN,
    LOCAL_NEURON,
    MEMBRANE,
    SYNAPSE,
    FlyCircuit,
    spikes,
)
from experiments.olfactory_noise import run
from experiments.olfactory_noise.trials import accuracy, class_means, delta_rule, noisy_trials, odours

SEEDS = range(4)


def drives(seed: int, trials: int = 3, steps: int = 40, receptors: int = 12) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return noisy_trials(odours(trials, receptors, source), steps, 0.5, source)


def reference(drive: np.ndarray, claws: np.ndarray, inhibition: float, adaptation: float):
    """One trial (T, R) by loops over steps and cells, in double precision.

    With it, how near any cell comes to its threshold: where that is more than what rounding in single precision moves a
    voltage, some parts in a million, spikes can be compared one by one.
    """
    cells = {"projection": drive.shape[1], "kenyon": len(claws)}
    voltage, slow = ({name: [0.0] * n for name, n in cells.items()} for _ in range(2))
    fired: dict[str, list] = {name: [] for name in cells}
    local, synapse, nearest = 0.0, [0.0] * drive.shape[1], math.inf

    def advance(name, i, heard):
        nonlocal nearest
        heard = max(heard - slow[name][i], 0.0)
        voltage[name][i] = heard + (voltage[name][i] - heard) * math.exp(-1 / MEMBRANE)
        spike = float(voltage[name][i] >= 1)
        nearest = min(nearest, abs(voltage[name][i] - 1))
        voltage[name][i] -= spike
        slow[name][i] = slow[name][i] * math.exp(-1 / ADAPTATION) + adaptation * spike
        return spike

    for now in drive:
        local = local * math.exp(-1 / LOCAL_NEURON) + (1 - math.exp(-1 / LOCAL_NEURON)) * sum(now) / len(now)
        row = [advance("projection", i, max(r - inhibition * local, 0.0)) for i, r in enumerate(now)]
        synapse = [s * math.exp(-1 / SYNAPSE) + spike for s, spike in zip(synapse, row, strict=True)]
        fired["projection"].append(row)
        heard = [GAIN * sum(s for s, w in zip(synapse, cell, strict=True) if w) / FAN_IN for cell in claws]
        fired["kenyon"].append([advance("kenyon", i, h) for i, h in enumerate(heard)])
    return np.array(fired["projection"]), np.array(fired["kenyon"]), nearest


@pytest.mark.rounding
class TestReference:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("inhibition", "adaptation"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.3), (0.4, 0.3)])
    def test_is_the_loop(self, seed, inhibition, adaptation):
        circuit = FlyCircuit(12, 9, lateral_inhibition=inhibition, adaptation=adaptation, seed=seed)
        drive = drives(seed)
        activity = circuit(drive)
        assert activity.kenyon.any()
        for trial in range(len(drive)):
            projection, kenyon, nearest = reference(
                drive[trial].double().numpy(), circuit.claws.numpy(), inhibition, adaptation
            )
            assert nearest > 1e-5
            np.testing.assert_array_equal(activity.projection[trial], projection)
            np.testing.assert_array_equal(activity.kenyon[trial], kenyon)

    def test_trials_know_nothing_of_each_other(self):
        # One of the cases of `test_is_the_loop`, so that no spike hangs on the rounding of sums over fewer trials.
        circuit, drive = FlyCircuit(12, 9, lateral_inhibition=0.4, adaptation=0.3), drives(0)
        together = circuit(drive)
        for trial in range(3):
            alone = circuit(drive[trial : trial + 1])
            assert torch.equal(alone.projection[0], together.projection[trial])
            assert torch.equal(alone.kenyon[0], together.kenyon[trial])

    @pytest.mark.parametrize("adapted_by", ["spikes", "drive"])
    @pytest.mark.parametrize("inhibition", ["subtractive", "divisive"])
    def test_causal(self, adapted_by, inhibition):
        everywhere = ("receptors", "projection", "kenyon")
        options = {"adapted_by": adapted_by, "inhibition": inhibition, "adapting": everywhere}
        circuit = FlyCircuit(12, 9, lateral_inhibition=0.4, adaptation=0.3, **options)
        drive = drives(1)
        changed = drive.clone()
        changed[:, 20] += 20
        before, after = circuit(drive), circuit(changed)
        assert torch.equal(before.projection[:, :20], after.projection[:, :20])
        assert torch.equal(before.kenyon[:, :20], after.kenyon[:, :20])
        assert not torch.equal(before.projection[:, 20:], after.projection[:, 20:])

    def test_wiring_depends_on_the_seed_alone(self):
        torch.manual_seed(1)
        first = FlyCircuit(20, 15, seed=7).claws
        torch.manual_seed(2)
        assert torch.equal(FlyCircuit(20, 15, seed=7, lateral_inhibition=1.0).claws, first)
        assert not torch.equal(FlyCircuit(20, 15, seed=8).claws, first)
        assert ((first > 0).sum(1) == FAN_IN).all()
        torch.testing.assert_close(first.sum(1), torch.ones(15))


class TestInhibition:
    @pytest.mark.parametrize("inhibition", ["subtractive", "divisive"])
    @pytest.mark.parametrize("strength", [0.0, 0.4, 0.95])
    def test_never_adds_and_spares_the_strongest(self, inhibition, strength):
        circuit = FlyCircuit(12, 9, lateral_inhibition=strength, inhibition=inhibition)
        drive = odours(5, 12, torch.Generator().manual_seed(0))[:, None].repeat(1, 30, 1)
        left = circuit.inhibited(drive)
        assert (left <= drive).all()
        assert (left >= 0).all()
        assert (left.amax(-1) > 0).all()
        assert torch.equal(left, drive) == (strength == 0)

    def test_subtractive_takes_a_share_of_the_mean_in_the_end(self):
        circuit = FlyCircuit(12, 9, lateral_inhibition=0.4)
        drive = odours(5, 12, torch.Generator().manual_seed(0))[:, None].repeat(1, 100, 1)
        expected = (drive - 0.4 * drive.mean(-1, keepdim=True)).relu()
        torch.testing.assert_close(circuit.inhibited(drive)[:, -1], expected[:, -1])

    def test_divisive_divides_all_alike(self):
        circuit = FlyCircuit(12, 9, lateral_inhibition=0.4, inhibition="divisive")
        drive = odours(5, 12, torch.Generator().manual_seed(0))[:, None].repeat(1, 100, 1)
        expected = drive / (1 + 0.4 * drive.mean(-1, keepdim=True))
        torch.testing.assert_close(circuit.inhibited(drive)[:, -1], expected[:, -1])

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("settings", [{}, {"adaptation": 0.3}, {"inhibition": "divisive"}])
    def test_never_raises_the_coding_level(self, seed, settings):
        levels = [
            FlyCircuit(seed=seed, lateral_inhibition=strength, **settings)(drives(seed, receptors=50)).coding_level
            for strength in (0.0, 0.2, 0.4, 0.8)
        ]
        assert levels == sorted(levels, reverse=True)
        assert levels[-1] < levels[0]


class TestAdaptation:
    def test_by_drive_falls_from_all_of_it_to_the_share_that_is_left(self):
        circuit = FlyCircuit(12, 9, adaptation=0.3, adapted_by="drive")
        drive = (0.5 + torch.rand(2, 1, 12)).expand(-1, 1500, -1)
        with torch.no_grad():
            left = circuit.slowly_reduced(drive)
        assert torch.equal(left[:, 0], drive[:, 0])
        assert (left.diff(dim=1) <= 1e-6).all()
        share = 0.3 * ADAPTATION / (MEMBRANE + 0.3 * ADAPTATION)
        torch.testing.assert_close(left[:, -1], (1 - share) * drive[:, -1], rtol=0, atol=1e-6)

    def test_by_spikes_slows_the_cell_down_to_the_same_rate(self):
        """The two strengths are made for each other: under a strong constant drive they end about alike."""
        drive = torch.full((1, 1000, 1), 12.0)
        plain, slowed = spikes(drive)[0, :, 0], spikes(drive, 0.3)[0, :, 0]
        with torch.no_grad():
            by_drive = spikes(FlyCircuit(adaptation=0.3, adapted_by="drive").slowly_reduced(drive))[0, :, 0]
        assert slowed[:5].sum() == plain[:5].sum() >= 3
        assert slowed[500:].mean() < 0.5 * plain[500:].mean()
        assert slowed[500:].mean().item() == pytest.approx(by_drive[500:].mean().item(), rel=0.15)
        intervals = slowed.nonzero()[:, 0].diff()
        assert intervals[:3].float().mean() < intervals[-10:].float().mean()

    @pytest.mark.parametrize("adapted_by", ["spikes", "drive"])
    def test_without_strength_is_no_adaptation(self, adapted_by):
        drive, plain = drives(0), FlyCircuit(12, 9)
        circuit = FlyCircuit(12, 9, adaptation=0.0, adapted_by=adapted_by, adapting=("receptors", "kenyon"))
        assert torch.equal(circuit(drive).kenyon, plain(drive).kenyon)

    @pytest.mark.parametrize("adapted_by", ["spikes", "drive"])
    def test_only_the_named_populations_adapt(self, adapted_by):
        drive = drives(0, steps=100)
        plain = FlyCircuit(12, 9)(drive)

        def total(*names):
            activity = FlyCircuit(12, 9, adaptation=0.3, adapting=names, adapted_by=adapted_by)(drive)
            return activity.projection.sum(), activity.kenyon.sum()

        assert total() == (plain.projection.sum(), plain.kenyon.sum())
        kenyon_only = total("kenyon")
        assert kenyon_only[0] == plain.projection.sum()
        assert kenyon_only[1] < plain.kenyon.sum()
        assert total("projection")[0] < plain.projection.sum()
        assert total("receptors")[0] < plain.projection.sum()


class TestOdoursAndReadOuts:
    def test_noise_has_the_stated_size_and_kind(self):
        flat, found = torch.full((300, 40), 100.0), {}
        for kind in ("both", "trial", "step"):
            found[kind] = noisy_trials(flat, 20, 2.0, torch.Generator().manual_seed(0), kind) - 100
        assert found["trial"].std().item() == pytest.approx(2, rel=0.05)
        assert torch.equal(found["trial"][:, :1].expand(-1, 20, -1), found["trial"])
        assert found["step"].std().item() == pytest.approx(1, rel=0.05)
        assert found["step"].mean(1).std().item() == pytest.approx(1 / math.sqrt(20), rel=0.05)
        assert found["both"].std().item() == pytest.approx(math.sqrt(5), rel=0.05)
        assert (noisy_trials(flat / 100, 20, 2.0, torch.Generator().manual_seed(0)) >= 0).all()

    def test_odours_share_what_they_are_told_to(self):
        source = torch.Generator().manual_seed(0)
        made = odours(2, 50000, source, shared=0.85)
        assert made.mean().item() == pytest.approx(2.5, rel=0.02)
        expected = 0.85**2 / (0.85**2 + 0.15**2)
        assert torch.corrcoef(made)[0, 1].item() == pytest.approx(expected, abs=0.02)

    def test_delta_rule_approaches_its_targets_at_its_rate(self):
        codes, labels = torch.eye(6), torch.arange(6) % 3
        weights = delta_rule(codes, labels, 3, torch.Generator().manual_seed(0), rate=0.3, passes=4)
        expected = (labels == torch.arange(3)[:, None]).float() * (1 - 0.7**4)
        torch.testing.assert_close(weights, expected)

    def test_class_means_point_to_the_classes(self):
        codes, labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), torch.tensor([0, 0, 1])
        weights = class_means(codes, labels, 2)
        torch.testing.assert_close(weights, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))
        assert accuracy(weights, codes, labels) == 1
        assert accuracy(weights, codes, 1 - labels) == 0

    def test_codes_have_unit_norm_or_are_silent(self):
        activity = FlyCircuit(12, 9)(torch.cat([drives(0), torch.zeros(1, 40, 12)]))
        torch.testing.assert_close(activity.codes.norm(dim=1), torch.tensor([1.0, 1, 1, 0]))
        assert activity.coding_level == activity.kenyon.any(1).float().mean()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lateral_inhibition": -0.1}, "lateral_inhibition must be a number of at least 0, got -0.1"),
            ({"adaptation": math.nan}, "adaptation must be a number of at least 0, got nan"),
            ({"receptors": 3}, "receptors must be a number of at least 6, got 3"),
            ({"inhibition": "divise"}, "inhibition must be one of .* got 'divise'; did you mean 'divisive'"),
            ({"adapted_by": "spike"}, "adapted_by must be one of .* did you mean 'spikes'"),
            ({"adapting": ["kenyon", "projecton"]}, "adapting must be one of .* did you mean 'projection'"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            FlyCircuit(**settings)

    def test_drives(self):
        circuit = FlyCircuit(12, 9)
        with pytest.raises(ValueError, match="drive must be \\(trials, steps, 12\\), got \\(3, 40, 11\\)"):
            circuit(drives(0, receptors=11))
        with pytest.raises(ValueError, match="drive must not be negative, got -1"):
            circuit(-torch.ones(1, 2, 12))
        with pytest.raises(ValueError, match="drive must not be negative, got nan"):
            circuit(torch.full((1, 2, 12), math.nan))
        with pytest.raises(ValueError, match="kind must be one of .* got 'steps'"):
            noisy_trials(torch.ones(1, 12), 5, 0.1, torch.Generator(), "steps")


class TestGates:
    """What is claimed of the circuit, in the mean over fresh seeds; the rest is in the ledger, without a gate."""

    SEEDS, SIGMAS = range(300, 304), (0.1, 0.3, 1.2)
    STRONG = "LI 0.8"

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls):
        """Mean accuracy by noise, arm and read-out."""
        found: dict[tuple[float, str, str], list[float]] = {}
        for seed in cls.SEEDS:
            for sigma in cls.SIGMAS:
                for arm, _, sets in run.activities(seed, sigma, (run.NONE, run.LI, cls.STRONG, run.SFA, run.BOTH)):
                    found.setdefault((sigma, arm, run.ONLINE), []).append(run.online(*sets, seed))
                    found.setdefault((sigma, arm, run.MEANS), []).append(run.means(*sets))
        return {key: sum(values) / len(values) for key, values in found.items()}

    def gain(self, found, sigma: float, arm: str, measure: str = run.ONLINE) -> float:
        return found[sigma, arm, measure] - found[sigma, run.NONE, measure]

    def test_what_inhibition_gains_falls_with_noise(self, found):
        assert self.gain(found, 0.1, self.STRONG) > self.gain(found, 1.2, self.STRONG) + 0.08

    def test_inhibition_costs_a_read_out_by_means_from_medium_noise_on(self, found):
        assert self.gain(found, 0.3, self.STRONG, run.MEANS) < -0.02
        assert self.gain(found, 1.2, self.STRONG, run.MEANS) < 0

    @pytest.mark.parametrize("sigma", SIGMAS)
    def test_adaptation_helps_whatever_the_noise(self, found, sigma):
        assert self.gain(found, sigma, run.SFA) > 0

    @pytest.mark.parametrize("sigma", [0.1, 0.3])
    def test_both_are_better_than_each_at_low_noise(self, found, sigma):
        both = found[sigma, run.BOTH, run.ONLINE]
        assert both > found[sigma, run.LI, run.ONLINE]
        assert both > found[sigma, run.SFA, run.ONLINE]


class TestExperiment:
    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls) -> list[run.Row]:
        """Made up: each mechanism is worth ten points in every seed, and noise costs one point per unit."""
        return [
            run._row(
                seed, sigma, arm, measure, 0.5 + 0.01 * seed - 0.01 * sigma + 0.1 * ("LI" in arm) + 0.1 * ("SFA" in arm)
            )
            for seed in range(3)
            for sigma in run.SIGMAS
            for arm in run.ARMS
            for measure in run.MEASURES
        ]

    def test_differences_are_paired_and_judged(self, rows):
        found = {claim.text: claim for claim in run.claims(rows)}
        assert len(found) == 2 * 16
        helps = found["LI helps at low and medium noise (delta rule)."]
        assert helps.values == pytest.approx([10, 10, 10])
        assert helps.verdict == "supported"
        assert found["LI harms at noise 2.4 (class means)."].verdict == "not supported"
        assert found["LI's help shrinks with noise (delta rule)."].values == pytest.approx([0, 0, 0])
        assert found["Both together are best at noise 0.6 (delta rule)."].values == pytest.approx([10, 10, 10])

    def test_both_are_compared_with_the_better_single_one(self, rows):
        shifted = [row | {"value": row["value"] + 0.05 * (row["arm"] == run.SFA)} for row in rows]
        best = [claim for claim in run.claims(shifted) if claim.text.startswith("Both together")]
        assert all(claim.measure == "both - SFA, the better one, points" for claim in best)
        assert best[0].values == pytest.approx([5, 5, 5])

    def test_tables_and_picture_show_everything(self, rows):
        text = run.tables(rows)
        assert all(text.count(f"| {arm} |") == len(run.MEASURES) for arm in run.ARMS)
        assert len(run.draw(rows).axes) == 3

    def test_arms_differ_in_the_circuit_alone(self):
        found = {arm: (activity, sets) for arm, activity, sets in run.activities(0, 0.1, (run.NONE, run.SFA))}
        (plain, sets), (adapted, others) = found[run.NONE], found[run.SFA]
        assert torch.equal(plain.projection[:, 0], adapted.projection[:, 0])
        assert adapted.projection.sum() < plain.projection.sum()
        assert torch.equal(sets[1], others[1])
        assert sets[1].bincount().tolist() == [run.TRAINING] * run.ODOURS
        assert sets[3].bincount().tolist() == [run.TEST] * run.ODOURS
        assert run.ridge(*sets) > 0.9
