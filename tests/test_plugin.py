"""Registration of methods with PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

import lors
from lors.plugin import register


def test_registered_member_behaves_like_pefts_own() -> None:
    assert PeftType("LORS") is PeftType["LORS"] is PeftType.LORS
    assert PeftType.LORS in list(PeftType)
    assert PeftType.LORS.value == PeftType.LORS == "LORS"
    assert pickle.loads(pickle.dumps(PeftType.LORS)) is copy.deepcopy(PeftType.LORS) is PeftType.LORS


def test_registering_again_is_allowed_and_changes_nothing() -> None:
    members = list(PeftType)
    assert register("LORS", lors.LorsConfig, lors.LorsModel, prefix="lors_") is PeftType.LORS
    assert list(PeftType) == members


class OtherConfig(PeftConfig):
    pass


class OtherModel(BaseTuner):
    prefix = "lors_"


@pytest.mark.parametrize(
    ("name", "prefix", "message"),
    [
        ("lors_two", "lors_", "upper-case"),
        ("LORA", "lors_", "'LORA': already the name of another PEFT method, that of peft.tuners.lora"),
        ("LORS", "lors_", "'LORS': already the name of another PEFT method, that of lors.tuner.LorsConfig"),
        ("NEW_METHOD", "lors_", "'lors_': another PEFT method already uses this prefix"),
        ("NEW_METHOD", "new_", r"'new_': OtherModel.prefix is 'lors_'"),
    ],
)
def test_conflicts_are_refused_and_leave_peft_alone(name: str, prefix: str, message: str) -> None:
    members = list(PeftType)
    with pytest.raises(ValueError, match=message):
        register(name, OtherConfig, OtherModel, prefix=prefix)
    assert list(PeftType) == members
