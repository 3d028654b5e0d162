"""Settings from YAML files, `section.key=value` overrides and flags: merged, checked, explained.

Not here: which settings there are (vla_rl.run.settings). pydantic checks types and ranges; this file turns its errors into one
line a setting, with the way out ("did you mean"), prints them all for --help, and writes them down for a run.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vla_rl.run.section import Section, parse_indices
from vla_rl.run.settings import Config, ConfigError, RunFolderConfig
from vla_rl.run.sft_settings import SftConfig
from vla_rl.run.warmstart_settings import WarmstartConfig

ConfigKind = TypeVar("ConfigKind", Config, SftConfig, WarmstartConfig)

MAX_FILE_BYTES = 100_000  # ours have 3,000
MAX_VALUES = 10_000  # of a file, its aliases written out; ours have 150
PATHS = ("policy.checkpoint", "policy.adapter", "run.output_dir", "data.files")
NO_PATHS = (
    "tiny-openvla",
    "tiny-openvla-ppo",
    "tiny-openvla-random",
)  # names of policy.checkpoint, also beside a folder of that name
STR, INT, FLOAT, NULL, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "null", "merge"))

SHORT = reprlib.Repr()  # what came, in a message: a few anchors make gigabytes of lists in lists
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 3, 60, 60


def load_config(
    path: str | Path | None = None,
    overrides: list[str] = (),
    flags: dict[str, Any] | None = None,
    kind: type[ConfigKind] = Config,
) -> ConfigKind:
    """The checked settings of a YAML file, over which `section.key=value` overrides and command-line flags are put.

    Args:
        path: YAML file; None takes every default.
        overrides: like ["actor.learning_rate=1e-4", "env.task_ids=0-3"]; values are read as YAML.
        flags: like {"run.timesteps": 1000}; None values are left out.
        kind: Config, SftConfig or WarmstartConfig.

    Raises:
        ConfigError: the file is missing or not YAML, a setting is unknown, of the wrong type, out of range, given twice, or
            does not go with another one.
    """
    values = read_yaml(path) if path is not None else {}
    try:
        put_paths(values, full_path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config_from_dict(merge(values, overrides, flags), str(path or "the command line"), kind)


def merge(values: dict[str, Any], overrides: list[str] = (), flags: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested settings with overrides and flags put over them; see load_config.

    Raises:
        ConfigError: an override is none, or another one or a flag gives the same setting another value.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key, shown = key.strip(), SHORT.repr(override)
        if not equals or not re.fullmatch(r"\w+(\.\w+)+", key):
            raise ConfigError(f"{shown} is not a setting; write it like actor.learning_rate=1e-4")
        try:
            value = parse_yaml(text, key.rpartition(".")[2])
        except ValueError as error:
            raise ConfigError(f"{shown}: the value is not YAML ({error})") from None
        if value is None and text.strip().lower() not in ("null", "~"):
            raise ConfigError(f"{shown} has no value; write {key}=null for none, or quote what follows the =")
        put_once(values, key, change_paths(key, value, full_path), given, shown)
    for key, value in (flags or {}).items():
        if value is not None:
            put_once(
                values,
                key,
                change_paths(key, value, full_path),
                given,
                f"{SHORT.repr(value)} of a flag or the command itself",
            )
    return values


def put_once(values: dict[str, Any], key: str, value: Any, given: dict[str, Any], shown: str) -> None:
    """set_key, unless the same setting, or the section that it is in, was given otherwise before."""
    for other, before in given.items():
        same = other == key and written(before) == written(value)
        if not same and f"{key}.".startswith(f"{other}.") | f"{other}.".startswith(f"{key}."):
            raise ConfigError(f"{key} is given twice: {other}={SHORT.repr(before)}, and {shown}; give it once")
    given[key] = value
    set_key(values, key, value)


def written(value: Any) -> Any:
    """0-2 and [0, 1, 2] are the same tasks or states."""
    with suppress(ValueError):
        return parse_indices(value)
    return value


def config_from_dict(values: dict[str, Any], source: str, kind: type[ConfigKind] = Config) -> ConfigKind:
    """Checks nested settings; `source` is named in the error."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        by_setting: dict[str, list[dict[str, Any]]] = {}
        for problem in error.errors():
            by_setting.setdefault(setting_of(problem), []).append(problem)
        lines = "\n".join("  " + describe(key, problems, kind) for key, problems in by_setting.items())
        raise ConfigError(f"settings of {source}:\n{lines}") from None


# ---------------------------------------------------------------------------------------------------------------- paths


