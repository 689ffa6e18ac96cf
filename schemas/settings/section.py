"""What every section of a recipe is, and what a setting changes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What has other contents where a setting is another:
#   bytes     what its stage makes
#   how       nothing: it is how the work is done, or when it is given up
#   contents  the same, by what it names: a fingerprint holds a file's contents, not its name
#   fit       what is fitted or chosen before that
#   bank      a re-ranker's train queries
#   lists     the lists of relevance, not relevance itself
#   rows      which rows a split has: the shards' fingerprints hold the rows themselves
#   results   the figures made of rankings
#   page      a page
Changes = Literal["bytes", "how", "contents", "fit", "bank", "lists", "rows", "results", "page"]


def setting(default: Any, about: str, *, changes: Changes = "bytes", **limits: Any) -> Any:
    """A field: its default (`...`: there is none), what it is with its unit, pydantic's limits."""
    return Field(default, description=about, json_schema_extra={"changes": changes}, **limits)


class Section(BaseModel):
    """Settings of one subject, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def relevant(self, *changes: Changes) -> dict[str, Any]:
        """What a fingerprint holds (JSON-able): the settings that change `bytes`, or `changes`."""
        names = set()
        for name, field in type(self).model_fields.items():
            assert isinstance(field.json_schema_extra, dict)  # as `setting` made it
            if field.json_schema_extra["changes"] in (changes or ("bytes",)):
                names.add(name)
        return self.model_dump(mode="json", include=names)
