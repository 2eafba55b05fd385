"""san_scaling: which gain reaches which layer, against the weight form, and its life in models."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from helpers.models import Chain, bert, bio_layers, close, digest, gpt2, output, own_parameters, step, tokens, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from bioadapt import BioConfig, build_primitive
from bioadapt.methods._wiring import RESIDUAL, anterior_of

WIRED = {"lin1": "lin0", "out": "lin1"}


def gain(layer) -> Tensor:
    return 1 + layer.circuits["default"]["san_scaling"].theta


def anteriors(model: nn.Module, adapter: str = "default") -> dict[str, str]:
    """The anterior's path of each wired layer, found by the object itself."""
    primitives = {layer.path: layer.circuits[adapter]["san_scaling"] for layer in bio_layers(model)}
    paths = {id(primitive): path for path, primitive in primitives.items()}
    return {path: paths[id(primitive.anterior[0])] for path, primitive in primitives.items() if primitive.anterior}


def adapted(base: nn.Module, targets: Any = "all-linear", awake: bool = True, **settings: Any) -> PeftModel:
    fields = {"primitives": [{"name": "san_scaling", "zero_scale": 1.0, **settings}], "target_modules": targets}
    return get_peft_model(base, BioConfig(**fields, init_weights=not awake)).eval()


