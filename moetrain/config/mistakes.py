"""Mistakes in YAML or on the command line, as one sentence: key, value, rule, and the closest name that exists.

Hydra and OmegaConf say them in several lines, some of which advise what cannot work here (`+key=value`).
"""

import difflib
import re
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from moetrain.base.errors import ConfigError, closest
from moetrain.config.folder import GROUPS, conf_folder, options
from moetrain.config.schema import TrainConfig

EXPLAINED = (HydraException, OmegaConfBaseException, YAMLError, ConfigError, ValueError)
TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "String": "a word"}


def explain(error: Exception) -> str:
    """One sentence and the way out for an exception of composition (types in EXPLAINED)."""
    return str(as_config_error(error))


def as_config_error(error: Exception) -> ConfigError:
    """The same as an error. Anything unforeseen keeps the first line of its own words."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return _no_override(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _bad_key_or_value(str(error), cause)
    return _bad_override(error)


def suggest(key: str) -> str:
    """The way out for a key that does not exist: the nearest sibling, the same name elsewhere, or what the parent offers."""
    parent, _, leaf = key.rpartition(".")
    keys = all_keys()
    siblings = [known for known in keys if known.rpartition(".")[0] == parent]
    names = {known.rpartition(".")[2]: known for known in siblings} if parent else {known: known for known in (*siblings, *GROUPS)}
    near = difflib.get_close_matches(leaf, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {names[near[0]]}?"
    elsewhere = [known for known in keys if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere[:3])}?"
    similar = [] if siblings else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if similar:
        return f"Did you mean {similar[0]}?"
    return f"Possible: {', '.join(names)}." if names else f"Possible: {', '.join(item.name for item in fields(TrainConfig))}."


def all_keys() -> list[str]:
    """Every dotted key of the schema, groups included."""
    return _keys(TrainConfig(), "")


def _keys(node: object, prefix: str) -> list[str]:
    found: list[str] = []
    for item in fields(node):  # pyright: ignore[reportArgumentType]
        value = getattr(node, item.name)
        found.append(prefix + item.name)
        if is_dataclass(value):
            found += _keys(value, f"{prefix}{item.name}.")
    return found


def _missing_option(error: MissingConfigException) -> ConfigError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return ConfigError(f"The file {option}.yaml is not there.", _first_line(str(error)))
    options = [name for name in error.options or () if not name.startswith("base_")]
    if not options:
        return _of(group, option, "there is no such group of options", closest(group, GROUPS))
    kind = "experiment" if group == "experiment" else f"option in conf/{group}"
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    return _of(_written(group), option, f"there is no such {kind}", f"{hint}Possible: {', '.join(sorted(options))}.")


def _no_override(error: OverrideParseException) -> ConfigError:
    if error.override in options("experiment"):
        return ConfigError(f"{error.override} is an experiment.", f"Write +experiment={error.override}.")
    reason = [line for line in error.message.strip().splitlines() if not line.startswith(("Error parsing", "See http"))]
    return ConfigError(f"{error.override} is not an override: {reason[0] if reason else 'it cannot be read'}.", "Write KEY=VALUE.")


def _bad_key_or_value(message: str, cause: OmegaConfBaseException) -> ConfigError:
    key = str(cause.full_key)
    file = _match(r"^In '([^']+)'", message)
    if isinstance(cause, ConfigKeyError) or "ConfigAttributeError" in type(cause).__name__:
        override = re.search(r"your config use \+([^=]+)=(.*)", message)
        if override is None:
            return _of(key, _value_in(file, key), "there is no such key", suggest(key), file)
        if not override[1].startswith(key):
            return _of(override[1], override[2], f"its items have no key {key}", _fields_of(cause))
        return _of(override[1], override[2], "there is no such key", suggest(override[1]))
    typed = _match(r"merging override [^=]+=(.*)", message) or _match(r"Value '(.*)' (?:of type|is not)", str(cause))
    value = _value_in(file, key) if typed is None else typed
    return _of(key, value, _type_rule(cause), _way_out(cause, key, value), file)


def _type_rule(cause: OmegaConfBaseException) -> str:
    text = str(cause)
    if isinstance(cause, InterpolationResolutionError):
        return f"it refers to a key that does not exist ({_first_line(text)})"
    if isinstance(cause, MissingMandatoryValue):
        return "it has no value"
    if "is not Optional" in text:
        return "it cannot be null"
    if "is not a ListConfig" in text:
        return "it must be a list"
    if "is not a subclass" in text:
        return "it is a group of keys, not a value"
    wanted = _match(r"could not be converted to (\w+)", text) or ("bool" if "not a valid bool" in text else None)
    return f"it must be {TYPES.get(wanted or '', wanted)}" if wanted else _first_line(text)


def _way_out(cause: OmegaConfBaseException, key: str, value: object) -> str:
    group = key.rpartition(".")[2]
    if "is not a ListConfig" in str(cause):
        return f"Write {key}=[...]."
    if "is not a subclass" in str(cause) and group in GROUPS:
        return f"The group is chosen with {group}={value}."
    return ""


def _bad_override(error: Exception) -> ConfigError:
    message = _first_line(str(error))
    group = _match(r"Could not override '([^']+)'. No match in the defaults list", message)
    if group == "experiment":
        plus = _match(r"use (\+experiment=\S+)", str(error)) or "+experiment=NAME"
        return ConfigError("An experiment is added with a plus.", f"Write {plus}.")
    if group:
        return ConfigError(f"{group} is no group of options.", closest(group, GROUPS))
    ambiguous = _match(r"Ambiguous value for argument '([^']+)'", message)
    if ambiguous:
        key, _, values = ambiguous.partition("=")
        hint = f"For a list write '{key}=[{values}]'; for one run per value use launch/submit.py -m."
        return _of(key, values, "one run takes one value", hint)
    if "Config group override must be" in message:
        return ConfigError("A group takes the name of one of its options.", f"Groups: {', '.join(GROUPS)}.")
    if isinstance(error, YAMLError):
        place = _match(r'in "([^"]+", line \d+)', str(error)) or ""
        return ConfigError(f"A YAML file cannot be read: {message} ({place.replace(chr(34), '')}).")
    return ConfigError(f"The configuration cannot be composed: {message.rstrip('.')}.")


def _of(key: str, value: object, rule: str, hint: str, file: str | None = None) -> ConfigError:
    where = f" in conf/{file}.yaml" if file else ""
    shown = key if value is None else f"{key}={value}"
    return ConfigError(f"{shown}{where} is not possible: {rule}.", hint)


def _fields_of(cause: OmegaConfBaseException) -> str:
    names = [item.name for item in fields(cause.object_type)] if is_dataclass(cause.object_type) else []
    return closest(str(cause.full_key), names) if names else ""


def _value_in(file: str | None, key: str) -> object:
    """The value that a YAML file gives to a key; the file may leave out the front of the key, its package."""
    path = conf_folder() / f"{file}.yaml"
    if file is None or not path.is_file():
        return None
    tree = OmegaConf.load(path)
    names = key.split(".")
    for start in range(len(names)):
        value = OmegaConf.select(tree, ".".join(names[start:])) if isinstance(tree, DictConfig) else None
        if value is not None:
            return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value
    return None


def _written(group: str) -> str:
    """An experiment is typed with a plus, other groups without."""
    return "+experiment" if group == "experiment" else group


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason is given"


def _match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None
