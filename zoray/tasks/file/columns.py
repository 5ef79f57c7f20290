"""The roles of a file's columns: inferred from their names, or given by the user.

Guarantees: columns that could mean two things, or nothing, are refused with the settings that would decide; nothing is
guessed from the content of cells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from unicodedata import normalize

from zoray.records import ConfigError, Marked
from zoray.records.overrides import setting
from zoray.records.signatures import did_you_mean

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
OTHER_NAMES = {  # other common names; suggested, never used
    "text": ("sentence", "body", "content", "review", "message", "comment", "subject", "tweet", "description"),
    "label": ("category", "class", "sentiment", "target", "intent", "topic", "tag", "rating", "stars", "labels"),
    "prompt": ("question", "instruction", "query", "input", "problem", "request"),
    "completion": ("answer", "answers", "response", "output", "solution", "reply", "target", "summary"),
    "messages": ("conversation", "conversations", "chat", "dialog", "dialogue", "turns"),
    "chosen": ("preferred", "accepted", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser", "refused"),
}
CONTROL = ("<", "[", "\uff5c")  # control tokens begin with these, or contain them
NAMES = re.compile(r"\{([^{}\n]+)\}")
ALPACA = ("instruction", "input", "output")  # columns of many instruction data sets; all but these are optional
ALSO_ALPACA = ("system", "history")
CONTEXT = ("input", "context")  # columns that belong to an instruction, and are empty in many rows


@dataclass(frozen=True)
class Template:
    """A prompt with columns in it: texts[0] columns[0] texts[1] columns[1] ... texts[n].

    An `optional` column may be empty. Then its line of the template is left out, unless it holds other columns, and so
    is white space before it.
    """

    texts: tuple[str, ...]
    columns: tuple[str, ...]
    optional: tuple[bool, ...] = ()

    @cached_property
    def _marked(self) -> bool:
        """Whether it may hold control tokens itself."""
        return any(mark in text for text in self.texts for mark in CONTROL)

    def fill(self, values: Sequence[str]) -> str:
        """The prompt; braces within a value stay as they are."""
        return self._own(values) if self._marked else self._filled(values)

    def _own(self, values: Sequence[str]) -> str:
        """The prompt, with the template's own parts marked: control tokens count there."""
        if all(values):
            parts = [part for pair in zip(self.texts, (*values, ""), strict=True) for part in pair]
            ends = list(accumulate(map(len, parts)))
            return Marked("".join(parts), tuple(zip([0, *ends[1::2]], ends[::2], strict=False)))
        prompt, end, own = self._filled(values), 0, list[tuple[int, int]]()
        for value in filter(None, values):
            place = prompt.index(value, end)
            own.append((end, place))
            end = place + len(value)
        return Marked(prompt, (*own, (end, len(prompt))))

    def _filled(self, values: Sequence[str]) -> str:
        if len(values) == 1:
            return f"{self.texts[0]}{values[0]}{self.texts[1]}"
        if not all(values):
            return self._without(values)
        return self.texts[0] + "".join(value + text for value, text in zip(values, self.texts[1:], strict=True))

    def _without(self, values: Sequence[str]) -> str:
        """The prompt where some values are empty."""
        prompt = self.texts[0]
        line = prompt.rfind("\n") + 1  # where the template's current line begins
        for value, text in zip(values, self.texts[1:], strict=True):
            if value:
                prompt, line = prompt + value, -1  # a line with something in it
            else:
                prompt = prompt[: line if line >= 0 else None].rstrip()
                text = text.lstrip() if not prompt else text
            if "\n" in text:
                line = len(prompt) + text.rfind("\n") + 1
            prompt += text
        return prompt


@dataclass(frozen=True)
class Schema:
    """The kind of a file's rows, and the columns that they use."""

    kind: str
    columns: Mapping[str, str]  # role -> column, for the roles that are used
    template: Template | None = None  # of the prompt; None where messages hold it
    instruction: bool = False  # an instruction data set, in its usual template


def infer(
    present: Sequence[str], given: Mapping[str, str], kind: str | None, template: str | None, where: str
) -> Schema:
    """The schema of a file with the columns `present`.

    Args:
        present: the file's columns.
        given: role -> column, from the user.
        kind: one of KINDS, from the user; None to find out.
        template: of the prompt; None for the kind's own.
        where: the line that has the columns, for messages.
    """
    given = {role: _given(role, column, present, where) for role, column in given.items()}
    known = {role: column for role in ROLES if (column := given.get(role) or _called(role, present))}
    alpaca, usual = _alpaca(known, given, present), False
    if alpaca:
        known["completion"] = alpaca["output"]
        usual = template is None
        template = _alpaca_template(alpaca) if usual else template
    named = [] if template is None else [name.removesuffix("?") for name in names_in(template)]
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
    schema = _schema(best[0], known, given, present, template, where)
    _check_alike(schema.columns, given, present, where)
    others = {role: alpaca[role] for role in ALSO_ALPACA if role in alpaca and role not in named}
    return replace(schema, columns={**schema.columns, **others}, instruction=usual)


def names_in(template: str) -> list[str]:
    """The names in braces in a template."""
    return NAMES.findall(template)


def _called(role: str, present: Sequence[str]) -> str | None:
    """The column called like a role, whatever its capitals."""
    alike = [column for column in present if column.strip().lower() == role]
    return role if role in present else alike[0] if alike else None