def chain(bias: bool = True, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain(lin0=nn.Linear(5, 7, bias=bias), lin1=nn.Linear(7, 6, bias=bias), out=nn.Linear(6, 3, bias=bias))


def wired(bias: bool = True, seed: int = 0, **settings: Any) -> PeftModel:
    """A chain in fp64 in which each layer reads the gain of the one before."""
    return adapted(chain(bias, seed).double(), ["lin0", "lin1", "out"], wiring=WIRED, **settings).double()


# -- the bare module --


def test_bare_it_scales_and_shifts():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    plain, shifted = (build_primitive("san_scaling", 5, 8, beta=beta) for beta in (False, True))
    for module in (plain, shifted):
        assert torch.equal(x + module(x), x)
        module.wake()
    assert [name for name, _ in plain.named_parameters()] == ["theta"] and plain.theta.shape == (8,)
    torch.testing.assert_close(x + plain(x), (1 + plain.theta) * x)
    torch.testing.assert_close(x + shifted(x), (1 + shifted.theta) * x + shifted.shift)
    silent = build_primitive("san_scaling", 5, 8, mode="sp")
    silent.wake()
    assert torch.equal(silent(x), torch.zeros_like(x))
    assert not plain.scales_input and not silent.scales_input


def test_half_precision_features_are_kept_as_they_came():
    module = build_primitive("san_scaling", 8, 8)
    module.wake()
    x, kept = torch.randn(2, 3, 8).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta = module(x)
    assert delta.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in kept if tensor.dim() == 3} == {torch.bfloat16}
    torch.testing.assert_close(delta, (module.theta * x.float()).bfloat16())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": True, "mode": "sp"}, "'beta'.*mode='sp'"),
        ({"wiring": "all"}, "'residual', 'official_vit', or a dict"),
        ({"wiring": {"a": 1}}, "a dict of strings"),
        ({"wiring": {"lin(": "a"}}, "'lin\\('.*expression"),
        ({"wiring": {"lin1": r"lin\1"}}, "expression"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build_primitive("san_scaling", 5, 8, **settings)


# -- wiring --

BLOCK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT, IMAGE = {**BLOCK, "vocab_size": 30}, {**BLOCK, "image_size": 16, "patch_size": 4}


def transformer(blocks: str, reads: list[str], attends: str, grows: list[str], shrinks: str, number: int = 2):
    """The edges of a stack of blocks; what is last in ``grows`` is what ``shrinks`` reads."""
    edges = {}
    for b in range(number):
        here = f"{blocks}.{b}."
        edges |= {f"{here}{name}": f"{blocks}.{b - 1}.{shrinks}" for name in reads if b}
        edges |= {f"{here}{name}": here + attends for name in grows}
        edges[here + shrinks] = here + grows[-1]
    return edges


_QKV = ["q_proj", "k_proj", "v_proj"]
_BERT = transformer(
    "encoder.layer",
    [f"attention.self.{name}" for name in ("query", "key", "value")],
    "attention.output.dense",
    ["intermediate.dense"],
    "output.dense",
)
_DECODER = transformer(
    "layers", [f"self_attn.{p}" for p in _QKV], "self_attn.o_proj", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"
)
_TOWER = (
    [f"self_attn.{p}" for p in _QKV],
    "self_attn.out_proj",
    ["mlp.fc1"],
    "mlp.fc2",
)
_VISION = ([f"attention.{p}" for p in _QKV], "attention.o_proj", ["mlp.fc1"], "mlp.fc2")
GROUPED = {**TEXT, "num_key_value_heads": 2}
EDGES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "bert": ("BertConfig", TEXT, _BERT),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30},
        transformer("h", ["attn.c_attn"], "attn.c_proj", ["mlp.c_fc"], "mlp.c_proj"),
    ),
    "llama": ("LlamaConfig", GROUPED, _DECODER),
    "qwen2": ("Qwen2Config", GROUPED, _DECODER),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, _DECODER),
    "mistral": ("MistralConfig", GROUPED, _DECODER),
    "phi3": (
        "Phi3Config",
        {**TEXT, "pad_token_id": 0},
        {
            "layers.1.self_attn.qkv_proj": "layers.0.mlp.down_proj",
            **{f"layers.{b}.mlp.gate_up_proj": f"layers.{b}.self_attn.o_proj" for b in range(2)},
        },
    ),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 30},
        transformer(
            "transformer.layer",
            [f"attention.{p}_lin" for p in "qkv"],
            "attention.out_lin",
            ["ffn.lin1"],
            "ffn.lin2",
        ),
    ),
    "mpnet": (
        "MPNetConfig",
        TEXT,
        transformer(
            "encoder.layer",
            [f"attention.attn.{p}" for p in "qkv"],
            "attention.attn.o",
            ["intermediate.dense"],
            "output.dense",
        ),
    ),
    "vit": ("ViTConfig", IMAGE, transformer("layers", *_VISION)),
    "dinov2": ("Dinov2Config", {**IMAGE, "patch_size": 8}, transformer("encoder.layer", *_VISION)),
    "clip": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
        transformer("text_model.encoder.layers", *_TOWER) | transformer("vision_model.encoder.layers", *_TOWER),
    ),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
        transformer("encoder.layers.0.blocks", *_VISION)
        | transformer("encoder.layers.1.blocks", *_VISION)
        | {f"encoder.layers.1.blocks.0.attention.{p}": "encoder.layers.0.downsample.reduction" for p in _QKV},
    ),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
        {
            **{f"encoder.stages.{s}.layers.1.pwconv1": f"encoder.stages.{s}.layers.0.pwconv2" for s in range(2)},
            **{
                f"encoder.stages.{s}.layers.{b}.pwconv2": f"encoder.stages.{s}.layers.{b}.pwconv1"
                for s in range(2)
                for b in range(2)
            },
            "encoder.stages.1.layers.0.pwconv1": "encoder.stages.1.downsampling_layer.1",
        },
    ),
}


def meta_model(name: str) -> nn.Module:
    configuration, arguments, _ = EDGES[name]
    with torch.device("meta"):
        return AutoModel.from_config(getattr(transformers, configuration)(**arguments))


@pytest.mark.parametrize("name", EDGES)
def test_edges_join_equal_channels_of_neighbours(name):
    """Read from the names and sizes of a real model, of which no number is needed."""
    sizes = {}
    for path, module in meta_model(name).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            d_out, d_in = module.weight.shape[:2]
            sizes[path] = (d_in, d_out)
        elif isinstance(module, Conv1D):
            sizes[path] = tuple(module.weight.shape)
    widths = {path: d_out for path, (_, d_out) in sizes.items()}
    kind = EDGES[name][0].removesuffix("Config")
    model_type = getattr(transformers, f"{kind}Config").model_type
    found = {path: anterior_of(path, d_in, widths, "residual", model_type) for path, (d_in, _) in sizes.items()}
    assert {path: anterior for path, anterior in found.items() if anterior} == EDGES[name][2]
    assert set(found) >= set(EDGES[name][2].values())