def expand(path: str, name: str) -> str:
    """~, ~user, $VARIABLE and ${VARIABLE} of a path as the user's own; `name` is the setting or argument that has it.

    Raises:
        ConfigError: there is no such variable or user, or nothing is left.
    """
    unknown = [v for v in re.findall(r"\$(\w+|\{[^}]*\})", path, re.ASCII) if v.strip("{}") not in os.environ]
    if unknown:
        raise ConfigError(
            f"{name}={path}: the variable {unknown[0].strip('{}')} is not set; set it, or write the path out"
        )
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise ConfigError(
            f"{name}={path}: there is no home folder {user}; write ./{expanded} for a folder of that name"
        )
    if not expanded.strip() or "\0" in expanded:
        raise ConfigError(f"{name}={path!r} is no path; give a file or folder")
    return expanded


def absolute(key: str, path: str) -> str:
    """A path as it is found from any folder. What is not there stays as it was written, so that errors show that, and a name
    of policy.checkpoint or Hugging Face id stays one; the default of run.output_dir stays until a run takes it."""
    if key == "run.output_dir":
        return path if path == RunFolderConfig().output_dir else from_root(path)
    there = path not in NO_PATHS and os.path.isdir(path) if key == "policy.checkpoint" else os.path.exists(path)
    return from_root(path) if there else path


def from_root(path: str) -> str:
    """Absolute; with its links as they are, but where it has .., which means something else behind a link."""
    return os.path.realpath(path) if ".." in Path(path).parts else str(Path(path).absolute())


def full_path(key: str, path: str) -> str:
    """A path as the user gave it, expanded and absolute."""
    return absolute(key, expand(path, key))


def change_paths(key: str, value: Any, change: Callable[[str, str], str]) -> Any:
    """The value of a setting, which is not checked yet; where it is a path or several, changed."""
    if key in PATHS and isinstance(value, list):
        return [change(key, item) if isinstance(item, str) else item for item in value]
    return change(key, value) if key in PATHS and isinstance(value, str) else value


def put_paths(values: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """The same for all of nested settings, in place."""
    for key in PATHS:
        section, _, leaf = key.partition(".")
        if isinstance(values.get(section), dict) and leaf in values[section]:
            set_key(values, key, change_paths(key, values[section][leaf], change))


# ----------------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Raises ConfigError where it is no file, cannot be read, or has no sections."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; give the YAML file in it")
        if not path.exists():
            near = sorted(map(str, path.parent.glob("*.yaml"))) or sorted(map(str, Path("configs").glob("*.yaml")))
            raise ConfigError(f"no settings file {path}" + (f"; there are {', '.join(near)}" if near else ""))
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            kind = f"has more than {MAX_FILE_BYTES:,} bytes" if path.is_file() else "is a device or pipe"
            raise ConfigError(f"{path} {kind}; give a YAML file such as those in configs/")
        values = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path!s:.200} cannot be read: {error.strerror}; give a file that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}; save it as UTF-8") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'rollout:', got {type(values).__name__}")
    return values


