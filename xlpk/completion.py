"""Completion of the `xlpk` command in bash, zsh and fish.

`xlpk completion SHELL` prints the shell's script, which asks `xlpk _complete` at each TAB. Groups, options, keys and
values come from the schema and from conf/, without Hydra's composition: a fraction of a second.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from xlpk import config_reference
from xlpk.config import node_name

HYDRA_FLAGS = {
    "--multirun": "a sweep: one run a combination",
    "--help": "all groups and keys",
    "--cfg": "shows the config and leaves",
    "--info": "Hydra's own information",
}
# \t parts a candidate from its description; what ends with = or . or , goes on, so no space comes after it.
BASH = r"""# xlpk in bash: eval "$(xlpk completion bash)"
_xlpk() {
  local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n' found word before= candidate
  mapfile -t found < <("$1" _complete --line "$line" 2>/dev/null)
  word=${line##*[[:space:]]}
  [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && before=${word%"${word##*=}"}
  COMPREPLY=()
  for candidate in "${found[@]}"; do
    candidate=${candidate%%$'\t'*}
    COMPREPLY+=("${candidate#"$before"}")
    [[ $candidate == *[=.,] ]] && compopt -o nospace
  done
}
complete -o bashdefault -o default -F _xlpk xlpk
"""
ZSH = r"""#compdef xlpk
# xlpk in zsh: source <(xlpk completion zsh), after compinit; or this text as a file _xlpk in a folder of $fpath
_xlpk() {
  local -a found on done_on done_off off
  local line text
  found=("${(@f)$("${words[1]}" _complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
  for line in "${found[@]}"; do
    [[ -n $line ]] || continue
    text=${line%%$'\t'*}
    if [[ $text == *[=.,] ]]; then on+=("$text"); done_on+=("${line/$'\t'/  -- }")
    else off+=("$text"); done_off+=("${line/$'\t'/  -- }"); fi
  done
  if (( $#on + $#off )); then
    (( $#on )) && compadd -Q -l -S '' -d done_on -a on
    (( $#off )) && compadd -Q -l -d done_off -a off
  else
    [[ $PREFIX == *=* ]] && compset -P '*='
    _files
  fi
}
if [[ $funcstack[1] == _xlpk ]]; then _xlpk "$@"; else compdef _xlpk xlpk; fi
"""
FISH = r"""# xlpk in fish: xlpk completion fish | source
function __xlpk_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] _complete -- $words[2..-1] $current 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        set -l before (string match -r '^[^=]*=' -- $current)
        for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $current))
            printf '%s%s\n' "$before" $path
        end
    end
end
complete -c xlpk -f -a '(__xlpk_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

Candidate = tuple[str, str]  # the whole word, what it means


def script(shell: str) -> str:
    """The text that the shell reads."""
    return SCRIPTS[shell]


def words_of(line: str) -> list[str]:
    """A command line up to the cursor -> its words, the unfinished one last ("" after a space)."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        words = line.split()
    return [*words, ""] if not line or line[-1].isspace() else words


def complete(words: list[str], parser: argparse.ArgumentParser) -> list[Candidate]:
    """`words` behind `xlpk`, the last of them unfinished -> what it could become; nothing where a file belongs."""
    *before, current = words or [""]
    commands = subcommands(parser)
    if not before:
        found = [(name, help) for name, (_, help) in commands.items()]
    elif before[0] == "run" or (before[0] == "capacity" and not current.startswith("-")):
        found = list(_overrides(before[1:], current))
    elif before[0] in commands:
        found = list(_arguments(commands[before[0]][0], current))
    else:
        found = []
    return [candidate for candidate in found if candidate[0].startswith(current)]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """name -> (its parser, its help), but for hidden ones."""
    (action,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    helps = {one.dest: one.help or "" for one in action._choices_actions}
    return {name: (action.choices[name], help) for name, help in helps.items()}


def _arguments(parser: argparse.ArgumentParser, current: str) -> Iterator[Candidate]:
    for action in parser._actions:
        if action.option_strings and current.startswith("-"):
            yield max(action.option_strings, key=len), action.help or ""
        elif not action.option_strings and action.choices and not current.startswith("-"):
            yield from ((str(choice), "") for choice in action.choices)


def _overrides(before: list[str], current: str) -> Iterator[Candidate]:
    """Hydra's flags; groups; keys of the nodes that the chosen options have; values of a group or a key."""
    if current.startswith("-"):
        yield from HYDRA_FLAGS.items()
        return
    name = current.lstrip("+~")
    sign = current[: len(current) - len(name)]
    name, equals, value = name.partition("=")
    group, dot, _ = name.partition(".")
    if equals:
        done, comma, _ = value.rpartition(",")  # a sweep
        for choice, meaning in _values(name, before):
            if choice not in done.split(","):
                yield f"{sign}{name}={done}{comma}{choice}", meaning
    elif dot:
        for key in _keys(group, before):
            yield f"{sign}{key.name}=", key.meaning
    else:
        for group in config_reference.options():
            yield f"{sign}{group}=", "an option"
        for group in config_reference.key_groups():
            yield f"{sign}{group}.", "a key"


def _values(name: str, before: list[str]) -> Iterator[Candidate]:
    for option in config_reference.options().get(name, []):
        yield option.name, option.meaning
    for key in _keys(name.partition(".")[0], before):
        if key.name == name:
            yield from ((choice, "") for choice in key.choices)


def _keys(group: str, before: list[str]) -> list[config_reference.Key]:
    """The keys of the group's node under the options typed so far; of all its nodes where several are swept."""
    nodes = config_reference.nodes(group)
    if len(nodes) > 1:
        chosen = config_reference.chosen_nodes(before).get(group)
        nodes = tuple(node for node in nodes if node_name(node) == chosen) or nodes
    found = {key.name: key for node in nodes for key in config_reference.keys(node, group)}
    return list(found.values())


def main(words: list[str], parser: argparse.ArgumentParser) -> int:
    """`xlpk _complete -- WORD...` or `--line LINE`: prints a candidate a line, a tab before its description."""
    if words[:1] == ["--line"]:
        words = words_of(words[1])[1:]
    for word, meaning in complete(words[1:] if words[:1] == ["--"] else words, parser):
        print(f"{word}\t{meaning}" if meaning else word)
    return 0