def test_edges_hold_under_whatever_prefix():
    widths = {"model.layers.3.mlp.down_proj": 8, "tower.layers.3.mlp.down_proj": 8}
    for top in ("model", "tower"):
        path = f"{top}.layers.4.self_attn.k_proj"
        assert anterior_of(path, 8, widths, "residual", "llama") == f"{top}.layers.3.mlp.down_proj"
    assert anterior_of("model.layers.5.self_attn.k_proj", 8, widths, "residual", "llama") is None
    assert anterior_of("model.layers.4.self_attn.k_proj", 9, widths, "residual", "llama") is None
    assert "t5" not in RESIDUAL and anterior_of("layers.4.self_attn.k_proj", 8, widths, "residual", "t5") is None


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_the_official_wiring_reads_the_patch_embedding_in_every_block(name):
    kind = {"vit": "ViT", "deit": "DeiT"}[name]
    config = getattr(transformers, f"{kind}Config")(**IMAGE)
    base = getattr(transformers, f"{kind}ForImageClassification")(config)
    targets = r".*(_proj|fc\d|patch_embeddings\.projection)"
    model = adapted(base, targets, wiring="official_vit")
    expected = {}
    for b in range(2):
        here = f"{name}.layers.{b}."
        expected |= {f"{here}attention.{p}": f"{name}.embeddings.patch_embeddings.projection" for p in _QKV}
        expected |= {f"{here}mlp.fc1": f"{here}attention.o_proj", f"{here}mlp.fc2": f"{here}mlp.fc1"}
    assert anteriors(model) == expected
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    wanted = output(model, images)
    assert close(output(model.merge_and_unload(), images), wanted, 1e-4)


@pytest.mark.parametrize("patch_gain", [True, False])
def test_in_the_official_wiring_the_patch_embedding_keeps_its_output_gain_in_every_mode(patch_gain):
    """Against weights and outputs that are scaled by hand, as the authors' program scales them."""
    base = transformers.ViTModel(transformers.ViTConfig(**IMAGE), add_pooling_layer=False).eval()
    targets = r".*(_proj|fc\d|patch_embeddings\.projection)"
    model = adapted(copy.deepcopy(base), targets, wiring="official_vit", mode="sp", patch_gain=patch_gain)
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    gains = {layer.path: gain(layer).detach() for layer in bio_layers(model)}
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        for path, before in anteriors(model).items():
            by_hand.get_submodule(path).weight.mul_(gains[before])
        patches = by_hand.embeddings.patch_embeddings.projection
        if patch_gain:
            own = gains["embeddings.patch_embeddings.projection"]
            patches.weight.mul_(own[:, None, None, None])
            patches.bias.mul_(own)
    expected = output(by_hand, images)
    assert not close(output(base, images), expected, 1e-3)
    assert close(output(model, images), expected, 1e-4)
    assert close(output(model.merge_and_unload(), images), expected, 1e-4)


@pytest.mark.parametrize("build", [bert, gpt2], ids=["bert", "gpt2"])
def test_adapters_are_wired_by_object_and_unconnected_layers_are_not(build):
    model = adapted(build())
    found = anteriors(model)
    expected = EDGES["bert"][2] if build is bert else EDGES["gpt2"][2]
    prefix = "" if build is bert else "transformer."
    assert found == {prefix + path: prefix + anterior for path, anterior in expected.items()}
    assert anteriors(adapted(build(), mode="nt")) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "plain output scaling.*'custom'"), ({"mode": "sp"}, "nothing"), ({"wiring": {"out": "lin7"}}, "no adapted")],
)
def test_one_warning_where_nothing_propagates(settings, words):
    with pytest.warns(UserWarning, match=words) as caught:
        model = adapted(chain(), ["lin0", "lin1", "out"], **settings)
    assert len([w for w in caught if "san_scaling" in str(w.message)]) == 1
    assert anteriors(model) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(chain(), ["lin0", "lin1", "out"], mode="nt")
        adapted(chain(), ["lin0", "lin1", "out"], wiring={"out": "lin1"})


