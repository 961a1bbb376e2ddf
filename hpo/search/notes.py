"""The note of a study that optuna-dashboard shows, in Markdown.

Written as `optuna_dashboard.save_note` does it, whose import takes over a second: a version that counts up,
and the text in parts.
"""

from hpo.search import schema
from hpo.search.search import Search

_VERSION, _PART = "dashboard:note_ver", "dashboard:note_str:"
_MOST = 2045
"""How long a part may be."""


def write_note(search: Search, text: str) -> None:
    """Write `text` as the study's note, unless a person has written one, or changed ours."""
    storage, study_id = search.storage, search.study._study_id
    attrs = storage.get_study_system_attrs(study_id)
    before, version = attrs.get(_VERSION, 0), search.attrs.get(schema.NOTE, 0)
    parts = [text[start : start + _MOST] for start in range(0, len(text), _MOST)]
    if before != version or all(attrs.get(f"{_PART}{i}") == part for i, part in enumerate(parts)):
        return
    search.remember(schema.NOTE, version + 1)
    storage.set_study_system_attr(study_id, _VERSION, version + 1)
    n_before = sum(key.startswith(_PART) for key in attrs)
    for i in range(max(len(parts), n_before)):  # a part that is no longer needed is left empty
        storage.set_study_system_attr(study_id, f"{_PART}{i}", parts[i] if i < len(parts) else "")


def trial_page(search: Search, number: int) -> str:
    """Return where optuna-dashboard shows a trial."""
    return f"/dashboard/studies/{search.study._study_id}/trials?numbers={number}"
