"""Editing a round file in place, comments included, and comparing two files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tuner.config.dimensions import dimension_to_yaml
from tuner.config.parsing import RoundFile
from tuner.config.round_file import RECORDED_KEYS, RoundSpec, without_secrets
from tuner.config.yaml_text import Entry, Layout, Section, YamlError, one_line, parse, plain
from tuner.errors import InputError, Mistake


class _Delete:
    def __repr__(self) -> str:
        return "DELETE"


DELETE: Final = _Delete()
"""As a change: remove the key, so that its default applies."""


def edit_round(text: str, changes: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Return the text with some keys set, added or deleted; keys are dotted, such as `search.trials`.

    A comment goes to the end of its key's line, in place of the one there; where several keys share a line,
    each is named. A list of mappings is written one item a line. Doing it again changes nothing. Raises
    InputError when the text is no YAML mapping, or is built so (aliases, say) that a change would reach other
    keys too.
    """
    try:
        wanted = parse(text).document
    except YamlError as error:
        place = "" if error.line is None else f"line {error.line}: "
        raise InputError(f"the round file cannot be edited: {place}{error.message}") from None
    if not isinstance(wanted, dict):
        raise InputError("the round file cannot be edited: it has no `key: value` lines")
    has_anchors = "&" in text
    for key, value in changes.items():
        path, layout = key.split("."), Layout.of(text)
        text = _delete(layout, path) if value is DELETE else _put(layout, layout.root, path, value)
        _set(wanted, path, value)
        if has_anchors:  # else a change stays where it is, and parsing after each costs a second in all
            _check(text, wanted, key)
    kept = {key: comment for key, comment in comments.items() if changes.get(key) is not DELETE}
    text = _annotate(text, kept)
    _check(text, wanted, ", ".join({**changes, **kept}))
    return text


def _check(text: str, wanted: Mapping[str, Any], key: str) -> None:
    """Raise InputError unless the edited text has the expected content."""
    try:
        found = parse(text).document
    except YamlError:
        found = None
    if found != wanted:
        raise InputError(
            f"{key} cannot be changed without reaching other parts of the round file (does it use aliases?); "
            "change it by hand"
        )


def _put(layout: Layout, section: Section, path: list[str], value: Any) -> str:
    """Set a key, writing the sections that lead to it where there are none."""
    entry = section.find(path[0])
    if entry is None:
        return _insert(layout, section, path[0], _nested(path[1:], value))
    if len(path) == 1 or entry.inside is None:
        return _replace(layout, entry, _nested(path[1:], value), in_flow=section.is_flow)
    return _put(layout, entry.inside, path[1:], value)


def _replace(layout: Layout, entry: Entry, value: Any, *, in_flow: bool) -> str:
    """Write another value. A comment on a block's first line stays, one on its last line goes with it."""
    text = layout.text
    line = text[entry.colon : layout.line_end(entry.colon)] if entry.is_block else ""
    after = layout.line_end(entry.end) if entry.is_block else entry.end
    if not in_flow and _is_written_as_block(value):
        comment = line if entry.is_block else text[entry.end : layout.line_end(entry.end)]
        items = _items(value, indent=_column(layout, entry) + 2, text=text)
        return f"{text[: entry.colon]}{comment.rstrip()}{items}{text[layout.line_end(entry.end) :]}"
    start = entry.colon if entry.is_block else entry.value_start
    blank = " " if start == entry.colon else ""
    return f"{text[:start]}{blank}{one_line(value)}{line.rstrip()}{text[after:]}"


def _insert(layout: Layout, section: Section, name: str, value: Any) -> str:
    """Add a key after the last one of its section."""
    text, last = layout.text, section.entries[-1] if section.entries else None
    if section.is_flow or last is None:
        at = last.end if last else section.end - 1
        return f"{text[:at]}{', ' if last else ''}{one_line(name)}: {one_line(value)}{text[at:]}"
    at, column = layout.line_end(last.end), _column(layout, last)
    written = f" {one_line(value)}"
    if _is_written_as_block(value):
        written = _items(value, indent=column + 2, text=text)
    return f"{text[:at]}{_line_break(text)}{' ' * column}{one_line(name)}:{written}{text[at:]}"