def test_a_layer_whose_anterior_is_not_adapted_reads_its_input_as_it_is():
    targets = ["query", "intermediate.dense", "layer.1.output.dense"]
    model = adapted(bert(), targets)
    assert anteriors(model) == {"encoder.layer.1.output.dense": "encoder.layer.1.intermediate.dense"}
    query = next(layer for layer in bio_layers(model) if layer.path == "encoder.layer.1.attention.self.query")
    read = torch.randn(2, 3, 16)
    torch.testing.assert_close(query(read), gain(query) * query.base_layer(read))


def test_expressions_may_repeat_groups():
    blocks = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4)}) for _ in range(11)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            for block in self.blocks:
                x = x + block["fc2"](torch.relu(block["fc1"](x)))
            return x

    model = adapted(Net(), ["fc1", "fc2"], wiring={r"(\w+)\.(\d+)\.fc2": r"\1\.\2\.fc1"})
    assert anteriors(model) == {f"blocks.{b}.fc2": f"blocks.{b}.fc1" for b in range(11)}


@pytest.mark.parametrize(
    ("wiring", "words"),
    [
        ({"out": "lin0"}, r"lin0.*out.*7 channels.*reads 6"),
        ({"out": "lin[01]"}, "out more than one anterior layer: lin0, lin1"),
        ({"out": "lin1", "o.*": "lin0"}, "out more than one"),
    ],
)
def test_wiring_that_cannot_be_is_refused(wiring, words):
    base = chain()
    with unchanged(base), pytest.raises(ValueError, match=words):
        adapted(base, ["lin0", "lin1", "out"], wiring=wiring)


# -- the weight form --


def weight_form(model: PeftModel, x: Tensor, mode: str = "both", cut: str = "") -> Tensor:
    """What the chain computes, from scaled weights. ``cut``: which part of the gains' gradient is left out."""
    before = None
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1, model.base_model.model.out):
        base, own = layer.get_base_layer(), gain(layer)
        weight = base.weight
        if before is not None and mode != "nt":
            weight = weight * (before.detach() if cut == "propagated" else before)
        x = linear(x, weight, base.bias)
        if mode != "sp":
            x = x * (own.detach() if cut == "outer" else own)
        shift = layer.circuits["default"]["san_scaling"].shift
        x = x if shift is None else x + shift
        x = x if layer.path == "out" else torch.tanh(x)
        before = own
    return x


