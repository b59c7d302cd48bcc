"""Registration of new adapter methods with PEFT. The only file that touches PEFT internals.

PEFT 0.21 keeps its methods in a closed enumeration: ``register_peft_method`` refuses a name that ``PeftType``
does not have, and saving, loading, ``AutoPeftModel`` and transformers' ``load_adapter`` all go through that
enumeration. A plain string as key breaks transformers. So the member is added at run time, after which a
foreign method is an ordinary one.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

__all__ = ["register", "say_import"]


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], prefix: str) -> PeftType:
    """Make a method known to PEFT, so that saving, loading and every PEFT entry point accept it.

    Registering the same classes again is allowed and changes nothing; a reloaded module replaces its older
    classes.

    Args:
        name: Upper-case name of the method; becomes ``PeftType.<name>`` and ``peft_type`` in
            ``adapter_config.json``.
        config_cls: The method's ``PeftConfig``.
        model_cls: The method's ``BaseTuner``.
        prefix: Prefix of the adapter's parameter names, for example ``"lors_"``; must equal
            ``model_cls.prefix``.

    Returns:
        The enumeration member, to be written to ``peft_type`` in the config's ``__post_init__``.

    Raises:
        ValueError: The name is not upper case, or PEFT (or another library) has a different method of that
            name or prefix.
    """
    if not (name.isidentifier() and name.isupper()):
        raise ValueError(f"name={name!r}: a PEFT method is registered under an upper-case identifier, such as 'LORS'")
    if name in PeftType.__members__:
        return _register_again(PeftType[name], config_cls, model_cls, prefix)
    if model_cls.prefix != prefix:
        raise ValueError(f"prefix={prefix!r}: {model_cls.__name__}.prefix is {model_cls.prefix!r}; they must be equal")
    if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ValueError(f"prefix={prefix!r}: another PEFT method already uses this prefix")
    member = _add_member(name)
    # PEFT wants the name in lower case here, and derives the member from it.
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    return member


def say_import(config_cls: type[PeftConfig], folder: str | Path) -> None:
    """Make the first line of an adapter's model card say which package registers its method.

    PEFT knows a method only once its package is imported, and fails with ``KeyError`` before: none of our code runs
    then, so the card has to say it.

    Args:
        config_cls: Config of the method; its package is the one to import.
        folder: Where the adapter is saved, with the card that PEFT has written, if it has.
    """
    package = config_cls.__module__.partition(".")[0]
    line = f"`import {package}` before PEFT loads this adapter: the import registers its method."
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if line in text:
        return
    card = ModelCard(text, ignore_metadata_errors=True)
    card.text = f"{line}\n\n{card.text.lstrip()}"
    card.save(file)


def _register_again(member: PeftType, config_cls: type, model_cls: type, prefix: str) -> PeftType:
    """Accept a name that is taken only if it is taken by the same method (a second import, or a reload)."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    owner = "PEFT itself" if known is None else f"{known.__module__}.{known.__qualname__}"
    if owner != f"{config_cls.__module__}.{config_cls.__qualname__}":
        raise ValueError(f"name={member.value!r}: already the name of another PEFT method, that of {owner}")
    if PEFT_TYPE_TO_PREFIX_MAPPING[member] != prefix:
        taken = PEFT_TYPE_TO_PREFIX_MAPPING[member]
        raise ValueError(f"prefix={prefix!r}: {member.value} is already registered with the prefix {taken!r}")
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    return member


def _add_member(name: str) -> PeftType:
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
    return member
