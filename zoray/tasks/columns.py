"""Which columns of a file are used for what: inferred from their names, or said by the user.

Guarantees: columns that could mean two things, or nothing, are refused with the settings that would decide; nothing is
guessed from the content of cells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoray.records import ConfigError
from zoray.signatures import did_you_mean

KINDS = {  # kind -> what it needs
    "choice": ("text", "label"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
}
ROLES = tuple(dict.fromkeys(role for roles in KINDS.values() for role in roles))
SOURCE = {"choice": "text", "completion": "prompt", "preference": "prompt", "prompt": "prompt"}  # what a template holds
TEMPLATES = {"choice": "{text} It was", "completion": "{prompt}", "preference": "{prompt}", "prompt": "{prompt}"}
OTHER_NAMES = {  # as other files call them; suggested, never taken
    "text": ("sentence", "body", "content", "review", "message", "comment", "subject", "tweet", "description"),
    "label": ("category", "class", "sentiment", "target", "intent", "topic", "tag", "rating", "stars", "labels"),
    "prompt": ("question", "instruction", "query", "input", "problem", "request"),
    "completion": ("answer", "answers", "response", "output", "solution", "reply", "target", "summary"),
    "messages": ("conversation", "conversations", "chat", "dialog", "dialogue", "turns"),
    "chosen": ("preferred", "accepted", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser", "refused"),
}
NAMES = re.compile(r"\{([^{}\n]+)\}")


@dataclass(frozen=True)
class Template:
    """A prompt with columns in it: texts[0] columns[0] texts[1] columns[1] ... texts[n]."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, values: Sequence[str]) -> str:
        """The prompt; what looks like a template within a value stays as it is."""
        if len(values) == 1:
            return f"{self.texts[0]}{values[0]}{self.texts[1]}"
        return self.texts[0] + "".join(value + text for value, text in zip(values, self.texts[1:], strict=True))


@dataclass(frozen=True)
class Schema:
    """What a file's rows are, and where everything stands in them."""

    kind: str
    columns: Mapping[str, str]  # role -> column, for the roles that are used
    template: Template | None = None  # of the prompt; none where messages hold it


def infer(
    present: Sequence[str], given: Mapping[str, str], kind: str | None, template: str | None, where: str
) -> Schema:
    """The schema of a file with the columns `present`.

    Args:
        present: the file's columns.
        given: role -> column, as the user says.
        kind: one of KINDS, as the user says; None to find out.
        template: of the prompt; None for the kind's own.
        where: the line that has the columns, for messages.
    """
    for role, column in given.items():
        if column not in present:
            raise ConfigError(
                f"{where}: expected the column {column!r}, which task.{role}_column names; the columns are "
                f"{_list(present)}{did_you_mean(column, list(present))}"
            )
    known = {role: column for role in ROLES if (column := given.get(role) or _called(role, present))}
    named = [] if template is None else names_in(template)
    needs = {name: _needs(name, known, given, named) for name in KINDS if template is None or name in SOURCE}
    possible = [name for name, roles in needs.items() if roles <= set(known) and set(given) <= set(KINDS[name])]
    best = [name for name in possible if not any(needs[name] < needs[other] for other in possible)]
    if kind is not None:
        if kind not in possible:
            raise _missing(kind, present, sorted(needs.get(kind, set()) - set(known)), given, where)
        best = [kind]
    if not best:
        raise _none_fits(present, given, where)
    if len(best) > 1:
        raise ConfigError(
            f"{where}: the columns {_list(present)} make more than one kind of data: "
            f"{'; '.join(f'{_roles(name)} ({name})' for name in best)}. Set "
            f"{' or '.join(f'task.kind={name}' for name in best)}"
        )
    label = known.get("label")
    if kind is None and best[0] in ("completion", "prompt") and label is not None:
        raise _unclear_label(best[0], label, known, present, where)
    return _schema(best[0], known, given, present, template, where)


def names_in(template: str) -> list[str]:
    """What stands in braces in a template."""
    return NAMES.findall(template)


def _called(role: str, present: Sequence[str]) -> str | None:
    """The column of a role's name, in capitals or not."""
    alike = [column for column in present if column.lower() == role]
    return role if role in present else alike[0] if len(alike) == 1 else None


