"""Which layer reads, channel by channel, what another layer wrote: along these edges a gain propagates.

An edge joins two layers only where the output channels of the one and the input channels of the other are the same
axis: the residual stream, which norms and additions leave in order, or the hidden units of an MLP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# The whole name of a posterior as an expression, and its anterior; {n-1} is one less than the group called n.
Rules = tuple[tuple[str, str], ...]
Table = Mapping[str, str]  # what a user gives

_STACK = r"(?P<stack>(?:.*\.)?)"
_PATCHES = "embeddings.patch_embeddings.projection"
_BERT_READS = r"(?:query|key|value)"


def _blocks(blocks: str, reads: str, attends: str, grows: str, shrinks: str, beside: str = "") -> Rules:
    """Transformer blocks in the list called ``blocks``.

    ``reads``: an expression for the projections at a block's entry; ``attends``: writes what attention has found;
    ``grows`` and ``shrinks``: the MLP's; ``beside``: what else reads the input of ``grows``.
    """
    block = rf"{_STACK}{blocks}\.(?P<block>\d+)\."
    here, before = f"{{stack}}{blocks}.{{block}}.", f"{{stack}}{blocks}.{{block-1}}."
    entry = re.escape(grows) + (f"|{beside}" if beside else "")
    return (
        (f"{block}(?:{reads})", before + shrinks),
        (f"{block}(?:{entry})", here + attends),
        (block + re.escape(shrinks), here + grows),
    )


_BERT = _blocks(
    "layer", rf"attention\.self\.{_BERT_READS}", "attention.output.dense", "intermediate.dense", "output.dense"
)
_MPNET = _blocks("layer", r"attention\.attn\.[qkv]", "attention.attn.o", "intermediate.dense", "output.dense")
_DISTILBERT = _blocks("layer", r"attention\.[qkv]_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
_GPT2 = _blocks("h", r"attn\.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_LLAMA = _blocks(
    "layers", r"self_attn\.[qkv]_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", beside=r"mlp\.gate_proj"
)
_PHI3 = _blocks("layers", r"self_attn\.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_CLIP = _blocks("layers", r"self_attn\.[qkv]_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
# Where transformers 5 renamed modules on the way, both names are listed.
_VIT = (
    *_blocks("layers", r"attention\.[qkv]_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    *_blocks("layer", r"attention\.[qkv]_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    *_blocks(
        "layer", rf"attention\.attention\.{_BERT_READS}", "attention.output.dense", "intermediate.dense", "output.dense"
    ),
)
_SWIN = (
    *_blocks("blocks", r"attention\.[qkv]_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    *_blocks(
        "blocks", rf"attention\.self\.{_BERT_READS}", "attention.output.dense", "intermediate.dense", "output.dense"
    ),
    # Each stage has a residual stream of its own width, which begins where neighbouring patches are merged.
    (
        rf"{_STACK}layers\.(?P<stage>\d+)\.blocks\.0\.attention\.(?:[qkv]_proj|self\.{_BERT_READS})",
        "{stack}layers.{stage-1}.downsample.reduction",
    ),
)
_CONVNEXT = (
    (rf"{_STACK}layers\.(?P<block>\d+)\.pwconv1", "{stack}layers.{block-1}.pwconv2"),
    (rf"{_STACK}stages\.(?P<stage>\d+)\.layers\.0\.pwconv1", "{stack}stages.{stage}.downsampling_layer.1"),
    (rf"{_STACK}layers\.(?P<block>\d+)\.pwconv2", "{stack}layers.{block}.pwconv1"),
)

RESIDUAL: Mapping[str, Rules] = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), _BERT),
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "gpt2": _GPT2,
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": _PHI3,
    **dict.fromkeys(("deit", "dinov2", "vit"), _VIT),
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model"), _CLIP),
    **dict.fromkeys(("siglip", "siglip_text_model", "siglip_vision_model"), _CLIP),
    "llava": _CLIP + _LLAMA,
    "swin": _SWIN,
    **dict.fromkeys(("convnext", "convnextv2"), _CONVNEXT),
}


def _official(rules: Rules) -> Rules:
    """As the authors' program has it: the entry of every block reads the gain of the patch embedding."""
    patches = "{stack}" + _PATCHES
    beside = r"(?P<stack>(?:.*?\.)??)(?:encoder\.)?"  # the blocks may lie in an encoder, the embeddings do not
    return tuple(
        (pattern.replace(_STACK, beside), patches) if "{block-1}" in template else (pattern, template)
        for pattern, template in rules
    )


