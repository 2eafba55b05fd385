"""neuro_ada: its selection of synapses, its sparse product against a dense one, and its life in models."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers.models import Chain, bert, bio_layers, close, digest, gpt2, output, own_parameters, step, tokens, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bioadapt import BioConfig, build_primitive
from bioadapt.methods import _sparse_product
from bioadapt.methods._sparse_product import PATHS, fastest, sparse_product
from bioadapt.methods.neuro_ada import strongest
from bioadapt.primitives.base import Context, Host
from bioadapt.tuner.selection import select_synapses

SEEDS = range(3)
N, M = 29, 37


def dense(v: Tensor, index: Tensor, values: Tensor) -> Tensor:
    matrix = torch.zeros(index.shape[0], v.shape[-1], dtype=v.dtype).scatter(1, index.long(), values.to(v.dtype))
    return v @ matrix.T


def module_on(weight: Tensor | None, seed: int = 0, **settings):
    n, m = (N, M) if weight is None else (weight.shape[1], weight.shape[0])
    return build_primitive("neuro_ada", n, m, host=Host(weight, seed), **settings)


# -- which synapses --


@pytest.mark.parametrize("seed", SEEDS)
class TestSelection:
    @pytest.fixture
    def weight(self, seed):
        torch.manual_seed(seed)
        return torch.randn(M, N)

    @pytest.mark.parametrize("k", [1, 4, 20, N])
    def test_change_has_k_entries_per_row_at_the_largest_magnitudes(self, weight, k):
        module = module_on(weight, k=k)
        module.wake()
        change, bias = module.weight_delta(weight, None)
        assert bias is None
        chosen = change != 0
        assert (chosen.sum(1) == k).all()  # which also excludes a column that was taken twice
        unchosen = weight.abs().masked_fill(chosen, -1.0).amax(1)
        assert (weight.abs().masked_fill(~chosen, torch.inf).amin(1) >= unchosen).all()
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, module.index.long(), True))

    @pytest.mark.parametrize("selection", ["magnitude", "random", "reverse"])
    def test_few_are_the_first_of_many(self, weight, selection):
        many = module_on(weight, k=20, selection=selection).index
        for k in (1, 4, 19):
            assert torch.equal(module_on(weight, k=k, selection=selection).index, many[:, :k])

    def test_best_come_first(self, weight):
        magnitudes = weight.abs().gather(1, module_on(weight, k=20).index.long())
        assert (magnitudes.diff(dim=1) <= 0).all()

    def test_ties_go_to_the_lower_column(self, weight):
        weight = weight.sign() * (1 + torch.arange(N) // 10)
        assert module_on(weight, k=12).index.tolist() == [[*range(20, 29), 10, 11, 12]] * M

    def test_smallest_and_random(self, seed, weight):
        least = module_on(weight, k=3, selection="reverse").index
        assert torch.equal(least.long(), weight.abs().sort(1).indices[:, :3])
        drawn = [module_on(weight, s, k=5, selection="random").index for s in (seed, seed, seed + 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert all(len(set(row)) == 5 for row in drawn[0].tolist())

    def test_a_layer_without_weight_gets_a_fixed_choice(self, seed):
        first, second = (module_on(None, seed).index for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == (M, 8) and first.dtype == torch.int32

    def test_some_rows(self, seed, weight):
        few, more = (module_on(weight, seed, row_fraction=fraction, k=3) for fraction in (0.25, 0.5))
        assert few.values.shape == (9, 3) and more.values.shape == (18, 3)
        assert set(few.rows.tolist()) < set(more.rows.tolist())
        assert few.rows.tolist() != module_on(weight, seed + 1, row_fraction=0.25, k=3).rows.tolist()
        assert torch.equal(few.index, module_on(weight, k=3).index[few.rows])
        assert module_on(weight, row_fraction=1e-6).values.shape == (1, 8)
        few.wake()
        x, v = torch.zeros(2, 5, M), torch.randn(2, 5, N)
        delta, change = few(x, Context(x_in=v)), few.weight_delta(weight, None)[0]
        assert set(change.count_nonzero(1).nonzero()[:, 0].tolist()) == set(few.rows.tolist())
        torch.testing.assert_close(delta, v @ change.T)


def test_rows_that_are_no_numbers_are_chosen_last():
    score = torch.tensor([[1.0, torch.nan, 3.0, -torch.inf, torch.inf]])
    assert strongest(score, 5).tolist() == [[4, 2, 0, 1, 3]]


def test_pieces_find_the_same(monkeypatch):
    score = torch.randn(M, N).round(decimals=1)
    whole = strongest(score, 7)
    monkeypatch.setattr(_sparse_product, "BYTES", 8 * N * 5)
    assert torch.equal(strongest(score, 7), whole)


def test_training_leaves_base_and_choice_alone():
    torch.manual_seed(0)
    weight = torch.randn(M, N)
    module = module_on(weight)
    before, index = weight.clone(), module.index.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(torch.zeros(2, 5, M), Context(x_in=torch.randn(2, 5, N))) - torch.randn(2, 5, M)).square().sum().backward()
    optimizer.step()
    assert torch.equal(weight, before) and not weight.requires_grad
    assert torch.equal(module.index, index)
    assert (module.values != 0).all()
    assert [name for name, _ in module.named_parameters()] == ["values"]
    assert module.values.numel() == 8 * M


# -- the product --


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (2, 0), (3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 4, 20, N])
def test_product_and_gradients_equal_the_dense_ones(shape, k, dtype, tolerance, path):
    torch.manual_seed(0)
    index = strongest(torch.randn(M, N).abs(), k)
    values = torch.randn(M, k, dtype=dtype, requires_grad=True)
    v, weight = torch.randn(*shape, N, dtype=dtype, requires_grad=True), torch.randn(*shape, M, dtype=dtype)
    results = []
    for z in (sparse_product(v, index, values, path=path), dense(v, index, values)):
        results.append((z, *torch.autograd.grad((z * weight).sum(), (v, values))))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("path", PATHS)
def test_pieces_add_up(path, monkeypatch):
    """Pieces of a token, and of a row, that do not divide the whole."""
    torch.manual_seed(0)
    index = strongest(torch.randn(M, N), 5)
    v = torch.randn(11, N, dtype=torch.float64, requires_grad=True)
    values = torch.randn(M, 5, dtype=torch.float64, requires_grad=True)
    whole, weight = dense(v, index, values), torch.randn(11, M, dtype=torch.float64)
    expected = torch.autograd.grad((whole * weight).sum(), (v, values))
    for size in (1, 8 * N * 3):
        monkeypatch.setattr(_sparse_product, "BYTES", size)
        found = sparse_product(v, index, values, path=path)
        torch.testing.assert_close(found, whole)
        for a, b in zip(torch.autograd.grad((found * weight).sum(), (v, values)), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_is_that_of_the_product(path):
    torch.manual_seed(0)
    index = strongest(torch.randn(5, 4), 2)
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, values: sparse_product(v, index, values, path=path), (v, values))


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_is_kept_as_it_came_and_summed_in_fp32(path):
    torch.manual_seed(0)
    index, values = strongest(torch.randn(M, N), 20), torch.randn(M, 20, requires_grad=True)
    v, weight = torch.randn(2, 9, N).bfloat16().requires_grad_(), torch.randn(2, 9, M).bfloat16()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = sparse_product(v, index, values, path=path)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (v, index, values)]
    on_v, on_values = torch.autograd.grad((z * weight).sum(), (v, values))
    assert (z.dtype, on_v.dtype, on_values.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = v.detach().float().requires_grad_()
    exact = dense(wide, index, values)
    expected_v, expected_values = torch.autograd.grad((exact * weight).sum(), (wide, values))
    assert (z.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (on_v.float() - expected_v).abs().max() <= 2**-8 * expected_v.abs().max()
    torch.testing.assert_close(on_values, expected_values, rtol=1e-5, atol=1e-4)


def test_the_result_may_be_wider_than_the_input():
    index, values = strongest(torch.randn(M, N), 4), torch.randn(M, 4)
    v = torch.randn(3, N).bfloat16()
    z = sparse_product(v, index, values, torch.float32)
    torch.testing.assert_close(z, dense(v.float(), index, values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (1, 1), (2, 3, 4), (64,)], ids=str)
@pytest.mark.parametrize("k", [1, 8, N])
def test_decoding_gives_what_the_full_forward_gives(shape, k, dtype, monkeypatch):
    """Where nothing is recorded, few tokens are read for all synapses in one go, and many are not."""
    torch.manual_seed(0)
    monkeypatch.setattr(_sparse_product, "AT_ONCE", 24 * M * 8)
    index, values = strongest(torch.randn(M, N), k), torch.randn(M, k, requires_grad=True)
    v = torch.randn(*shape, N, dtype=dtype)
    recorded = sparse_product(v, index, values)
    with torch.no_grad():
        silent = sparse_product(v, index, values)
    assert silent.dtype == dtype and silent.shape == recorded.shape
    torch.testing.assert_close(silent, recorded)


def test_a_token_is_read_at_once_and_a_prompt_is_not(monkeypatch):
    index, values = strongest(torch.randn(M, N), 4), torch.randn(M, 4)
    asked = []
    monkeypatch.setattr(_sparse_product, "_at_once", lambda v, *rest: asked.append(len(v)) or v.new_zeros(len(v), M))
    monkeypatch.setattr(_sparse_product, "AT_ONCE", 3 * M * 4)
    with torch.no_grad():
        for tokens in (1, 3, 4):
            sparse_product(torch.randn(tokens, N), index, values)
    sparse_product(torch.randn(1, N, requires_grad=True), index, values)
    assert asked == [1, 3]


def test_paths_by_size():
    cpu, gpu, other = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert [fastest(4096, k, cpu) for k in (1, 2, 8, 512, 513)] == ["gather", "bags", "bags", "bags", "scratch"]
    assert [fastest(4096, k, gpu) for k in (1, 2, 8, 256, 257)] == ["gather", "gather", "csr", "csr", "scratch"]
    assert [fastest(4096, k, other) for k in (1, 8, 32, 33)] == ["gather", "gather", "gather", "scratch"]


def test_the_order_of_columns_follows_the_index():
    """Backward reads the synapses column by column; the order is kept while the index stays as it is, and no longer."""
    torch.manual_seed(0)
    module = module_on(torch.randn(M, N), k=3)
    assert fastest(N, 3, torch.device("cpu")) == "bags"
    with torch.no_grad():
        module.values.normal_()
    first = module._order()
    assert module._order() is first
    loaded, chosen = copy.deepcopy(module), copy.deepcopy(module)
    loaded.load_state_dict({**module.state_dict(), "index": strongest(torch.randn(M, N), 3)})
    chosen.index = strongest(torch.randn(M, N), 3)
    for changed in (module, loaded, chosen):
        v = torch.randn(4, 6, N, requires_grad=True)
        z = changed(torch.zeros(4, 6, M), Context(x_in=v))
        expected = dense(v, changed.index, changed.values)
        grads = [torch.autograd.grad(out.square().sum(), v)[0] for out in (z, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_layer_in_double_precision_is_merged_in_double_precision():
    torch.manual_seed(0)
    module = module_on(torch.randn(M, N)).double()
    with torch.no_grad():
        module.values.normal_()
    change, _ = module.weight_delta(torch.randn(M, N, dtype=torch.float64), None)
    assert change.dtype == torch.float64
    assert torch.equal(change.gather(1, module.index.long()), module.values)


@pytest.mark.parametrize("k", [2, 20])
def test_one_graph_serves_any_number_of_tokens(k):
    """The second, which torch makes as soon as it sees that the number varies."""
    index = strongest(torch.randn(M, 256), k)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda v, values: sparse_product(v, index, values), backend=counting, fullgraph=True)
    torch._dynamo.reset()
    for length in (3, 5, 2, 11):
        v, values = torch.randn(2, length, 256), torch.randn(M, k, requires_grad=True)
        torch.testing.assert_close(compiled(v, values), dense(v, index, values), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2


class Allocations(TorchDispatchMode):
    """Bytes of the dense storages that calls bring about: all that live at a time, and the largest one."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, self.sizes[key])
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@pytest.fixture(scope="module")
def tall():
    torch.manual_seed(0)
    return torch.randn(2048, 1024)