def thetas(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in own_parameters(model).items() if name.endswith("theta")]


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "nt"}, {"mode": "sp"}, {"beta": True}, {"propagate_detached": True}],
    ids=["both", "nt", "sp", "beta", "detached"],
)
def test_outputs_and_gradients_are_those_of_the_weight_form(settings, bias):
    model, x = wired(bias, **settings), torch.randn(4, 5, dtype=torch.float64)
    mode = settings.get("mode", "both")
    weights = torch.randn(4, 3, dtype=torch.float64)
    found, expected = model(x), weight_form(model, x, mode)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    cut = "propagated" if "propagate_detached" in settings else ""
    parameters = list(own_parameters(model).values())
    pairs = zip(
        gradients((found * weights).sum(), parameters),
        gradients((weight_form(model, x, mode, cut) * weights).sum(), parameters),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_an_outer_and_a_propagated_part():
    model, x = wired(), torch.randn(4, 5, dtype=torch.float64)
    whole = gradients(model(x).square().sum(), thetas(model))
    parts = [gradients(weight_form(model, x, cut=cut).square().sum(), thetas(model)) for cut in ("outer", "propagated")]
    for both, propagated, outer in zip(whole, *parts, strict=True):
        torch.testing.assert_close(both, outer + propagated, rtol=1e-10, atol=1e-10)
    assert [bool(propagated.any()) for propagated in parts[0]] == [True, True, False]  # nothing reads the last gain
    assert all(outer.any() for outer in parts[1])


def test_on_an_exact_channel_path_the_gain_is_squared():
    """Up and down projection with a product per channel between them: no norm, addition or nonlinearity."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    base, x = Gated().double(), torch.randn(3, 4, dtype=torch.float64)
    twin = copy.deepcopy(base)
    propagating = adapted(base, ["up_proj"], awake=False, mode="nt").double()
    both = adapted(twin, ["up_proj", "down_proj"], wiring={"down_proj": "up_proj"}, awake=False).double()
    theta = 0.3 * torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        both.base_model.model.up_proj.circuits["default"]["san_scaling"].theta.copy_(theta)
        propagating.base_model.model.up_proj.circuits["default"]["san_scaling"].theta.copy_((1 + theta) ** 2 - 1)
    torch.testing.assert_close(both(x), propagating(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_kernels_are_scaled_along_their_input_channels(bias, stride):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 1, bias=bias), nn.Conv2d(4, 5, 3, stride, padding=1, bias=bias)
    base, x = Chain(lin0=first, lin1=second).double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    model = adapted(base, ["lin0", "lin1"], wiring=WIRED).double()
    gamma0, gamma1 = (gain(layer) for layer in bio_layers(model))
    h = torch.tanh(conv2d(x, first.weight * gamma0[:, None, None, None], None if not bias else gamma0 * first.bias))
    kernel = second.weight * gamma0[None, :, None, None] * gamma1[:, None, None, None]
    expected = conv2d(h, kernel, None if not bias else gamma1 * second.bias, stride, padding=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    before = digest(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(second.weight.data, kernel.detach(), rtol=1e-6, atol=1e-6)  # merged in fp32
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert digest(model.state_dict()) == before


# -- merging --


@pytest.mark.parametrize(
    ("settings", "bias"),
    [({}, True), ({}, False), ({"mode": "nt"}, False), ({"mode": "sp"}, True), ({"beta": True}, True)],
    ids=str,
)
def test_the_merged_change_is_exact(settings, bias):
    """In fp64, with gains that the tuner's fp32 holds exactly; each layer by itself."""
    model, x = wired(bias, **settings), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.copy_((parameter * 1024).round() / 1024)
    expected = model(x)
    for layer in bio_layers(model):
        base = layer.get_base_layer()
        weight, shift = layer.circuits["default"].merged_change(base.weight.detach(), base.bias)
        base.weight.data = base.weight.data + weight
        if bias:
            base.bias.data = base.bias.data + shift
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [bert, gpt2], ids=["linear", "gpt-2 conv1d"])
def test_life_in_a_model(build, tmp_path):
    inputs, base = tokens(), build()
    frozen, plain = digest(base.state_dict()), output(base, inputs)
    model = adapted(base, awake=False)
    assert torch.equal(output(model, inputs), plain)
    sizes = {layer.path: layer.site.d_out for layer in bio_layers(model)}
    assert model.get_nb_trainable_parameters()[0] == sum(sizes.values())
    step(model, inputs, rate=1.0)
    trained = output(model, inputs)
    assert not close(trained, plain, 1e-3)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "san_scaling" not in name}
    assert (
        digest({n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in weights.items()})
        == frozen
    )
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tuple(tensor.shape) for tensor in saved.values()) == sorted((size,) for size in sizes.values())
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert anteriors(loaded) == anteriors(model) != {}
    assert torch.equal(output(loaded, inputs), trained)
    before = digest(model.state_dict())
    model.merge_adapter()
    assert close(output(model, inputs), trained, 1e-4)
    model.unmerge_adapter()
    assert digest(model.state_dict()) == before and torch.equal(output(model, inputs), trained)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    assert close(output(model.merge_and_unload(), inputs), trained, 1e-4)


def test_a_shift_without_a_bias_is_not_merged():
    model = wired(bias=False, beta=True)
    with unchanged(model), pytest.raises(ValueError, match=r"beta=True shifts the output of lin0.*no bias"):
        model.merge_adapter()