def _given(role: str, column: str, present: Sequence[str], where: str) -> str:
    """The column that a setting names, however its letters are composed, and with or without space around it."""
    if column in present:
        return column
    alike = [name for name in present if normalize("NFC", name.strip()) == normalize("NFC", column.strip())]
    if len(alike) == 1:
        return alike[0]
    raise ConfigError(
        f"{where}: expected the column {column!r}, which task.{role}_column names; the columns are {_list(present)}"
        f"{did_you_mean(column, list(present))}"
    )


def _check_alike(used: Mapping[str, str], given: Mapping[str, str], present: Sequence[str], where: str) -> None:
    """Raise ConfigError if a column was chosen by its name, and another one has that name in other capitals."""
    for role in used:
        alike = [name for name in present if name.strip().lower() == role]
        if role not in given and len(alike) > 1:
            raise ConfigError(
                f"{where}: expected one column called {role}; got {' and '.join(map(repr, alike))}. Rename one, or say "
                f"which: {' or '.join(setting(f'task.{role}_column', name) for name in alike)}"
            )


def _alpaca(known: Mapping[str, str], given: Mapping[str, str], present: Sequence[str]) -> dict[str, str]:
    """The columns of an instruction data set by their usual names, if that is what the columns are."""
    found = {name: column for name in (*ALPACA, *ALSO_ALPACA) if (column := _called(name, present))}
    whole = "instruction" in found and "output" in found
    taken = any(set(roles) <= set(known) for roles in KINDS.values())
    return found if whole and not taken and not given else {}


def _alpaca_template(columns: Mapping[str, str]) -> str:
    lines = [f"{{{columns['instruction']}}}"]
    return "\n".join([*lines, *([f"{{{columns['input']}?}}"] if "input" in columns else []), ""])


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
    texts, used, optional = [""], [], []
    for place, piece in enumerate(NAMES.split(template or TEMPLATES[kind])):
        name = piece if piece in present else piece.removesuffix("?")
        column = known[source] if name == source and source in known else name
        if place % 2 and column in present:
            used.append(column)
            optional.append(name != piece)
            texts.append("")
        elif place % 2 and name.isidentifier():
            raise ConfigError(
                f"{where}: expected columns in the braces of task.template; got {{{piece}}}; the columns are "
                f"{_list(present)}{did_you_mean(name, list(present))}"
            )
        else:
            texts[-1] += f"{{{piece}}}" if place % 2 else piece
    if not used:
        raise ConfigError(
            f"{where}: expected a column in braces in task.template, such as {TEMPLATES[kind]!r}; got {template!r}"
        )
    if all(optional):
        raise ConfigError(
            f"{where}: expected a column in task.template that may not be empty; got {template!r}. Leave out one ?"
        )
    if source in columns and columns[source] not in used:
        if source in given:
            raise ConfigError(
                f"expected {{{source}}} in task.template, since {setting(f'task.{source}_column', given[source])} is "
                f"given; got {template!r}. Leave one of them out"
            )
        del columns[source]
    return Schema(kind, columns, Template(tuple(texts), tuple(used), tuple(optional)))


def _list(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns)) or "none"


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
    said = [setting(f"task.{role}_column", column) for role, column in given.items()]
    return ConfigError(
        f"{where}: expected the columns of one kind of data: {kinds}; the columns are {_list(present)}"
        f"{''.join(f', and {named} is given' for named in said)}. "
        f"{'; or '.join(advice) or _otherwise(present)}"
    )


def _otherwise(present: Sequence[str]) -> str:
    """What to do where no column has a telling name."""
    if len(present) == 1 and (signs := [sign for sign in "\t;,|" if sign in present[0]]):
        name = {"\t": "tabs, call it .tsv", ",": "commas, call it .csv"}.get(signs[0])
        return f"If columns are separated by {name or f'{signs[0]!r}, separate them by commas'}"
    return "Name yours, such as task.text_column=body task.label_column=category"


def _settings(lacking: Sequence[str], present: Sequence[str]) -> str:
    """Settings that would name all lacking columns, if their names are telling."""
    found = {}
    for role in lacking:
        names = [column for column in present if column.lower() in OTHER_NAMES[role] and column not in found.values()]
        if not names:
            return ""
        found[role] = names[0]
    asked = found.get("prompt", "").strip().lower()
    context = [column for column in present if column.strip().lower() in CONTEXT and column not in found.values()]
    texts = [setting(f"task.{role}_column", column) for role, column in found.items()]
    if asked in ("instruction", "question", "query", "problem") and context:  # a prompt of two columns
        template = setting("task.template", f"{{{found.pop('prompt')}}}\n{{{context[0]}?}}\n")
        texts = [template, *(setting(f"task.{role}_column", column) for role, column in found.items())]
    return " ".join(texts)


def _unclear_label(kind: str, label: str, known: Mapping[str, str], present: Sequence[str], where: str) -> ConfigError:
    if kind == "prompt":
        means, other = "is what to choose", f"set {setting('task.text_column', known.get('prompt', '...'))} for that"
    else:
        means, other = "says which completions are good", "keep only the rows with a good one"
    return ConfigError(
        f"{where}: the columns {_list(present)} may be {_roles(kind)} alone, or {label!r} {means}. Set "
        f"task.kind={kind} to leave {label!r} out, or {other}"
    )
