"""What every section of a recipe is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings that cannot be changed and know all their names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
