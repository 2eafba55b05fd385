"""The benchmark of the methods: its instruments are exact, its baselines compute what they stand for, and it runs."""

import csv

import pytest
import torch
from helpers.scripts import loaded, run

from bioadapt import list_primitives
from bioadapt.methods._sparse_product import sparse_product
from bioadapt.primitives.base import Primitive

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def bench():
    with loaded("methods") as module:
        yield module


def llama(bench, dtype=torch.float32):
    return bench.llama("cpu", dtype, (2, 8), num_hidden_layers=2, **SMALL)


# -- instruments --


def test_allocations_are_counted_in_forward_and_backward_and_given_back(bench):
    x = torch.zeros(1000, requires_grad=True)
    with bench.Allocations() as made:
        y = x * 2
        z = y.view(10, 100).exp()  # a view is no storage of its own
        assert made.live == 8000
        del y
        assert made.live == 4000  # the exponential keeps its result alone
        z.sum().backward()
        assert made.live == 8000  # the result, and the gradient of x
    assert 12000 <= made.peak < 12100  # on the way there, the gradient of y; and the sum
    assert made.largest == 4000


def test_storages_from_before_are_nobodys_allocation(bench):
    x = torch.zeros(1000)
    with bench.Allocations() as made:
        x.add_(1).view(10, 100).mul_(2)
    assert (made.live, made.peak) == (0, 0)


def test_a_frozen_layer_needs_its_output_and_the_gradient_of_its_input(bench):
    subject = bench.one_layer(24, tokens=10)
    step = subject.step(subject.build().requires_grad_(False))
    assert bench.memory(step, "cpu") == (2 * 4 * 10 * 24, 4 * 10 * 24)
    assert bench.saved_bytes(step, step.model.parameters()) == 0


@pytest.mark.parametrize("k", [2, 20])
def test_sparse_products_count_for_their_entries(bench, k):
    matrix = torch.zeros(64, 64)
    matrix[:, :k] = 1
    sparse, dense = matrix.to_sparse_csr(), torch.ones(64, 8)
    products = [(matrix, dense, 2 * 64 * 64 * 8), (sparse, dense, 2 * 64 * k * 8), (dense.T, sparse, 2 * 64 * k * 8)]
    for a, b, expected in products:
        step = bench.Step(torch.nn.Module(), lambda a=a, b=b: a @ b, lambda output: None)
        assert bench.flops(step) == expected
    step = bench.Step(
        torch.nn.Module(), lambda: torch.sparse.sampled_addmm(sparse, dense, dense.T), lambda output: None
    )
    assert bench.flops(step) == 2 * 64 * k * 8


@pytest.mark.parametrize("k", [2, 20])
def test_sums_of_bags_count_for_their_words(bench, k):
    """As a sparse matrix of as many entries, in forward, for the words and for the weights."""
    index, values = torch.arange(k, dtype=torch.int32).repeat(64, 1), torch.ones(64, k, requires_grad=True)
    v = torch.ones(8, 64, requires_grad=True)
    step = bench.Step(torch.nn.Module(), lambda: sparse_product(v, index, values, path="bags").sum())
    assert bench.flops(step) == 3 * 2 * 64 * k * 8


# -- the official forms compute the same --


def outcome(subject, model):
    """Output, the input's gradient, and the parameters' gradients by name."""
    x = subject.x.detach().requires_grad_()
    output = subject.run(model, x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    return output, x.grad, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def both(bench, subject, ours, theirs):
    """Our model with its primitives, and the official form with its wrappers, in the order of the layers."""
    named = {method.name: method for method in bench.methods(subject)}
    base = subject.build()
    mine, other = (bench.adapted(base, named[name], subject) for name in (ours, theirs))
    primitives = [module for module in mine.modules() if isinstance(module, Primitive)]
    forms = [module for module in other.modules() if hasattr(module, "base")]
    assert len(primitives) == len(forms) > 0
    return mine, other, list(zip(primitives, forms, strict=True))


def assert_same(subject, mine, other, gradient):
    """``gradient``: of one of our parameters, in the shape of the official form's."""
    output, on_x, grads = outcome(subject, mine)
    expected, expected_on_x, expected_grads = outcome(subject, other)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_x, expected_on_x, rtol=1e-4, atol=1e-5)
    for own, others in zip(grads.values(), expected_grads.values(), strict=True):
        torch.testing.assert_close(gradient(own), others, rtol=1e-4, atol=1e-4)


def test_masked_fly_lora(bench):
    subject = bench.one_layer(64, tokens=16)
    mine, other, pairs = both(bench, subject, "fly_lora", "fly_lora_masked")
    with torch.no_grad():
        for primitive, form in pairs:
            assert (form.A != 0).sum(1).tolist() == (primitive.A != 0).sum(1).tolist()
            form.A.copy_(primitive.A)
            form.B.copy_(primitive.B)
    assert_same(subject, mine, other, lambda own: own)


@pytest.mark.parametrize("k", [1, 20])
def test_scattered_neuro_ada(bench, k):
    subject = bench.one_layer(64, tokens=16)
    mine, other, pairs = both(bench, subject, f"neuro_ada_k{k}", f"neuro_ada_k{k}_scattered")
    with torch.no_grad():
        for primitive, form in pairs:
            assert torch.equal(form.positions.view(64, k) % 64, primitive.index.long())
            form.values.copy_(primitive.values.flatten())
    assert_same(subject, mine, other, torch.flatten)


