"""Networks of spiking cells: the catalogue's neuron on a time axis, its limit, its slopes, and what it is good for."""

import math

import pytest
import snntorch
import torch
from torch.nn.functional import one_hot

from bioadapt.circuits import spiking_network
from bioadapt.circuits.spiking_network import (
    LEAK,
    NEURONS,
    CellState,
    SpikingClassifier,
    SpikingLayer,
    constants_at_birth,
    fire,
)
from bioadapt.primitives.dendritic.kv_lif import KvLif, _factors, _rate, _slopes
from experiments.kv_lif import run
from experiments.kv_lif.training import accuracy, fit

SEEDS = range(4)
KV, LIF = NEURONS


def random_constants(seed: int, cells: int) -> torch.Tensor:
    """(6, cells), all positive, around those at birth."""
    spread = torch.rand(6, cells, generator=torch.Generator().manual_seed(seed))
    constants = constants_at_birth()[:, None] * (0.7 + 0.6 * spread)
    constants[5].clamp_(max=0.95)
    return constants


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_run(found: tuple[torch.Tensor, CellState], expected: tuple[torch.Tensor, CellState]) -> None:
    """The same spikes, and the same state but for rounding.

    Products of other shapes are summed in another order, which moves a drive by parts in ten million. That decides a
    spike only where a voltage lies as near to its threshold, and none does with the numbers used here: `driven` checks.
    """
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def driven(neuron: str, *shape: int) -> tuple[SpikingLayer, torch.Tensor]:
    """A layer and its input (*shape, 5), with which no spike hangs on rounding."""
    torch.manual_seed(0)
    layer, x = SpikingLayer(5, 7, neuron), 3 * noise(1, *shape, 5)
    spikes = layer(x)[0]
    assert all(torch.equal(layer(x * (1 + much))[0], spikes) for much in (-1e-5, 1e-5))
    return layer, x