@pytest.mark.parametrize(("path", "k"), [("gather", 2), ("bags", 8), ("csr", 8), ("scratch", 256)])
def test_no_second_matrix_is_made(tall, path, k):
    m, n = tall.shape
    index, values = strongest(tall.abs(), k), torch.randn(m, k, requires_grad=True)
    v = torch.randn(32, n, requires_grad=True)
    with Allocations(v, index, values) as seen:
        sparse_product(v, index, values, path=path).sum().backward()
    bound = max(4 * m * n / 8, 8 * m * k)  # a piece of the scratch, or one number of 64 bits for each value
    assert 0 < seen.largest <= bound
    if path != "scratch":
        assert seen.peak < 4 * m * n / 5


def test_a_layer_takes_a_fifth_of_the_memory_of_a_dense_change(tall):
    m, n = tall.shape
    layer = nn.Linear(n, m, bias=False)
    layer.weight.data = tall
    model = get_peft_model(
        Chain(lin=layer), BioConfig(primitives=[{"name": "neuro_ada", "k": 1}], target_modules=["lin"])
    )
    x = torch.randn(1, 16, n, requires_grad=True)
    index, values = bio_layers(model)[0].circuits["default"]["neuro_ada"].index, torch.zeros(m, 1, requires_grad=True)
    peaks = []
    for forward in (
        lambda: layer(x),
        lambda: model(x),
        lambda: x @ tall.scatter_add(1, index.long(), values).T,
    ):
        x.grad = values.grad = None
        with Allocations(x, tall, values, *model.parameters(), *model.buffers()) as seen:
            forward().sum().backward()
        peaks.append(seen.peak)
    base, ours, dense_form = peaks
    assert ours - base < (dense_form - base) / 5


