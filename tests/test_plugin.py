"""Registration of methods with PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
from peft.utils import PeftType

import lors
from lors.plugin import register
from lors.sparse_config import MethodConfig


def test_registered_member_behaves_like_pefts_own() -> None:
    assert PeftType("LORS") is PeftType["LORS"] is PeftType.LORS
    assert PeftType.LORS in list(PeftType)
    assert PeftType.LORS.value == PeftType.LORS == "LORS"
    assert pickle.loads(pickle.dumps(PeftType.LORS)) is copy.deepcopy(PeftType.LORS) is PeftType.LORS


def test_registering_again_is_allowed_and_changes_nothing() -> None:
    members = list(PeftType)
    assert register("LORS", lors.LorsConfig, lors.LorsModel) is lors.LorsModel
    assert list(PeftType) == members


class OtherConfig(MethodConfig):
    pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lors_two", "upper-case"),
        ("LORA", "'LORA': already the name of another PEFT method, that of peft.tuners.lora"),
        ("LORS", "'LORS': already the name of another PEFT method, that of lors.tuner.LorsConfig"),
    ],
)
def test_conflicts_are_refused_and_leave_peft_alone(name: str, message: str) -> None:
    members = list(PeftType)
    with pytest.raises(ValueError, match=message):
        register(name, OtherConfig, lors.LorsLinear)
    assert list(PeftType) == members
    assert OtherConfig().peft_type is None and lors.LorsConfig().peft_type is PeftType.LORS