def parse_yaml(text: str, name: str = "") -> Any:
    """What a text says; of the value of a setting, its last `name`, where it is one.

    Raises:
        ValueError: in one line, whatever PyYAML says or lets through.
    """
    try:
        loader = SettingsLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if written_out(node, {}) > MAX_VALUES:
            raise ValueError(
                f"it has more than {MAX_VALUES:,} values, its aliases written out; no settings have so many"
            )
        keep_text(name, node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark
        where = f" in line {place.line + 1}, column {place.column + 1}" if place is not None else ""
        raise ValueError(f"{error.context + ': ' if error.context else ''}{error.problem}{where}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply; no setting is") from None


def written_out(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node has once its aliases are written out; infinity of one that is in itself.

    Args:
        sizes: of the nodes that were met before, by id.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # for an alias to it within it
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        sizes[id(node)] = 1 + sum(written_out(inner, sizes) for pair in pairs for inner in pair)
    return sizes[id(node)]


class SettingsLoader(yaml.SafeLoader):
    """YAML as far as settings need it: no tags; numbers and dates are text where the setting is; each name is there once."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Dates, 12:30:45 (which is 45045 to YAML), = and what is longer than a number stay text; no setting is one."""
        tag = super().resolve(kind, value, implicit)
        if kind is not yaml.ScalarNode or tag in (STR, NULL, MERGE):
            return tag
        other = tag in (INT, FLOAT) and (":" in value or len(value) > 100)
        return STR if other or tag.endswith((":timestamp", ":value")) else tag

    def scan_tag(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "a ! begins a YAML tag; quote the text", self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a section or setting that is written twice, of which PyYAML would silently keep the last."""
        names = []
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            problem = f"{name} is there twice" if name in names else None
            if key.tag != MERGE and not (key.tag == STR and name.isidentifier()):
                problem = f"{SHORT.repr(name)} is not the name of a section or setting"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            names.append(name)
            keep_text(name, value)
        return super().construct_mapping(node, deep)


def keep_text(name: str, node: yaml.Node) -> None:
    """007 is the text 007 where the setting is a text; ~ is the home folder where it is a path."""
    if name not in TEXTS:
        return
    for value in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        home = value.value == "~" and f".{name}" in "".join(PATHS)
        value.tag = STR if home or value.tag in (INT, FLOAT) else value.tag


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        section = {} if values.get(parent) is None else values[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
        values[parent] = dict(section)  # a copy: to a YAML alias, another section may be the same one
        values = values[parent]
    values[leaf] = value


# -------------------------------------------------------------------------------------------------- errors and the help


def setting_of(problem: dict[str, Any]) -> str:
    """ "section.key" of a pydantic problem: without positions in a list and the branches of a union, which are no names."""
    return ".".join(part for part in problem["loc"] if isinstance(part, str) and part.isidentifier())


def describe(key: str, problems: list[dict[str, Any]], kind: type[Section]) -> str:
    """One line for all pydantic problems of a setting: what is wrong, what came, the way out."""

    def depth(problem: dict[str, Any]) -> tuple[bool, bool]:
        # of a union, the branch that got furthest is the one that was meant
        return any(isinstance(part, int) for part in problem["loc"]), problem["type"] == "value_error"

    problems = [problem for problem in problems if depth(problem) == max(map(depth, problems))]
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown setting; {way_out(key, kind)}"
    if first["type"] == "missing":
        return f"{key}: not given; {list_settings(kind)[key].description or 'the section is needed'}"
    if first["type"] == "value_error":
        return ": ".join(filter(None, [key, str(first["ctx"]["error"])]))
    came = SHORT.repr(first["input"])
    came = came if len(came) <= 63 else came[:60] + "..."
    inside_list, _ = depth(first)
    if inside_list:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        expected = first["msg"]
    else:
        more = ""
        expected = " or ".join([first["msg"], *(p["msg"].removeprefix("Input should be ") for p in problems[1:])])
    return f"{key}: {expected[0].lower()}{expected[1:]}, got {came}{more}"


def way_out(key: str, kind: type[Section]) -> str:
    """What may have been meant by an unknown setting: one beside it, one of that name elsewhere, or what there is."""
    section, _, leaf = key.rpartition(".")
    known = list_settings(kind)
    known |= {name.rpartition(".")[0]: None for name in known if "." in name}  # policy.lora
    beside = [name for name in known if name.rpartition(".")[0] == section]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, beside, n=1, cutoff=0.8) or elsewhere[:1]
    if near:
        return f"did you mean {near[0]}?"
    return f"{section + ' has' if section else 'there are'} {', '.join(name.rpartition('.')[2] for name in beside)}"


def list_settings(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every setting as "section.key" -> pydantic field, in order; what --help prints and "did you mean" searches."""
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, BaseModel):
            settings |= {prefix + name: field} if not prefix else {}
            settings |= list_settings(inner, f"{prefix}{name}.")
        else:
            settings[prefix + name] = field
    return settings


def settings_help(kind: type[Section] = Config) -> str:
    """Every setting with its default, its choices and what it means (with its unit)."""
    lines: list[str] = []
    for key, field in list_settings(kind).items():
        if "." not in key:
            lines.append(f"\n{key}: {field.annotation.__doc__.splitlines()[0]}")
            continue
        choices = [str(c) for c in get_args(field.annotation) if isinstance(c, str | int) and not isinstance(c, bool)]
        default = field.get_default(call_default_factory=True)
        text = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        choice = f" {{{', '.join(choices)}}}" if len(choices) > 1 else ""
        lines.append(f"  {key}={text}{choice}\n      {field.description}")
    return "\n".join(lines)


# names of settings that are texts, whatever they look like
TEXTS = {
    name.rpartition(".")[2]
    for kind in (Config, SftConfig, WarmstartConfig)
    for name, field in list_settings(kind).items()
    if field.annotation in (str, str | None, list[str])
}


def save_config(config: Section, path: Path) -> None:
    """Writes every setting, defaults included, so that a run can be repeated from its folder."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