def test_two_adapters_add_up():
    torch.manual_seed(0)
    weight, v, x = torch.randn(M, N), torch.randn(2, 5, N), torch.zeros(2, 5, M)
    one, two, both = (module_on(weight) for _ in range(3))
    one.wake(), two.wake()
    with torch.no_grad():
        both.values.copy_(one.values + two.values)
    context = Context(x_in=v)
    torch.testing.assert_close(one(x, context) + two(x, context), both(x, context))


# -- in models --


def adapted(base: nn.Module, targets="all-linear", **settings) -> PeftModel:
    fields = {"primitives": [{"name": "neuro_ada", "k": 3, **settings}], "target_modules": targets}
    return get_peft_model(base, BioConfig(**fields, init_weights=settings.get("selection") == "gradient")).eval()


@pytest.mark.parametrize("build", [bert, gpt2], ids=["linear", "gpt-2 conv1d"])
def test_life_in_a_model(build, tmp_path):
    inputs, base = tokens(), build()
    frozen, plain = digest(base.state_dict()), output(base, inputs)
    fresh = get_peft_model(base, BioConfig(primitives=["neuro_ada"], target_modules="all-linear"))
    assert torch.equal(output(fresh, inputs), plain)
    expected = sum(layer.site.d_out * min(8, layer.site.d_in) for layer in bio_layers(fresh))
    assert fresh.get_nb_trainable_parameters()[0] == expected
    step(fresh, inputs)
    trained = output(fresh, inputs)
    assert not close(trained, plain, 1e-3)
    weights = {name: tensor for name, tensor in fresh.state_dict().items() if "neuro_ada" not in name}
    bare = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in weights.items()}
    assert digest(bare) == frozen
    assert not any(layer.get_base_layer().weight.requires_grad for layer in bio_layers(fresh))
    assert all(layer.get_base_layer().weight.grad is None for layer in bio_layers(fresh))
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(output(loaded, inputs), trained)
    for ours, theirs in zip(bio_layers(fresh), bio_layers(loaded), strict=True):
        found, kept = (layer.circuits["default"]["neuro_ada"] for layer in (theirs, ours))
        assert torch.equal(found.index, kept.index) and torch.equal(found.values, kept.values)
        strong = ours.site.matrix(ours.get_base_layer().weight).abs()
        assert torch.equal(kept.index, strongest(strong, kept.k))
    before = digest(fresh.state_dict())
    fresh.merge_adapter()
    assert close(output(fresh, inputs), trained, 1e-4)
    changed = [layer.get_base_layer().weight for layer in bio_layers(fresh)]
    assert all(torch.isfinite(weight).all() for weight in changed) and digest(fresh.state_dict()) != before
    fresh.unmerge_adapter()
    assert digest(fresh.state_dict()) == before and torch.equal(output(fresh, inputs), trained)
    assert close(output(fresh.merge_and_unload(), inputs), trained, 1e-4)