class TestTheCataloguesNeuron:
    def test_is_born_with_the_constants_of_the_primitive(self):
        born = KvLif(3, 3).constants().detach()
        assert torch.equal(constants_at_birth(leak=born[1].item()), born)

    @pytest.mark.parametrize("steps", [1, 6, 16])
    def test_under_a_constant_drive_counts_what_the_primitive_counts(self, steps):
        constants, drive = KvLif(1, 1).constants().detach(), torch.linspace(0, 8, 500)
        spikes, _ = fire(drive.expand(1, steps, -1), constants)
        torch.testing.assert_close(spikes.mean(1)[0], _rate(drive, _factors(constants), steps), rtol=0, atol=1e-6)

    def test_has_the_surrogate_slopes_of_the_primitive(self):
        """By the drive and by all six constants, against the backward that the primitive has written out."""
        steps, drive = 6, torch.linspace(0.05, 4, 60, dtype=torch.float64, requires_grad=True)
        constants = constants_at_birth().double().requires_grad_()
        weight = noise(0, 60).double()
        fire(drive.expand(1, steps, -1), constants)[0].mean(1)[0].mul(weight).sum().backward()
        slope, on_constants = _slopes(drive.detach(), weight, constants.detach(), steps)
        torch.testing.assert_close(drive.grad, slope * weight)
        torch.testing.assert_close(constants.grad, on_constants)

    def test_slopes_are_those_of_a_smooth_relaxation(self, monkeypatch):
        """Where no spike is possible, backward is the true derivative: finite differences agree."""
        constants = random_constants(1, 3).double()
        constants[0] = 50.0
        drive = noise(2, 2, 5, 3).double().requires_grad_()
        monkeypatch.setattr(spiking_network, "spike_slope", torch.zeros_like)
        assert torch.autograd.gradcheck(lambda d, c: fire(d, c)[1], (drive, constants.requires_grad_()))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_share_of_open_channels_stays_within_its_bounds(self, seed):
        constants = random_constants(seed, 20)
        _, _, _, by_spike, _, memory = constants
        drive, state = 3 * noise(seed, 2, 60, 20), None
        for t in range(60):
            _, state = fire(drive[:, t : t + 1], constants, state=state)
            assert (state.opened >= 0).all()
            assert (state.opened <= 1 + by_spike / (1 - memory) + 1e-5).all()

    def test_intervals_between_spikes_grow_under_a_constant_drive(self):
        drive = torch.linspace(0, 8, 200)
        spikes, _ = fire(drive.expand(1, 200, -1), constants_at_birth())
        longer = 0
        for cell in spikes[0].T:
            intervals = cell.nonzero()[:, 0].diff()
            if len(intervals):
                # A step may be cut short by discrete time alone.
                assert (intervals >= intervals.cummax(0).values - 1).all()
                longer += (intervals.float().mean() > intervals[0]).item()
        assert longer > 20

    @pytest.mark.parametrize("leak", [0.1, LEAK])
    def test_rate_grows_with_the_drive_and_is_never_above_that_without_potassium(self, leak):
        drive = torch.linspace(0, 30, 600)
        rates = {
            name: fire(drive.expand(1, 400, -1), constants_at_birth(name, leak))[0].mean((0, 1)) for name in NEURONS
        }
        assert (rates[KV].diff() >= -1 / 400 - 1e-6).all()
        assert rates[KV][-1] > 0.9
        assert (rates[KV] <= rates[LIF]).all()


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
class TestLimit:
    def test_without_potassium_is_the_plain_neuron_bit_for_bit(self, seed):
        constants, drive = constants_at_birth(LIF), 2 * noise(seed, 3, 40, 25)
        spikes, state = fire(drive, constants)
        # As many numbers as the cells have: an exponential may round otherwise where it is taken of one.
        leak, voltage = constants[1].repeat(3, 25), torch.zeros(3, 25)
        for t in range(40):
            settled = drive[:, t] / leak
            voltage = settled + (voltage - settled) * torch.exp(-leak)
            fired = (voltage >= 1).float()
            voltage = voltage - fired
            assert torch.equal(spikes[:, t], fired)
        assert torch.equal(state.voltage, voltage)

    def test_snntorch_agrees_step_by_step(self, seed):
        """`snntorch.Leaky` decays by beta = exp(-g) and is driven by what one step charges, I (1 - exp(-g)) / g.

        With ``reset_delay=False`` it subtracts the threshold in the step of the spike, as we do; a cell that is still
        above threshold then would lose it once more before the next spike, so that drives are kept below that. It fires
        above threshold where ours fires at threshold, which random drives do not tell apart.
        """
        leak, threshold = 0.3 + 0.2 * seed, 1.3
        constants = constants_at_birth(LIF, leak)
        constants[0] = threshold
        charge = noise(seed, 4, 60, 30).clamp(max=threshold - 0.1)
        peer = snntorch.Leaky(beta=math.exp(-leak), threshold=threshold, reset_mechanism="subtract", reset_delay=False)
        voltage, state, total = torch.zeros(4, 30), None, 0.0
        for t in range(60):
            theirs, voltage = peer(charge[:, t], voltage)
            # The two round differently; where that is less than what parts a cell from its threshold, spikes agree.
            assert (voltage + threshold * theirs - threshold).abs().min() > 1e-5
            ours, state = fire(charge[:, t : t + 1] * (leak / -math.expm1(-leak)), constants, state=state)
            assert torch.equal(ours[:, 0], theirs)
            torch.testing.assert_close(state.voltage, voltage, rtol=0, atol=1e-5)
            total += theirs.mean().item()
        assert total > 1

    def test_potassium_that_carries_nothing_is_no_potassium(self, seed):
        """Also where channels open: without conductance and deeper reset they are not felt."""
        open_only = constants_at_birth(KV)
        open_only[[2, 4]] = 0.0
        drive = 2 * noise(seed, 3, 40, 25)
        felt, state = fire(drive, open_only)
        assert state.opened.any()
        assert torch.equal(felt, fire(drive, constants_at_birth(LIF))[0])