@pytest.mark.parametrize("host", ["pair", "llama"])
def test_rescaled_san(bench, host):
    subject = bench.two_layers(64, tokens=16) if host == "pair" else llama(bench)
    mine, other, pairs = both(bench, subject, "san", "san_rescaled")
    with torch.no_grad():
        for primitive, form in pairs:
            form.gamma.copy_(1 + primitive.change_of_gain())
            assert (subject.anterior(primitive.path) is None) == (not primitive.anterior)
    assert any(primitive.anterior for primitive, _ in pairs)
    assert_same(subject, mine, other, lambda own: own)


# -- the command --


def test_a_quick_run_measures_every_method(bench, monkeypatch, capsys):
    assert run(bench, monkeypatch, "--quick", "--widths", "48", "--memory-widths", "32") == 0
    told = capsys.readouterr().out
    table = [line.split() for line in told.splitlines() if line.startswith(("layer", "pair"))]
    found = {(line[0], line[2], line[4]) for line in table}
    subjects = bench.one_layer(32), bench.two_layers(32)
    expected = {(s.name, m.name, w) for s in subjects for m in bench.methods(s) for w in ("48", "32")}
    assert found == expected
    assert all((line[-1] == "-") == (line[4] == "32" or line[2] == "fly_lora_storing_a") for line in table)
    assert "LoRA r=8 comes to the known numbers" in told
    assert "no CSV" in told


def test_a_method_that_is_not_registered_is_left_out_aloud(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "list_primitives", lambda: [name for name in list_primitives() if name != "fly_lora"])
    rows = bench.measure(bench.one_layer(32, tokens=8), ["fly_lora", "fly_lora_masked"])
    assert {row.method for row in rows} == {"none", "lora_r8", "fly_lora_masked"}
    assert "fly_lora is left out" in capsys.readouterr().err


def test_a_whole_run_is_written(bench, monkeypatch, tmp_path):
    rows = bench.measure(bench.one_layer(32), ["lora_r8"], rounds=1)
    monkeypatch.setattr(bench, "measure", lambda *_: rows)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert run(bench, monkeypatch, "--widths", "32", "--memory-widths", "--machine", "here") == 0
    with (tmp_path / "methods-here.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [line["method"] for line in written[: len(rows)]] == [row.method for row in rows]
    assert {line["tokens"] for line in written} == {"512"}


def test_an_unknown_name_is_refused_with_those_that_are_known(bench, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, "--only", "lora_r9")
    assert "lora_r8" in capsys.readouterr().err


def test_counts_that_are_not_loras_are_told(bench):
    rows = bench.measure(bench.one_layer(32), ["lora_r8"])
    assert bench.anchors(rows) == "LoRA r=8 comes to the known numbers."
    next(row for row in rows if row.method == "lora_r8").saved_mib *= 1.01
    assert "NOT as expected: saved_mib at 32" in bench.anchors(rows)


def test_blocks_of_a_llama_in_half_precision(bench):
    rows = bench.measure(llama(bench, torch.bfloat16), ["fly_lora", "neuro_ada_k1_scattered"], rounds=1)
    assert {row.method for row in rows} == {"none", "lora_r8", "fly_lora", "neuro_ada_k1_scattered"}
    assert all(row.step_ratio > 0 and row.subject == "llama" for row in rows)
    fly = next(row for row in rows if row.method == "fly_lora")
    assert fly.active * 4 == fly.parameters


# -- the bars --


def row(bench, method, subject="layer", width=1024, **numbers):
    named = {name: 1.0 for name in bench.Row.__dataclass_fields__}
    return bench.Row(**{**named, "method": method, "subject": subject, "width": width, **numbers})


def rows_that_pass(bench):
    return [
        row(bench, "lora_r8"),
        row(bench, "lora_r32"),
        row(bench, "neuro_ada_k1", extra_mib=0.2, largest_mib=2.0, step_ratio=1.0),
        row(bench, "neuro_ada_k1_scattered"),
        row(bench, "fly_lora", saved_mib=0.5, file_kib=0.55, step_ratio=1.1),
        row(bench, "fly_lora_masked"),
        row(bench, "fly_lora_storing_a", step_ratio=None),
        row(bench, "lora_r8", "pair"),
        row(bench, "san", "pair", largest_mib=2.0, step_ratio=1.15),
    ]


@pytest.mark.parametrize(
    ("method", "number", "value", "which"),
    [
        ("neuro_ada_k1", "largest_mib", 4.0, [0]),
        ("neuro_ada_k1", "extra_mib", 0.21, [1]),
        ("neuro_ada_k1", "step_ratio", 1.15, [2]),
        ("neuro_ada_k1", "step_ratio", 1.25, [2, 3]),
        ("fly_lora", "saved_mib", 0.51, [4]),
        ("fly_lora", "file_kib", 0.56, [5]),
        ("fly_lora", "step_ratio", 1.11, [6]),
        ("san", "largest_mib", 4.0, [7]),
        ("san", "step_ratio", 1.16, [8]),
    ],
)
def test_each_bar_fails_for_its_own_number(bench, method, number, value, which):
    rows = rows_that_pass(bench)
    assert all(bar.holds for bar in bench.bars(rows))
    setattr(next(row for row in rows if row.method == method), number, value)
    assert [i for i, bar in enumerate(bench.bars(rows)) if not bar.holds] == which


def test_what_was_not_measured_does_not_hold(bench, monkeypatch, capsys):
    rows = [row for row in rows_that_pass(bench) if row.method != "san"]
    assert [bar.holds for bar in bench.bars(rows)] == [True] * 7 + [False] * 2
    monkeypatch.setattr(bench, "measure", lambda *_: rows)
    assert run(bench, monkeypatch, "--bars", "--widths", "384", "1024") == 1
    assert "not measured" in capsys.readouterr().out