def test_the_index_that_was_saved_holds_whatever_the_weights_say(tmp_path):
    model = adapted(bert())
    model.save_pretrained(tmp_path)
    other = bert()
    with torch.no_grad():  # as quantising does, on a larger scale
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loaded = PeftModel.from_pretrained(other, tmp_path)
    pairs = list(zip(bio_layers(loaded), bio_layers(model), strict=True))
    ours = [layer.circuits["default"]["neuro_ada"].index for layer, _ in pairs]
    assert all(
        torch.equal(index, layer.circuits["default"]["neuro_ada"].index)
        for index, (_, layer) in zip(ours, pairs, strict=True)
    )
    weights = [layer.site.matrix(layer.get_base_layer().weight).abs() for layer, _ in pairs]
    assert not all(torch.equal(index, strongest(weight, 3)) for index, weight in zip(ours, weights, strict=True))


def test_two_adapters_of_a_model_add_up_and_serve_a_mixed_batch():
    inputs = torch.randn(3, 5, N)
    torch.manual_seed(0)
    host = Chain(lin=nn.Linear(N, M))
    plain = output(host, inputs)
    model = adapted(host, ["lin"])
    first = output(model, inputs)
    model.add_adapter("other", BioConfig(primitives=["neuro_ada"], target_modules=["lin"], init_weights=False))
    model.set_adapter("other")
    second = output(model, inputs)
    model.base_model.set_adapter(["default", "other"])
    assert close(output(model, inputs) - plain, (first - plain) + (second - plain))
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    with torch.no_grad():
        mixed = model(inputs, adapter_names=["other", "__base__", "default"])
    for row, expected in enumerate((second, plain, first)):
        assert close(mixed[row], expected[row])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_over_a_lora_the_synapses_are_those_of_the_frozen_weight():
    inputs = tokens()
    lora = LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    under = get_peft_model(bert(), lora).eval()
    before = output(under, inputs)
    model = adapted(under, ["query", "value"])
    for layer in bio_layers(model):
        index = layer.circuits["default"]["neuro_ada"].index
        assert torch.equal(index, strongest(layer.get_base_layer().weight.abs(), 3))
    wanted = output(model, inputs)
    assert not close(wanted, before, 1e-3)
    model.merge_adapter()
    assert close(output(model, inputs), wanted, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), wanted)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("meta", ["adapter", "model"])
