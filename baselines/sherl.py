"""SHERL (arXiv 2407.07523) for decoder-only language models, as a PEFT tuner: a side network before the last block.

The first N - L of N blocks run frozen and without a graph. A small module fuses their hidden states, per token, and its
output replaces the input of the last L blocks (1 by default), so gradients pass through those, a norm of their own and
the frozen head. With d the hidden size, h = d / reduction, features f_1 .. f_K (the embeddings, then the outputs of
chosen early blocks) and x the hidden state that is replaced:

    u = relu(W1 f + b1),   z = (W2 u + b2 + u) (.) sigmoid(W3 u + b3)               for each feature, W1 h x d
    q = z_K,   c_l = z_l / (|z_l| + eps),   R_l = sum_m relu(c_l . c_m)             l, m = 1 .. K - 1
    a_l = relu(v . (z_l (.) q) + c) / R_l,   alpha_l = a_l / (sum_m |a_m| + eps)
    g = sum_l alpha_l z_l + q,   out = W_o relu(g) + b_o + tanh(theta / 0.1) x

R_l lowers the weight of features that repeat each other. There is no delta W: nothing is merged, W stays as it is,
every forward pass costs K (d h + 2 h^2) + h d multiply-adds per token more. Under a key-value cache the last blocks
fill theirs from ``out``, as in training.

At the start theta = 0 takes x away, weights are N(0, 0.01^2), biases 0, and the side norm is 1: as published, another
function than the pruned model, which training has to find again.

The authors have no decoder-only model; which blocks are features here is our mapping.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from lors.blocks import decoder_blocks
from lors.checks import number, option, whole
from lors.functional import without_autocast
from lors.plugin import register
from lors.sparse_config import MethodConfig

__all__ = ["SherlBlock", "SherlConfig", "SherlModel", "SherlNorm", "aggregated"]

INIT_STD = 0.01
SHARPNESS = 0.1  # of the gate
EPSILON = 1e-6
# Up to so many blocks, every early one is a feature by default; above, every second.
DENSE_UP_TO = 16


@dataclass
class SherlConfig(MethodConfig):
    """Configuration of SHERL; a bad value raises ``ValueError``."""

    reduction: int = option(4, "d / h, how many times narrower the side network is.", whole(">= 1"))
    side_layers: list[int] | None = option(
        None,
        "Indices of the early blocks whose outputs are features, beside the embeddings. None: every one in a model of "
        "up to 16 blocks, else every second, the last early one always.",
    )
    late_layers: int = option(1, "L, frozen blocks at the end that gradients pass through.", whole(">= 1"))
    dropout: float = option(0.0, "Dropout after the side norm.", number(">= 0", "< 1"))
    target_modules: list[str] | None = option(
        None, "The block and the norm that are wrapped; found in the model, not to be set."
    )
    modules_to_save: list[str] | None = option(None, "Further modules to train in full and to save with the adapter.")

    def features(self, depth: int) -> list[int]:
        """Sorted indices of the early blocks whose outputs are features, in a model of ``depth`` blocks.

        Raises:
            ValueError: No block is early, or one that is named is not.
        """
        early = depth - self.late_layers
        if early < 1:
            raise ValueError(f"late_layers={self.late_layers}: must be below the {depth} blocks of the model")
        if self.side_layers is None:
            return list(range(early - 1, -1, -1 if depth <= DENSE_UP_TO else -2))[::-1]
        chosen = sorted(set(self.side_layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= early:
            raise ValueError(f"side_layers={self.side_layers}: must be indices from 0 to {early - 1}, the early blocks")
        return chosen


def aggregated(shallow: Tensor, q: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """g = sum_l alpha_l z_l + q, see the module's text.

    Args:
        shallow: z_1 .. z_(K-1), ``[..., K - 1, h]``.
        q: The deep feature z_K, ``[..., h]``.
        v: ``[h]``.
        c: ``[1]``.

    Returns:
        ``[..., h]``, in the type of the arguments.
    """
    unit = shallow / (shallow.norm(dim=-1, keepdim=True) + EPSILON)
    R = (unit @ unit.transpose(-1, -2)).relu().sum(dim=-1)  # [..., K - 1], at least about 1
    R = torch.where(R > 0, R, 1.0)  # but for a feature that is zero
    a = ((shallow * q.unsqueeze(-2)) @ v + c).relu() / R
    alpha = a / (a.abs().sum(dim=-1, keepdim=True) + EPSILON)
    return (alpha.unsqueeze(-1) * shallow).sum(dim=-2) + q


class SherlPart(nn.Module, BaseTunerLayer):
    """What the wrapped block and the wrapped norm share: one active adapter at most, and no merge."""

    other_param_names = ("options",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.options: dict[str, SherlConfig] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of a block (its kind of attention).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def adapter(self) -> str | None:
        """The adapter that is in force here; ``ValueError`` if there is more than one."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.options]
        if len(names) > 1:
            raise ValueError(f"adapter_names={names}: SHERL has one active adapter at a time, the side path is one")
        return names[0] if names else None


