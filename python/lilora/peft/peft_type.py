"""PEFT's enum of methods has no entry for others to add, so LILORA is added at run time. The one place that does so."""

from peft import PeftType


def ensure_peft_type(name: str) -> PeftType:
    """The member `name` of PeftType; made if PEFT does not know it yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    if name not in PeftType.__dict__:
        type.__setattr__(PeftType, name, member)
    return member


LILORA = ensure_peft_type("LILORA")