def test_injected_by_way_of_the_meta_device(meta):
    config = BioConfig(primitives=["neuro_ada"], target_modules=["query"])
    if meta == "model":
        with torch.device("meta"):
            base = bert()
    else:
        base = bert()
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    primitives = [layer.circuits["default"]["neuro_ada"] for layer in bio_layers(model)]
    assert all(primitive.values.is_meta and primitive.values.shape == (16, 8) for primitive in primitives)
    assert all(primitive.index.is_meta == (meta == "model") for primitive in primitives)


def test_half_precision_models_keep_fp32_values():
    x = torch.randn(2, 5, N).bfloat16()
    host = Chain(lin=nn.Linear(N, M)).bfloat16()
    model = adapted(host, ["lin"])
    assert {parameter.dtype for parameter in own_parameters(model).values()} == {torch.float32}
    kept: list[Tensor] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert not any(tensor.dtype == torch.float32 and tensor.shape[-1] == N for tensor in kept)  # no wider copy of x


# -- selection by gradient --

GRADIENT = {"selection": "gradient"}


def true_gradients(base: nn.Module, batches, loss) -> dict[str, Tensor]:
    """Of the weights themselves, summed over batches."""
    base = copy.deepcopy(base).eval().requires_grad_(True)
    for batch in batches:
        loss(base, batch).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in base.named_parameters() if name.endswith("weight")}


