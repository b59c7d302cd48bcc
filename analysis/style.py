"""One name, colour, marker and line for each method, the same in every table and plot.

The colour says the family, marker and line the member: nobody tells twenty-five colours apart, and about one man in
twelve not even eight. Colours are from the palettes of Okabe and Ito (2008) and of Paul Tol (muted, 2021), both made
for colour-blind readers; black and greys are for what is no method under test. Lines of one family also differ in their
dashes, so that a print in black and white can be read.
"""

import hashlib
from dataclasses import dataclass, replace

__all__ = ["DASHED", "DOTTED", "METHODS", "SOLID", "Style", "name_of", "order_of", "style_of"]

BLACK, GREY = "#000000", "#777777"
VERMILLION, BLUE, GREEN, ORANGE, SKY, PURPLE = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INDIGO, WINE, OLIVE = "#332288", "#882255", "#999933"
SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2))


@dataclass(frozen=True)
class Style:
    """How a method looks.

    Attributes:
        name: As its paper writes it.
        colour: Of the family, ``#rrggbb``.
        marker: matplotlib's sign.
        line: matplotlib's line style.
        filled: Hollow markers are models that were masked again or lost zeros.
    """

    name: str
    colour: str
    marker: str
    line: str | tuple = SOLID
    filled: bool = True


# In the order of the rows of a table.
METHODS = {
    "dense": Style("dense", BLACK, "None", SOLID),
    "pruned": Style("pruned", GREY, "x", DASHED),
    "full": Style("full fine-tuning", BLACK, "s", DASH_DOT),
    "perp": Style("PERP", BLACK, "v", DOTTED),
    "reconstruct": Style("Reconstruction", BLACK, "D", DASHED),
    "reconstruct_lors": Style("Reconstruction, LoRS", VERMILLION, "D", DASHED),
    "lora": Style("LoRA", BLUE, "o"),
    "lors": Style("LoRS", VERMILLION, "*"),
    "lors_plus": Style("LoRS, sampled gradient", VERMILLION, "P", DASHED),
    "sqft": Style("SQFT", ORANGE, "^"),
    "sqft_fused": Style("SQFT, fused", ORANGE, "v", DASHED),
    "sqft_gc": Style("SQFT + GC", ORANGE, "<", DOTTED),
    "sqft_nls": Style("SQFT, NLS", ORANGE, ">", DASH_DOT),
    "spp": Style("SPP", GREEN, "D"),
    "spp_blockwise": Style("SPP, blockwise", GREEN, "d", DASHED),
    "spp_gc": Style("SPP + GC", GREEN, "P", DOTTED),
    # Rank found during training.
    "gelora": Style("GeLoRA", SKY, "s"),
    "geolora": Style("GeoLoRA", SKY, "p", DASHED),
    "sora": Style("SoRA", SKY, "h", DOTTED),
    "salr": Style("SALR", SKY, "*", DASH_DOT),
    "losa": Style("LoSA (prunes itself)", SKY, "<", DOTTED),
    # Another optimizer or penalty for the same factors.
    "lora_rite": Style("LoRA-RITE", PURPLE, ">"),
    "flat_lora": Style("Flat-LoRA", PURPLE, "X", DASHED),
    "rm_lora": Style("RM-LoRA", PURPLE, "o", DOTTED),
    # Other shapes of the update.
    "lora_mini": Style("LoRA-Mini", INDIGO, "v"),
    "mora": Style("MoRA", INDIGO, "s", DASHED),
    "xgblora": Style("XGBLoRA", INDIGO, "^", DOTTED),
    "sherl": Style("SHERL", INDIGO, "D", DASH_DOT),
    # A factor on each weight or row, or single weights.
    "hira": Style("HiRA", WINE, "<"),
    "ia3": Style("(IA)³", WINE, "P", DASHED),
    "scale_lora": Style("ScaleLoRA", WINE, "h", DOTTED),
    "shira": Style("SHiRA", OLIVE, "X"),
}
# What became of the adapter, where a method has more than one end.
END_STATES = {"adapter": "with adapter", "remasked": "re-masked", "dense": "zeros lost"}
_FAMILIES = (VERMILLION, BLUE, GREEN, ORANGE, SKY, PURPLE, INDIGO, WINE, OLIVE)
_FREE_MARKERS = ("8", "H", "$+$", "$a$", "$b$", "$c$")


def style_of(method: str, end_state: str | None = None) -> Style:
    """The style of a method, known or not, in one of its end states.

    A method that is not listed here gets a colour and one of the markers that no listed method has, from its name.
    """
    style = METHODS.get(method)
    if style is None:
        number = int(hashlib.sha256(method.encode()).hexdigest(), 16)
        colour, marker = _FAMILIES[number % len(_FAMILIES)], _FREE_MARKERS[number // 97 % len(_FREE_MARKERS)]
        style = Style(method, colour, marker, (SOLID, DASHED, DOTTED)[number // 9973 % 3])
    if end_state in END_STATES:
        line = {"adapter": style.line, "remasked": DASHED, "dense": DOTTED}[end_state]
        style = replace(style, name=f"{style.name}, {END_STATES[end_state]}", line=line, filled=end_state == "adapter")
    return style


def name_of(method: str, end_state: str | None = None) -> str:
    """The method's name for readers, with its end state where it has several."""
    return style_of(method, end_state).name


def order_of(method: str) -> tuple[int, str]:
    """Sorts methods as tables and legends list them; those not listed here come last, by name."""
    known = list(METHODS)
    return (known.index(method) if method in known else len(known), method)
