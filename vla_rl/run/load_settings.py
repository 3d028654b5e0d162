"""Settings from YAML files, `section.key=value` overrides and flags: merged, checked, explained.

Not here: which settings there are (vla_rl.run.settings). pydantic checks types and ranges; this file turns its errors into one
line a setting, with the way out ("did you mean"), prints them all for --help, and writes them down for a run.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vla_rl.run.settings import Config, ConfigError, Section, SftConfig

ConfigKind = TypeVar("ConfigKind", Config, SftConfig)


def load_config(
    path: str | Path | None = None,
    overrides: list[str] = (),
    flags: dict[str, Any] | None = None,
    kind: type[ConfigKind] = Config,
) -> ConfigKind:
    """The checked settings of a YAML file, then of `section.key=value` overrides, then of command-line flags.

    Args:
        path: YAML file; None takes every default.
        overrides: like ["actor.learning_rate=1e-4", "env.task_ids=0-3"]; values are read as YAML.
        flags: like {"run.timesteps": 1000}; None values are left out.
        kind: Config or SftConfig.

    Raises:
        ConfigError: the file is missing or not YAML, a setting is unknown, of the wrong type, out of range, or does not
            go with another one.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"{override!r} is not a setting; write it like actor.learning_rate=1e-4")
        try:
            set_key(values, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not YAML ({error})") from None
    for key, value in (flags or {}).items():
        if value is not None:
            set_key(values, key, value)
    return config_from_dict(values, str(path or "the command line"), kind)


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


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the YAML file in it")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) or sorted(
            str(p) for p in Path("configs").glob("*.yaml")
        )
        raise ConfigError(f"no settings file {path}" + (f"; there are {', '.join(near)}" if near else ""))
    try:
        values = yaml.load(path.read_text(), UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'rollout:', got {type(values).__name__}")
    return values


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a section or setting that is written twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
    values[leaf] = value


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
    came = repr(first["input"])
    came = came if len(came) <= 60 else came[:60] + "..."
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


def save_config(config: Section, path: Path) -> None:
    """Writes every setting, defaults included, so that a run can be repeated from its folder."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