def labelled(batch: int, seed: int) -> dict[str, Tensor]:
    inputs = tokens(batch, seed=seed)
    return {**inputs, "labels": inputs["input_ids"]}


def synapses(model: PeftModel) -> dict[str, Tensor]:
    return {layer.path: layer.circuits["default"]["neuro_ada"].index for layer in bio_layers(model)}


def test_gradient_selection_is_that_of_the_summed_gradient():
    batches = [labelled(3, 1), labelled(2, 2)]
    base = gpt2()
    gradients = true_gradients(base, batches, lambda model, batch: model(**batch).loss)
    model = adapted(base, **GRADIENT)
    plain = output(model, tokens())
    assert torch.equal(plain, output(gpt2(), tokens()))  # before a choice it is the identity
    select_synapses(model, iter(batches))
    assert torch.equal(output(model, tokens()), plain)
    for layer in bio_layers(model):
        expected = gradients[layer.path].T if layer.site.weight == "columns" else gradients[layer.path]
        index = layer.circuits["default"]["neuro_ada"].index.long()
        strongest_found = expected.abs().gather(1, index)
        wanted = expected.abs().topk(3, 1).values
        torch.testing.assert_close(strongest_found, wanted, rtol=1e-4, atol=1e-7)
    step(model, tokens())
    assert not close(output(model, tokens()), plain, 1e-3)


def test_gradients_of_batches_are_summed_before_magnitudes_are_taken():
    """Two batches of opposite gradients cancel; a third, weaker one decides."""
    host = Chain(lin=nn.Linear(4, 2, bias=False))
    model = adapted(host, ["lin"], k=1, **GRADIENT)
    strong, weak = torch.tensor([[5.0, 0, 0, 0]]), torch.tensor([[0, 0, 1.0, 0]])
    batches = [(strong, 1.0), (strong, -1.0), (weak, 1.0)]
    select_synapses(model, batches, loss=lambda model, batch: (model(batch[0]) * batch[1]).sum())
    assert synapses(model)["lin"].tolist() == [[2], [2]]


@pytest.mark.parametrize("kind", ["pointwise convolution", "over a LoRA", "with other primitives", "row_fraction"])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_gradient_selection_elsewhere(kind):
    torch.manual_seed(0)
    settings = {"row_fraction": 0.5} if kind == "row_fraction" else {}
    if kind == "pointwise convolution":
        host, inputs = Chain(lin=nn.Conv2d(N, M, 1), out=nn.Conv2d(M, 2, 1)), torch.randn(2, N, 3, 4)
    else:
        host, inputs = Chain(lin=nn.Linear(N, M), out=nn.Linear(M, 2)), torch.randn(2, 5, N)

    def loss(model, batch):
        return model(batch).square().sum()

    if kind == "over a LoRA":
        host = get_peft_model(host, LoraConfig(target_modules=["lin"], r=2, init_lora_weights=False)).eval()
        gradients = true_gradients(host, [inputs], loss)
        expected = gradients["base_model.model.lin.base_layer"]
    else:
        expected = true_gradients(host, [inputs], loss)["lin"]
    entry = {"name": "neuro_ada", "k": 3, **GRADIENT, **settings}
    others = ["homeostatic_scaling"] if kind == "with other primitives" else []
    model = get_peft_model(host, BioConfig(primitives=[entry, *others], target_modules=["lin"]))
    select_synapses(model, [inputs], loss)
    primitive = bio_layers(model)[0].circuits["default"]["neuro_ada"]
    rows = torch.arange(M) if primitive.rows is None else primitive.rows
    assert torch.equal(primitive.index, strongest(expected.flatten(1).abs()[rows], 3))


