"""The methods that LoRS is compared with, one file each; importing this registers those that are ours with PEFT.

LoRA, HiRA and (IA)^3 are PEFT's own and need no code. Of SHiRA only the choice of the entries is ours.
"""

from baselines import (  # noqa: F401  (for their registration)
    flat_lora,
    gelora,
    geolora,
    lora_mini,
    masked_lora,
    mora,
    rm_lora,
    scale_lora,
    sherl,
    sora,
    spp,
    sqft,
    xgblora,
)