def test_a_tall_layer_is_never_copied():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                    self.numel = max(self.numel, tensor.numel())
            return result

    base = Chain(lin0=nn.Linear(16, 512), lin1=nn.Linear(512, 2048))
    model, x = adapted(base, ["lin0", "lin1"], wiring=WIRED), torch.randn(8, 16, requires_grad=True)
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with Largest() as seen:
        model(x).square().sum().backward()
    assert all(theta.grad.any() for theta in thetas(model))
    assert seen.numel == 8 * 2048


# -- links between layers --


def test_both_effects_come_and_go_together():
    model, x = wired(), torch.randn(4, 5, dtype=torch.float64)
    lin0, lin1, _ = bio_layers(model)
    read = torch.randn(4, 7, dtype=torch.float64)
    before = lin1(read)
    with torch.no_grad():
        lin0.circuits["default"]["san_scaling"].theta.add_(0.5)
    assert not close(lin1(read), before, 1e-3)  # another layer's gain reaches this one
    with model.disable_adapter():
        assert torch.equal(lin1(read), lin1.base_layer(read))
        assert torch.equal(model(x), output(chain().double(), x))


def test_every_adapter_has_links_of_its_own():
    model, x = wired(), torch.randn(3, 5, dtype=torch.float64)
    plain, first = output(chain().double(), x), output(model, x)
    second_config = BioConfig(
        primitives=[{"name": "san_scaling", "zero_scale": 1.0, "wiring": WIRED}],
        target_modules=["lin0", "lin1", "out"],
        init_weights=False,
    )
    model.add_adapter("other", second_config)
    model.double()
    model.set_adapter("other")
    second = output(model, x)
    assert anteriors(model) == anteriors(model, "other") == {"lin1": "lin0", "out": "lin1"}
    primitives = [layer.circuits for layer in bio_layers(model)]
    assert primitives[1]["default"]["san_scaling"].anterior[0] is primitives[0]["default"]["san_scaling"]
    assert primitives[1]["other"]["san_scaling"].anterior[0] is primitives[0]["other"]["san_scaling"]
    with torch.no_grad():
        mixed = model(x, adapter_names=["other", "__base__", "default"])
    for row, expected in enumerate((second, plain, first)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-10, atol=1e-10)
    model.base_model.set_adapter(["default", "other"])
    lin1, read = bio_layers(model)[1], torch.randn(3, 7, dtype=torch.float64)
    together = lin1(read)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(lin1(read) - lin1.base_layer(read))
    torch.testing.assert_close(together, lin1.base_layer(read) + alone[0] + alone[1], rtol=1e-10, atol=1e-10)
    model.delete_adapter("default")
    assert torch.equal(output(model, x), second)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_linked_within_itself(way):
    model = adapted(bert())
    other, inputs = way(model), tokens()
    before = output(model, inputs)
    assert torch.equal(output(other, inputs), before)
    assert anteriors(other) == anteriors(model)  # which are found among the copy's own
    with torch.no_grad():
        for parameter in own_parameters(other).values():
            parameter.add_(0.5)
    assert torch.equal(output(model, inputs), before)
    assert not close(output(other, inputs), before, 1e-3)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_over_a_lora_the_update_is_scaled_as_well():
    inputs = tokens()
    lora = LoraConfig(target_modules=["query", "intermediate.dense"], r=2, init_lora_weights=False)
    under = get_peft_model(bert(), lora).eval()
    before = output(under, inputs)
    model = adapted(under)
    assert anteriors(model) == EDGES["bert"][2]
    layer = next(layer for layer in bio_layers(model) if layer.path == "encoder.layer.1.attention.self.query")
    read = torch.randn(2, 3, 16)
    anterior = layer.circuits["default"]["san_scaling"].anterior[0]
    expected = gain(layer) * layer.base_layer((1 + anterior.theta) * read)
    torch.testing.assert_close(layer(read), expected)
    wanted = output(model, inputs)
    model.merge_adapter()
    assert close(output(model, inputs), wanted, 1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), before)