def test_gradient_selection_of_a_quantised_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantised layers are those of bitsandbytes")
    torch.manual_seed(0)
    plain = Chain(lin=nn.Linear(64, 64), out=nn.Linear(64, 8))
    host = copy.deepcopy(plain)
    host.lin = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    host.lin.load_state_dict(plain.lin.state_dict())
    host.is_loaded_in_8bit = True
    host, inputs = host.to("cpu").eval(), torch.randn(4, 64)

    def loss(model, batch):
        return model(batch).square().sum()

    try:
        loss(host, inputs)
    except Exception as error:  # what bitsandbytes raises where it has no kernel is its own affair
        pytest.skip(f"bitsandbytes cannot run 8-bit layers here: {error}")
    model = adapted(host, ["lin"], **GRADIENT)
    select_synapses(model, [inputs], loss)
    exact = true_gradients(plain, [inputs], loss)["lin"].abs()
    found = exact.gather(1, synapses(model)["lin"].long()).sum(1)
    assert (found > 0.9 * exact.topk(3, 1).values.sum(1)).all()


def test_selection_leaves_everything_else_as_it_was():
    model = adapted(gpt2(), **GRADIENT)
    model.train()
    model.base_model.model.transformer.h[0].eval()  # modes need not be alike
    for parameter in own_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(layer.base_layer._forward_hooks) for layer in bio_layers(model)]
    others = digest({name: t for name, t in model.state_dict().items() if not name.endswith(("index", "chosen"))})

    def same() -> None:
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == needs
        assert [len(layer.base_layer._forward_hooks) for layer in bio_layers(model)] == hooks
        assert all((parameter.grad == 1).all() for parameter in own_parameters(model).values())
        assert all(layer.get_base_layer().weight.grad is None for layer in bio_layers(model))
        found = {name: t for name, t in model.state_dict().items() if not name.endswith(("index", "chosen"))}
        assert digest(found) == others

    def broken():
        yield labelled(2, 1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        select_synapses(model, broken())
    same()
    with pytest.raises(RuntimeError, match=r"transformer\.h\.0.*select_synapses"):
        model.train()(**tokens())
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    with torch.no_grad():
        select_synapses(model, [labelled(2, 1)])
    same()


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(ValueError, match="selection='gradient'"):
        select_synapses(adapted(bert()), [tokens()])
    model = adapted(gpt2(), **GRADIENT)
    with unchanged(model), pytest.raises(ValueError, match="batches is empty"):
        select_synapses(model, [])
    with unchanged(model), pytest.raises(ValueError, match="no loss.*labels"):
        select_synapses(model, [tokens()])
    with unchanged(model), pytest.raises(ValueError, match="no gradient has reached"):
        select_synapses(model, [tokens()], loss=lambda model, batch: torch.ones((), requires_grad=True).sum())
    model.add_adapter("other", BioConfig(primitives=["neuro_ada"], target_modules="all-linear"))
    model.set_adapter("other")
    with unchanged(model), pytest.raises(ValueError, match="active adapter"):
        select_synapses(model, [labelled(2, 1)])
    model.set_adapter("default")
    select_synapses(model, [labelled(2, 1)])
    step(model, tokens())
    with unchanged(model), pytest.raises(ValueError, match="have been trained"):
        select_synapses(model, [labelled(2, 1)])


def test_a_choice_is_saved_and_training_goes_on(tmp_path):
    model = adapted(gpt2(), **GRADIENT)
    with pytest.raises(RuntimeError, match="select_synapses"):
        step(model, tokens())
    model.save_pretrained(tmp_path / "before")
    select_synapses(model, [labelled(2, 1)])
    step(model, tokens())
    model.save_pretrained(tmp_path / "after")
    unchosen = PeftModel.from_pretrained(gpt2(), tmp_path / "before", is_trainable=True)
    with pytest.raises(RuntimeError, match="select_synapses"):
        step(unchosen, tokens())
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "after", is_trainable=True)
    assert {k: v.tolist() for k, v in synapses(loaded).items()} == {k: v.tolist() for k, v in synapses(model).items()}
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    step(loaded, tokens())
    assert not torch.equal(output(loaded, tokens()), output(model, tokens()))