def reads_pixels(path: str, wiring: str | Table) -> bool:
    """Whether the layer at ``path`` is the patch embedding that the official wiring starts from."""
    return wiring == "official_vit" and path.endswith(_PATCHES)


OFFICIAL_VIT: Mapping[str, Rules] = dict.fromkeys(("deit", "vit"), _official(_VIT))
TABLES = {"residual": RESIDUAL, "official_vit": OFFICIAL_VIT}


def check_expressions(table: Table) -> None:
    """Raise `ValueError` if a user's table holds what is no regular expression."""
    for posterior, anterior in table.items():
        try:
            groups = re.compile(posterior).groups
            re.compile(_filled(anterior, [""] * (groups + 1)))
        except (re.error, IndexError) as error:
            raise ValueError(
                f"wiring {{{posterior!r}: {anterior!r}}} is no pair of regular expressions: {error}"
            ) from None


def anterior_of(
    path: str, d_in: int, widths: Mapping[str, int], wiring: str | Table, model_type: str | None
) -> str | None:
    r"""The layer whose gain the layer at ``path`` reads its ``d_in`` inputs with, if any.

    Args:
        path: the posterior layer.
        d_in: number of its input channels.
        widths: the adapted layers, and the number of output channels of each.
        wiring: a key of `TABLES`, or a table of expressions of the user's. These hold from a dot to the end of a name,
            and the anterior's may name groups of the posterior's: ``{r"(\d+)\.fc2": r"\1\.fc1"}``.
        model_type: as transformers has it.

    Raises:
        ValueError: the user's table finds several layers, or one of another width.
    """
    if isinstance(wiring, str):
        rules = TABLES[wiring].get(model_type or "", ())
        return next((found for found in _listed(path, rules) if widths.get(found) == d_in), None)
    several = sorted({found for rule in wiring.items() for found in _expressed(path, *rule, widths)})
    if len(several) > 1:
        raise ValueError(f"wiring gives {path} more than one anterior layer: {', '.join(several)}")
    for found in several:
        if widths[found] != d_in:
            raise ValueError(
                f"wiring makes {found} the anterior layer of {path}, but the one writes {widths[found]} channels and "
                f"the other reads {d_in}"
            )
    return several[0] if several else None


def knows(wiring: str | Table, model_type: str | None) -> bool:
    """Whether there is a table for such a model."""
    return not isinstance(wiring, str) or model_type in TABLES[wiring]


def _listed(path: str, rules: Rules) -> list[str]:
    found = []
    for pattern, template in rules:
        if match := re.fullmatch(pattern, path):
            groups = {name: value or "" for name, value in match.groupdict().items()}
            before = {f"{name}-1": str(int(value) - 1) for name, value in groups.items() if value.isdecimal()}
            found.append(template.format_map(groups | before))
    return found


def _expressed(path: str, posterior: str, anterior: str, paths: Collection[str]) -> list[str]:
    match = re.fullmatch(rf"(?:.*\.)?(?:{posterior})", path)
    if match is None:
        return []
    groups = [re.escape(group or "") for group in (match[0], *match.groups())]
    wanted = re.compile(rf"(?:.*\.)?(?:{_filled(anterior, groups)})")
    return [other for other in paths if wanted.fullmatch(other)]


def _filled(expression: str, groups: list[str]) -> str:
    """The expression with what the groups of another one have matched in the place of their numbers."""
    return re.sub(r"\\([1-9]\d*)", lambda number: groups[int(number[1])], expression)