def _delete(layout: Layout, path: list[str]) -> str:
    """Remove a key with its value and the comment on its lines; an emptied section becomes `{}`."""
    text, entry = layout.text, layout.find(path)
    if entry is None:
        return text
    above = layout.find(path[:-1])
    section = above.inside if above and above.inside else layout.root
    if section.is_flow:
        at = section.entries.index(entry)
        start = section.entries[at - 1].end if at else entry.start
        following = section.entries[1].start if not at and len(section.entries) > 1 else entry.end
        return text[:start] + text[following:]
    if above and len(section.entries) == 1:
        return _replace(layout, above, {}, in_flow=False)
    after = text.find("\n", entry.end) + 1 or len(text)
    return text[: layout.line_start(entry.start)] + text[after:]


def _annotate(text: str, comments: Mapping[str, str]) -> str:
    """Put each comment at the end of its key's line. Raises KeyError for a key the text does not have."""
    layout = Layout.of(text)
    by_line: dict[int, list[str]] = {}
    for key, comment in comments.items():
        entry = layout.find(key.split("."))
        if entry is None:
            raise KeyError(key)
        at = layout.content_end(entry.comment_line)
        is_alone = not text[layout.line_start(entry.start) : entry.start].strip()
        said = " ".join(comment.split())
        by_line.setdefault(at, []).append(said if is_alone else f"{entry.name}: {said}")
    for at, parts in sorted(by_line.items(), reverse=True):
        text = f"{text[:at]}  # {'; '.join(parts)}{text[layout.line_end(at) :]}"
    return text


def _set(document: dict[str, Any], path: list[str], value: Any) -> None:
    """Apply an edit to the parsed document, against which the text is checked."""
    *above, last = path
    for name in above:
        if not isinstance(document.get(name), dict):
            if value is DELETE:
                return
            document[name] = {}
        document = document[name]
    if value is DELETE:
        document.pop(last, None)
    else:
        document[last] = plain(value)


def _nested(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _is_written_as_block(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)


def _items(values: Any, *, indent: int, text: str) -> str:
    return "".join(f"{_line_break(text)}{' ' * indent}- {one_line(value)}" for value in values)


def _line_break(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _column(layout: Layout, entry: Entry) -> int:
    return entry.start - layout.line_start(entry.start)


_MAY_CHANGE = (
    "goal",
    "search.trials",
    "evaluation.batch_size",
    "checkpoints.keep_best_trials",
    "run",
    "command.silence_minutes",
)
"""Keys, or whole sections, that do not change results of trials."""
_FOLLOWS_HORIZON = ("evaluation.every_steps", "hyperparameters.warmup_steps", "hyperparameters.decay_steps")
"""Keys whose defaults are parts of max_train_steps."""


def refused_changes(begun: Mapping[str, Any], now: RoundFile) -> list[Mistake]:
    """Return the changes that would make the round's trials incomparable; empty if the round may resume.

    `begun` is the JSON of the RoundSpec that the round began with, its paths relative or absolute. Values are
    compared by their meaning: a default that is now written out is no change, nor is another order of keys.
    """
    before = RoundSpec.recorded(begun)
    then, today = (_by_key(spec.absolute(now.directory)) for spec in (before, now.spec))
    written_then, written_today = _by_key(before), _by_key(now.spec)
    lines = parse(now.text)
    horizon_changed = then["max_train_steps"] != today["max_train_steps"]
    mistakes = []
    for key in {**today, **then}:
        place = tuple(key.split("."))
        follows = horizon_changed and key in _FOLLOWS_HORIZON and place not in lines.lines
        may_change = key in _MAY_CHANGE or place[0] in _MAY_CHANGE
        is_own = key == "objective.direction" and today.get(key) is None  # what the metric says itself
        if then.get(key) != today.get(key) and not follows and not may_change and not is_own:
            message = _message(written_then.get(key), written_today.get(key))
            mistakes.append(Mistake(lines.line(place), key, message))
    return sorted(mistakes, key=lambda mistake: mistake.line or 0)


def _by_key(spec: RoundSpec) -> dict[str, Any]:
    """Return the round's values by dotted name, including all hyperparameters."""
    values: dict[str, Any] = {}
    for name, value in spec.model_dump(mode="json", exclude={"hyperparameters", *RECORDED_KEYS}).items():
        if isinstance(value, dict):
            values.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            values[name] = value
    values["storage"] = without_secrets(spec.storage)  # another password is no change
    for name, dimension in spec.space().items():
        values[f"hyperparameters.{name}"] = dimension_to_yaml(dimension)
    return values


def _message(before: Any, now: Any) -> str:
    return (
        f"the round began with {one_line(before)} and the file now says {one_line(now)}, but the trials of "
        "one round must be comparable; put it back, or start a new round by another name after `round:`"
    )