def _needs(kind: str, known: Mapping[str, str], given: Mapping[str, str], named: Sequence[str]) -> set[str]:
    """Roles that a kind needs: a template of other columns needs no text or prompt, and messages may hold one."""
    source, roles = SOURCE.get(kind), set(KINDS[kind])
    spared = source not in named if named else kind == "preference" and source not in known
    return roles - {source} if spared and source not in given else roles


def _schema(
    kind: str,
    known: Mapping[str, str],
    given: Mapping[str, str],
    present: Sequence[str],
    template: str | None,
    where: str,
) -> Schema:
    columns = {role: known[role] for role in KINDS[kind] if role in known}
    source = SOURCE.get(kind)
    if source is None or (template is None and source not in columns):
        return Schema(kind, columns)
    texts, used = [""], []
    for place, piece in enumerate(NAMES.split(template or TEMPLATES[kind])):
        column = known[source] if piece == source and source in known else piece
        if place % 2 and column in present:
            used.append(column)
            texts.append("")
        elif place % 2 and piece.isidentifier():
            raise ConfigError(
                f"{where}: expected columns in the braces of task.template; got {{{piece}}}; the columns are "
                f"{_list(present)}{did_you_mean(piece, list(present))}"
            )
        else:
            texts[-1] += f"{{{piece}}}" if place % 2 else piece
    if not used:
        raise ConfigError(
            f"{where}: expected a column in braces in task.template, such as {TEMPLATES[kind]!r}; got {template!r}"
        )
    if source in columns and columns[source] not in used:
        if source in given:
            raise ConfigError(
                f"expected {{{source}}} in task.template, since task.{source}_column={given[source]} is given; got "
                f"{template!r}. Leave one of them out"
            )
        del columns[source]
    return Schema(kind, columns, Template(tuple(texts), tuple(used)))


def _list(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "none"


def _roles(kind: str) -> str:
    *most, last = KINDS[kind]
    return f"{', '.join(most)} and {last}" if most else last


def _missing(
    kind: str, present: Sequence[str], lacking: Sequence[str], given: Mapping[str, str], where: str
) -> ConfigError:
    foreign = [f"task.{role}_column" for role in given if role not in KINDS[kind]]
    if kind not in SOURCE:
        foreign = foreign or ["task.template"]
    if foreign and not lacking:
        return ConfigError(f"expected no {' nor '.join(foreign)} for {kind}, which has {_roles(kind)}. Leave it out")
    advice = _settings(lacking, present) or f"task.{lacking[0]}_column=..."
    return ConfigError(
        f"{where}: no column {' and '.join(map(repr, lacking))}; {kind} needs {_roles(kind)}, and the columns are "
        f"{_list(present)}. Name it, {advice}, or rename it in the file"
    )


def _none_fits(present: Sequence[str], given: Mapping[str, str], where: str) -> ConfigError:
    kinds = "; ".join(f"{_roles(kind)} ({kind})" for kind in KINDS)
    advice = []
    for kind, roles in KINDS.items():
        lacking = [role for role in roles if not (given.get(role) or _called(role, present))]
        if set(given) <= set(roles) and (settings := _settings(lacking, present)):
            advice.append(f"{settings} makes it {kind}")
    return ConfigError(
        f"{where}: expected the columns of one kind of data: {kinds}; the columns are {_list(present)}"
        f"{''.join(f', and task.{role}_column={column} is given' for role, column in given.items())}. "
        f"{'; or '.join(advice) or 'Name yours, such as task.text_column=body task.label_column=category'}"
    )


def _settings(lacking: Sequence[str], present: Sequence[str]) -> str:
    """Settings that would name all lacking columns, if their names are telling."""
    found = {}
    for role in lacking:
        names = [column for column in present if column.lower() in OTHER_NAMES[role] and column not in found.values()]
        if not names:
            return ""
        found[role] = names[0]
    return " ".join(f"task.{role}_column={column}" for role, column in found.items())


def _unclear_label(kind: str, label: str, known: Mapping[str, str], present: Sequence[str], where: str) -> ConfigError:
    if kind == "prompt":
        means, other = "is what to choose", f"set task.text_column={known.get('prompt', '...')} for that"
    else:
        means, other = "says which completions are good", "keep only the rows with a good one"
    return ConfigError(
        f"{where}: the columns {_list(present)} may be {_roles(kind)} alone, or {label!r} {means}. Set "
        f"task.kind={kind} to leave {label!r} out, or {other}"
    )