def _shapes(K: int, d: int, h: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a side network with K features of the width d and h inside."""
    return {
        "sherl_down_weight": (K, h, d),
        "sherl_down_bias": (K, h),
        "sherl_mix_weight": (K, h, h),
        "sherl_mix_bias": (K, h),
        "sherl_gate_weight": (K, h, h),
        "sherl_gate_bias": (K, h),
        "sherl_score_weight": (h,),
        "sherl_score_bias": (1,),
        "sherl_out_weight": (d, h),
        "sherl_out_bias": (d,),
        "sherl_theta": (1,),
    }


class SherlBlock(SherlPart):
    """The first late block, fed by the side network.

    Its parameters, ``sherl_down_weight[name]`` (W1 of all features) and so on, are those of ``_shapes``; down is W1
    and b1, mix W2 and b2, gate W3 and b3, score v and c.
    """

    adapter_layer_names = tuple(_shapes(1, 1, 1))
    other_param_names = (*SherlPart.other_param_names, "inputs_of")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SherlConfig, blocks: nn.ModuleList, width: int
    ) -> None:
        super().__init__(base_layer, adapter_name)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        # Blocks whose inputs are the features, by adapter; and those inputs, while a forward pass is under way.
        self.inputs_of: dict[str, list[int]] = {}
        self.seen: dict[int, Tensor] = {}
        self.place = len(blocks) - config.late_layers
        self.hooks = [
            blocks[index].register_forward_pre_hook(_Tap(self.seen, self.inputs_of, index), with_kwargs=True)
            for index in range(self.place)
        ]
        self.width = width
        self.update_layer(adapter_name, config, blocks)

    def update_layer(self, adapter_name: str, config: SherlConfig, blocks: nn.ModuleList) -> None:
        """Add an adapter."""
        inputs = [0, *(index + 1 for index in config.features(len(blocks)))]  # what leaves a block enters the next
        self.options[adapter_name] = config
        self.inputs_of[adapter_name] = inputs
        example = next(self.base_layer.parameters())
        for name, shape in _shapes(len(inputs), self.width, self.width // config.reduction).items():
            start = torch.zeros(shape)
            if name.endswith("weight"):
                start.normal_(std=INIT_STD)
            getattr(self, name)[adapter_name] = nn.Parameter(start.to(example.device, example.dtype))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def unload_and_optionally_merge_module(self, **_: Any) -> nn.Module:
        """The block as it was, without hooks on the others; called by PEFT."""
        for hook in self.hooks:
            hook.remove()
        return self.base_layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base block, on the fused features in place of ``hidden_states``."""
        name = self.adapter()
        if name is not None:
            self.seen[self.place] = hidden_states
            features = [self.seen[index] for index in self.inputs_of[name]]
            hidden_states = self.fused(features, hidden_states.detach(), name)
        self.seen.clear()
        return self.base_layer(hidden_states, *args, **kwargs)

    def fused(self, features: Sequence[Tensor], x: Tensor, name: str) -> Tensor:
        """The side network.

        Args:
            features: f_1 .. f_K, each ``[..., d]``.
            x: ``[..., d]``, the hidden state that is replaced.
            name: An adapter.

        Returns:
            ``[..., d]`` in the type of x.
        """
        z = [self._sensed(f.detach(), k, name) for k, f in enumerate(features)]
        v, c = self.sherl_score_weight[name], self.sherl_score_bias[name]
        with without_autocast(x.device.type):
            exact = torch.promote_types(v.dtype, torch.float32)
            shallow = torch.stack(z[:-1], dim=-2).to(exact)  # [..., K - 1, h]
            g = aggregated(shallow, z[-1].to(exact), v.to(exact), c.to(exact))
            gate = torch.tanh(self.sherl_theta[name].to(exact) / SHARPNESS)
        out = linear(g.relu().to(v.dtype), self.sherl_out_weight[name], self.sherl_out_bias[name])
        return out.to(x.dtype) + gate.to(x.dtype) * x

    def _sensed(self, f: Tensor, k: int, name: str) -> Tensor:
        """z of the k-th feature, ``[..., h]``."""
        W1, W2, W3 = (part[name][k] for part in (self.sherl_down_weight, self.sherl_mix_weight, self.sherl_gate_weight))
        b1, b2, b3 = (part[name][k] for part in (self.sherl_down_bias, self.sherl_mix_bias, self.sherl_gate_bias))
        u = linear(f.to(W1.dtype), W1, b1).relu()
        return (linear(u, W2, b2) + u) * linear(u, W3, b3).sigmoid()


class SherlNorm(SherlPart):
    """The final norm of the model, with a trained one of the same kind, ``sherl_norm[name]``, on the side path."""

    adapter_layer_names = ("sherl_norm",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SherlConfig) -> None:
        super().__init__(base_layer, adapter_name)
        self.sherl_norm = nn.ModuleDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SherlConfig) -> None:
        """Add an adapter: weight 1 and bias 0."""
        norm = copy.deepcopy(self.base_layer)
        for name, parameter in norm.named_parameters():
            nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        self.options[adapter_name] = config
        self.sherl_norm[adapter_name] = norm
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., d]`` to ``[..., d]``."""
        name = self.adapter()
        if name is None:
            return self.base_layer(x)
        norm = self.sherl_norm[name]
        p = self.options[name].dropout if self.training else 0.0
        return dropout(norm(x.to(norm.weight.dtype)), p).to(x.dtype)


class SherlModel(BaseTuner):
    """A model with a ``SherlBlock`` and a ``SherlNorm``; made by ``peft.get_peft_model`` from a ``SherlConfig``.

    Raises:
        ValueError: Layers or reduction do not fit the model, or its final norm is not to be told.
    """

    tuner_layer_cls = SherlPart

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT looks for the weight of a block

    def _check_merge_allowed(self) -> None:
        raise ValueError("SHERL has no merge: its side network stays beside the model; use the adapted model")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around a forward pass, with its arguments."""
        if adapter_names is not None:
            raise ValueError("adapter_names: SHERL has one side path for a whole batch; use set_adapter")
        yield

    def _prepare_adapter_config(self, peft_config: SherlConfig, model_config: dict) -> SherlConfig:
        return peft_config

    def _prepare_model(self, peft_config: SherlConfig, model: nn.Module) -> None:
        """Find what is to be wrapped, and refuse what does not fit before anything is."""
        name, blocks = decoder_blocks(model)
        peft_config.features(len(blocks))
        width = model.config.get_text_config().hidden_size
        if peft_config.reduction > width:
            raise ValueError(f"reduction={peft_config.reduction}: must be at most {width}, the width of the model")
        body = name.rpartition(".")[0]
        children = model.get_submodule(body).named_children()
        norms = [child for child, part in children if "Norm" in type(part).__name__ and "embed" not in child]
        if len(norms) != 1:
            raise ValueError(f"{type(model).__name__}: cannot tell its final norm (candidates: {norms or 'none'})")
        first_late = len(blocks) - peft_config.late_layers
        peft_config.target_modules = [f"{name}.{first_late}", f"{body}.{norms[0]}" if body else norms[0]]

    def _create_and_replace(
        self,
        peft_config: SherlConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_block = isinstance(parent, nn.ModuleList)
        if isinstance(target, SherlPart):
            target.update_layer(adapter_name, peft_config, *([parent] if is_block else []))
            return
        if is_block:
            width = self.model.config.get_text_config().hidden_size
            part = SherlBlock(target, adapter_name, peft_config, parent, width)
        else:
            part = SherlNorm(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            part.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, part, target)


class _Tap:
    """A forward pre-hook that keeps what enters a block, if that is a feature of an adapter.

    An object, so that a copied model has its own.
    """

    def __init__(self, seen: dict[int, Tensor], inputs_of: dict[str, list[int]], index: int) -> None:
        self.seen, self.inputs_of, self.index = seen, inputs_of, index

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(self.index in inputs for inputs in self.inputs_of.values()):
            self.seen[self.index] = args[0] if args else kwargs["hidden_states"]


register("SHERL", SherlConfig, SherlModel)
