"""Reading a foreign configuration so that no key goes unseen: each is taken, known to change nothing, or refused by name."""

from collections.abc import Iterable, Mapping

from moetrain.base.errors import BundleError


class Keys:
    """The keys of one JSON object. `take` and its typed forms mark a key as understood; `finish` refuses what is left."""

    def __init__(self, values: Mapping[str, object], defaults: Mapping[str, object], where: str, prefix: str = "") -> None:
        """where: the file in messages; prefix: put before key names in messages (`rope_scaling.`)."""
        self.values, self.defaults, self.where, self.prefix = values, defaults, where, prefix
        self._left = set(values)

    def take(self, name: str, *aliases: str) -> object:
        """The value under `name` or one of its other names, else the default. Refused if two names disagree."""
        found = {key: self.values[key] for key in (name, *aliases) if key in self.values}
        self._left -= set(found)
        for key, value in found.items():
            if value != next(iter(found.values())):
                raise self.refuse(key, f"it contradicts {next(iter(found))}={next(iter(found.values()))!r}")
        return next(iter(found.values()), self.defaults.get(name))

    def whole(self, name: str, *aliases: str) -> int:
        value = self.take(name, *aliases)
        if type(value) is not int:
            raise self.refuse(name, "a whole number is needed", value)
        return value

    def number(self, name: str) -> float:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "a number is needed", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false is needed", value)
        return value

    def optional_whole(self, name: str) -> int | None:
        return None if self.take(name) is None else self.whole(name)

    def optional_number(self, name: str) -> float | None:
        return None if self.take(name) is None else self.number(name)

    def only(self, name: str, *allowed: object) -> None:
        """The key may be absent or hold one of `allowed`: the values under which it changes nothing."""
        value = self.take(name)
        if name in self.values and value not in allowed:
            raise self.refuse(name, f"moetrain computes {' or '.join(repr(choice) for choice in allowed)} only")

    def skip(self, names: Iterable[str]) -> None:
        """Keys that change no logit, whatever they hold."""
        self._left -= set(names)

    def finish(self) -> None:
        """Raises BundleError for the first key nobody asked for."""
        for name in sorted(self._left):
            raise self.refuse(name, "moetrain does not know what it changes")

    def refuse(self, name: str, rule: str, value: object = None) -> BundleError:
        value = self.values.get(name, value)
        sentence = f"{self.where} holds {self.prefix}{name}={value!r}: {rule}."
        return BundleError(sentence, "If the model does not need the key, remove it from the file and import again.")