@pytest.mark.rounding
@pytest.mark.parametrize("neuron", NEURONS)
class TestTime:
    def test_padding_changes_neither_state_nor_spikes(self, neuron):
        layer, x = driven(neuron, 2, 12)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, :3] = mask[1, 4:6] = mask[1, 10:] = False
        spikes, state = layer(x, mask)
        assert not spikes[~mask].any()
        for row in range(2):
            alone = layer(x[row : row + 1, mask[row]])
            assert alone[0].any()
            kept = CellState(*(part[row : row + 1] for part in state))
            assert_same_run((spikes[row : row + 1, mask[row]], kept), alone)

    def test_steps_are_the_whole(self, neuron):
        layer, x = driven(neuron, 2, 9)
        first, state = layer(x[:, :4])
        rest, state = layer(x[:, 4:], state=state)
        assert isinstance(state, CellState)
        assert_same_run((torch.cat([first, rest], 1), state), layer(x))

    def test_no_spike_depends_on_what_comes_later(self, neuron):
        layer, x = driven(neuron, 2, 9)
        changed = x.clone()
        changed[:, 5] += 3
        before, after = layer(x)[0], layer(changed)[0]
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5:], after[:, 5:])

    def test_rates_are_taken_over_real_steps(self, neuron):
        torch.manual_seed(0)
        model, x = SpikingClassifier((5, 7), 3, neuron), 3 * noise(1, 2, 8, 5)
        mask = torch.arange(8) < torch.tensor([[8], [3]])
        torch.testing.assert_close(model(x, mask)[1:], model(x[1:, :3]))


@pytest.mark.parametrize("neuron", NEURONS)
class TestTraining:
    def data(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(30) % 3
        x = one_hot(labels, 3).float() @ noise(seed, 3, 12).abs() + 0.1 * noise(seed + 1, 30, 12)
        return x[:, None].expand(-1, 4, -1), labels

    def test_learns(self, neuron):
        torch.manual_seed(0)
        model, (x, labels) = SpikingClassifier((12, 16, 16), 3, neuron), self.data(0)
        fit(model, x, labels, rate=0.01, epochs=25, seed=0, batch=15)
        assert accuracy(model, x, labels) > 0.9

    def test_every_parameter_hears_the_loss(self, neuron):
        torch.manual_seed(0)
        model, (x, labels) = SpikingClassifier((12, 16, 16), 3, neuron), self.data(0)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        fit(model, x, labels, rate=0.01, epochs=1, seed=0)
        for name, value in model.named_parameters():
            assert not torch.equal(value, before[name]), name

    def test_is_repeatable(self, neuron):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            model, (x, labels) = SpikingClassifier((12, 16), 3, neuron), self.data(0)
            fit(model, x, labels, rate=0.01, epochs=2, seed=5, batch=7)
            results.append(model(x))
        assert torch.equal(*results)

    def test_state_comes_back_from_a_file(self, neuron, tmp_path):
        torch.manual_seed(0)
        model, (x, labels) = SpikingClassifier((12, 16), 3, neuron), self.data(0)
        fit(model, x, labels, rate=0.01, epochs=1, seed=0)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        fresh = SpikingClassifier((12, 16), 3, neuron)
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(fresh(x), model(x))


class TestBadInput:
    def test_an_unknown_neuron_is_refused_with_the_nearest(self):
        with pytest.raises(ValueError, match="neuron must be one of .*got 'kvlif'; did you mean 'kv_lif'"):
            SpikingClassifier((4, 5), 2, "kvlif")

    def test_a_leak_has_to_be_positive(self):
        with pytest.raises(ValueError, match="leak must be a positive number, got 0"):
            constants_at_birth(leak=0.0)

    def test_a_network_needs_a_layer(self):
        with pytest.raises(ValueError, match="at least one layer of cells, got \\(4,\\)"):
            SpikingClassifier((4,), 2)

    def test_shapes_are_checked(self):
        constants = constants_at_birth()
        with pytest.raises(ValueError, match="drive must be .* got \\(5, 3\\)"):
            fire(torch.zeros(5, 3), constants)
        with pytest.raises(ValueError, match="constants must be \\(6,\\) or \\(6, 3\\), got \\(6, 2\\)"):
            fire(torch.zeros(1, 5, 3), constants[:, None].expand(-1, 2))
        with pytest.raises(ValueError, match="mask must be \\(1, 5\\), got \\(1, 4\\)"):
            fire(torch.zeros(1, 5, 3), constants, torch.ones(1, 4, dtype=torch.bool))


class TestGates:
    """What is claimed of the neuron, on seeds of their own. The network's side is in the ledger, without a gate."""

    SEEDS = range(200, 204)

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls):
        return [row for seed in cls.SEEDS for row in run.neuron_rows(seed, quick=True)]

    @pytest.mark.parametrize("size", run.NOISES)
    def test_the_count_tells_more_of_the_amplitude(self, rows, size):
        assert min(run.gains(rows, "half per step", f"bits, span 4, noise {size:g}")) > 0.3

    @pytest.mark.parametrize("where", ["alone", "below threshold"])
    def test_noise_causes_fewer_spikes(self, rows, where):
        assert max(run.gains(rows, "half per step", f"noise spikes {where}")) < -0.01

    def test_the_range_of_inputs_is_wider(self):
        (low, high), (kv_low, kv_high) = (run.input_range(name, LEAK) for name in (LIF, KV))
        assert kv_high - kv_low > 1.5 * (high - low)