def test_a_quantised_layer_reads_its_input_scaled():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantised layers are those of bitsandbytes")
    torch.manual_seed(0)
    plain = Chain(lin0=nn.Linear(64, 64), lin1=nn.Linear(64, 64))
    base = copy.deepcopy(plain)
    base.lin1 = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    base.lin1.load_state_dict(plain.lin1.state_dict())
    base, x = base.to("cpu").eval(), torch.randn(2, 64)
    try:
        base(x)
    except Exception as error:  # what bitsandbytes raises where it has no kernel is its own affair
        pytest.skip(f"bitsandbytes cannot run 8-bit layers here: {error}")
    stored = base.lin1.weight.data.clone()
    model = adapted(base, ["lin0", "lin1"], wiring=WIRED)
    lin0, lin1 = bio_layers(model)
    read = torch.randn(3, 64)
    torch.testing.assert_close(lin1(read), gain(lin1) * lin1.base_layer(gain(lin0) * read))
    model(x).square().sum().backward()
    assert all(theta.grad.any() for theta in thetas(model))
    assert torch.equal(lin1.base_layer.weight.data, stored)


@pytest.mark.parametrize("kind", ["embedding", "layer norm"])
def test_any_layer_with_channels_is_scaled(kind):
    torch.manual_seed(0)
    first = nn.Embedding(9, 8) if kind == "embedding" else nn.LayerNorm(8)
    x = torch.randint(0, 9, (2, 5)) if kind == "embedding" else torch.randn(2, 5, 8)
    base = Chain(lin0=first, lin1=nn.Linear(8, 8), between=lambda h: h)
    model = adapted(base, ["lin0", "lin1"], wiring=WIRED)
    lin0, lin1 = bio_layers(model)
    expected = gain(lin1) * lin1.base_layer(gain(lin0) * (gain(lin0) * first(x)))
    torch.testing.assert_close(model(x), expected)
    if kind == "layer norm":
        with unchanged(model), pytest.raises(ValueError, match=r"lin0.*LayerNorm.*no matrix"):
            model.merge_adapter()
    else:
        assert close(output(model.merge_and_unload(), x), expected)


@pytest.mark.parametrize("mode", ["both", "nt", "sp"])
def test_every_gain_learns_from_the_first_step(mode):
    model, inputs = adapted(gpt2(), ["c_attn", "c_proj", "c_fc"], awake=False, mode=mode), tokens()
    before = [theta.detach().clone() for theta in thetas(model)]
    step(model, inputs, steps=1)
    read = set(anteriors(model).values())
    for layer, old in zip(bio_layers(model), before, strict=True):
        moved = bool((layer.circuits["default"]["san_scaling"].theta != old).any())
        assert moved == (mode != "sp" or layer.path in read)  # a gain that nobody reads has a gradient of zero
    assert all(theta.grad is not None for theta in thetas(model))


def test_an_embedding_cannot_read_a_scaled_input():
    """Its input is made of token ids."""
    model = bert()
    config = BioConfig(
        primitives=[{"name": "san_scaling", "wiring": {"word_embeddings": r"layer\.0\.output\.dense"}}],
        target_modules=["word_embeddings", "output.dense"],
    )
    with unchanged(model), pytest.raises(ValueError, match="word_embeddings .*not made of features"):
        get_peft_model(model, config)


def test_a_small_gain_propagates_in_half_precision():
    """A gain of 1.003 is 1 in bf16; its product with a feature often is another number."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()
    san = {"name": "san_scaling", "zero_scale": 1.0, "wiring": {"1": "0"}, "mode": "sp"}
    model = get_peft_model(base, BioConfig(primitives=[san], target_modules=["0", "1"])).eval()
    first, second = model.base_model.model[0], model.base_model.model[1]
    x = torch.randn(64, 16).bfloat16()
    with torch.no_grad():
        plain = second(x)
        first.circuits["default"]["san_scaling"].theta.fill_(3e-3)
        assert not torch.equal(second(x), plain)
