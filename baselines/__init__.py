"""The methods that LoRS is compared with, one file each; importing this registers SPP and SQFT with PEFT.

LoRA, HiRA and (IA)^3 are PEFT's own and need no code. Of SHiRA only the choice of the entries is ours.
"""

from baselines import spp, sqft  # noqa: F401  (for their registration)
