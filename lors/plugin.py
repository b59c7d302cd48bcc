"""Registration of new adapter methods with PEFT. The only file that touches PEFT's enumeration of methods.

PEFT 0.21 keeps its methods in a closed enumeration: ``register_peft_method`` refuses a name that ``PeftType``
does not have, and saving, loading, ``AutoPeftModel`` and transformers' ``load_adapter`` all go through that
enumeration. A plain string as key breaks transformers. So the member is added at run time, after which a
foreign method is an ordinary one.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from lors.sparse_config import MethodConfig
from lors.sparse_layer import SparseLinear
from lors.sparse_tuner import SparseTunerModel

__all__ = ["register"]


def register(
    name: str, config_cls: type[MethodConfig], layer_or_model: type[SparseLinear] | type[BaseTuner]
) -> type[BaseTuner]:
    """Make a method known to PEFT, so that saving, loading and every PEFT entry point accept it.

    The names of its parameters in a layer begin with that of the method in lower case: ``LORS`` has ``lors_A``.
    Registering the same config again is allowed; a reloaded module replaces its older classes.

    Args:
        name: Upper-case name of the method; becomes ``PeftType.<name>``, and ``peft_type`` in the config and in
            ``adapter_config.json``.
        config_cls: The config of the method.
        layer_or_model: Its layer, for which a ``SparseTunerModel`` is made; or, for a method that needs a model of its
            own, that model.

    Returns:
        The model of the method, to be bound to the name of the config with ``Model`` for ``Config``.

    Raises:
        ValueError: The name is not upper case, or PEFT (or another library) has a different method of that name.
    """
    if not (name.isidentifier() and name.isupper()):
        raise ValueError(f"name={name!r}: a PEFT method is registered under an upper-case identifier, such as 'LORS'")
    known = name in PeftType.__members__
    if known:
        _check_owner(PeftType[name], config_cls)
    model_cls = layer_or_model
    if issubclass(layer_or_model, SparseLinear):
        model_cls = type(
            config_cls.__name__.replace("Config", "Model"),
            (SparseTunerModel,),
            {
                "__doc__": f"A model with ``{layer_or_model.__name__}`` layers; made by ``peft.get_peft_model``.",
                "__module__": config_cls.__module__,
                "tuner_layer_cls": layer_or_model,
            },
        )
    model_cls.prefix = f"{name.lower()}_"
    if known:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType[name]] = model_cls
    else:
        _add_member(name)
        # PEFT wants the name in lower case here, and derives the member from it.
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
    config_cls.registered_type = PeftType[name]
    return model_cls


def _check_owner(member: PeftType, config_cls: type[MethodConfig]) -> None:
    """Accept a name that is taken only if it is taken by the same method (a second import, or a reload)."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    owner = "PEFT itself" if known is None else f"{known.__module__}.{known.__qualname__}"
    if owner != f"{config_cls.__module__}.{config_cls.__qualname__}":
        raise ValueError(f"name={member.value!r}: already the name of another PEFT method, that of {owner}")


def _add_member(name: str) -> None:
    """Append ``name`` to the closed enumeration ``PeftType``.

    The three tables are what ``PeftType[name]``, ``PeftType(value)`` and iteration read; the attribute is set
    past ``EnumMeta``. Pickle and deep copies find the member by its value, so they work as for PEFT's own
    members.
    """
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