class TestExperiment:
    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls) -> list[run.Row]:
        """Made up: KvLIF is better by one, and each seed by another one."""
        inputs = {
            name: [f"accuracy, {condition}" for condition in conditions] for name, (_, conditions) in run.INPUTS.items()
        }
        neuron = {row["measure"] for row in run.neuron_rows(0, quick=True)}
        settings = {**inputs, **{leak: sorted(neuron) for leak in run.LEAKS}}
        return [
            run._row(
                seed,
                "network" if name in inputs else "neuron",
                name,
                cell,
                measure,
                1.0 + seed + run.NEURONS.index(cell),
            )
            for seed in range(3)
            for name, measures in settings.items()
            for cell in run.NEURONS
            for measure in measures
        ]

    def test_differences_are_paired_and_judged(self, rows):
        found = {claim.text: claim for claim in run.claims(rows)}
        network = found["The network is more robust (events, lost 0.5)."]
        assert list(network.values) == [1.0, 1.0, 1.0]
        assert network.verdict == "supported"
        assert found["Noise causes fewer spikes (without any other drive)."].verdict == "not supported"
        assert found["The range of inputs is wider."].values == [0.0, 0.0, 0.0]

    def test_tables_and_picture_show_every_measure(self, rows):
        text = run.tables(rows, {(run.KV, "events"): 0.003})
        assert all(row["measure"] in text for row in rows)
        assert "KvLIF on events 0.003" in text
        assert len(run.draw(rows).axes) == 3

    def test_information_of_a_known_code(self, monkeypatch):
        """A count that is the bin's number out of eight says three bits."""
        monkeypatch.setattr(run, "counts", lambda neuron, leak, amplitudes, noise, source: (2 * amplitudes).floor())
        found = run.bits(KV, LEAK, 4.0, 0.0, 20000, torch.Generator().manual_seed(0))
        assert found == pytest.approx(3, abs=0.01)

    def test_noise_of_the_inputs(self):
        images = torch.full((200, 64), 0.5)

        def made(encode, condition):
            return encode(images, condition, torch.Generator().manual_seed(0))

        clean, temporal, frozen = (made(run.pictures, name) for name in ("clean", "temporal 0.5", "frozen 0.5"))
        assert torch.equal(clean, images[:, None].expand(-1, 6, -1))
        assert (frozen - clean).std().item() == pytest.approx(0.5, rel=0.05)
        assert torch.equal(frozen[:, :1].expand(-1, 6, -1), frozen)
        assert (temporal - clean).mean(1).std().item() == pytest.approx(0.5 / math.sqrt(6), rel=0.05)
        rates = [made(run.events, name).mean().item() for name in ("clean", "background 0.2", "lost 0.5")]
        assert rates == pytest.approx([0.25, 0.25 + 0.75 * 0.2, 0.125], rel=0.02)

    def test_parts_of_the_digits_do_not_overlap(self):
        parts = run.split(0)
        assert [len(parts[name][0]) for name in ("train", "dev", "test")] == [1077, 360, 360]
        rows = torch.cat([images for images, _ in parts.values()])
        assert len(rows.unique(dim=0)) == len(rows)
        assert rows.max() == 1
        assert not torch.equal(parts["test"][1], run.split(1)["test"][1])

    def test_the_learning_rate_is_the_best_one_on_dev_rows(self, monkeypatch):
        scored = []

        def score(model, series, labels):
            scored.append(len(labels))
            return -abs(model - 0.004)

        monkeypatch.setattr(run, "trained", lambda neuron, inputs, data, seed, rate, quick: rate)
        monkeypatch.setattr(run, "accuracy", score)
        assert run.choose_rate(KV, "constant", quick=False) == 0.003
        assert scored == [360] * len(run.RATES)
