"""The registry: finds plugins, keeps the names they claim, and builds what is asked for by name.

Every plugin stands alone: one that cannot be imported, or whose hooks do not fit, is named in a warning, remembered in
`Registry.left_out` and left out; the others go on. A name that two plugins claim is an error for whoever asks for
that name, and for nobody else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
import torch

from dgrad import hookspecs
from dgrad.core.arguments import check_name, check_spec
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import DgradError, InputError, PluginWarning, unknown_name
from dgrad.hyperparameters import read_hyperparameters

if TYPE_CHECKING:
    from typing import Never
else:
    Never = object  # for whoever checks types at run time

GROUP = "dgrad"
KINDS = ("estimators", "latents", "datasets", "models")
UNKNOWN = "unknown distribution"
Factory = Callable[..., Any]
Built = TypeVar("Built")


@dataclass
class Plugin:
    """A loaded plugin: where it comes from and what it registers."""

    name: str
    distribution: str
    version: str
    module: object
    registers: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    installed: bool = True
    """Whether an entry point brought it, and not `load_plugin`."""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class LeftOut:
    """An installed plugin that could not be loaded, and why, in one line."""

    name: str
    distribution: str
    version: str
    reason: str


class Registry:
    """The plugins of a process and the names they claim."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self.left_out: list[LeftOut] = []
        self._claims: dict[str, dict[str, list[tuple[Plugin, Factory]]]] = {kind: {} for kind in KINDS}

    def load_entry_points(self, *, builtins_only: bool = False) -> None:
        """Load every plugin published under the entry-point group; a broken one becomes a warning that names it."""
        for entry_point in importlib.metadata.entry_points(group=GROUP):
            distribution, version = _distribution_of(entry_point)
            if any(plugin.name == entry_point.name and plugin.distribution == distribution for plugin in self.plugins):
                continue
            if builtins_only and distribution != "dgrad":
                continue
            try:
                module = entry_point.load()
            except (Exception, SystemExit) as error:  # whatever a stranger's module does while it is imported
                self._leave_out(LeftOut(entry_point.name, distribution, version, _brief(error)))
                continue
            try:
                self.add(Plugin(entry_point.name, distribution, version, module))
            except InputError as error:
                reason = _brief(error.__cause__ or error)
                self._leave_out(LeftOut(entry_point.name, distribution, version, reason))

    def _leave_out(self, plugin: LeftOut) -> None:
        self.left_out.append(plugin)
        warnings.warn(
            f"plugin {plugin.name!r} of distribution {plugin.distribution!r} is left out: {plugin.reason}",
            PluginWarning,
            stacklevel=3,
        )

    def add(self, plugin: Plugin) -> None:
        """Register a plugin and collect its names.

        Raises:
            InputError: one of its hooks does not fit its specification, or fails.
        """
        if self.manager.is_registered(plugin.module):
            known = next(known for known in self.plugins if known.module == plugin.module)
            raise InputError(f"plugin {plugin.name!r} ({plugin.origin}) is the same module as {_who(known)}")
        try:
            self.manager.register(plugin.module, name=f"{plugin.distribution}:{plugin.name}")
            self.manager.check_pending()
            names = self._names_of(plugin)
        except (Exception, SystemExit) as error:  # pluggy's validation errors, or what the plugin's own hook raises
            if self.manager.is_registered(plugin.module):
                self.manager.unregister(plugin.module)
            raise InputError(f"plugin {plugin.name!r} ({plugin.origin}): {_brief(error)}") from error
        for kind, factories in names.items():
            plugin.registers[kind] = list(factories)
            for name, factory in factories.items():
                self._claims[kind].setdefault(name, []).append((plugin, factory))
        self.plugins.append(plugin)

    def remove(self, module: object) -> None:
        """Forget a plugin and the names it claimed."""
        self.manager.unregister(module)
        self.plugins = [plugin for plugin in self.plugins if plugin.module is not module]
        for claims in self._claims.values():
            for name in list(claims):
                claims[name] = [claim for claim in claims[name] if claim[0].module is not module]
                if not claims[name]:
                    del claims[name]

    def _names_of(self, plugin: Plugin) -> dict[str, dict[str, Factory]]:
        names: dict[str, dict[str, Factory]] = {kind: {} for kind in KINDS}

        def register(kind: str, name: Any, factory: Any) -> None:
            if not (isinstance(name, str) and name and callable(factory)):
                raise InputError(
                    f"dgrad_register_{kind} registers {name!r} as {factory!r}; expected a name and a class or function"
                )
            if name in names[kind]:
                raise InputError(f"dgrad_register_{kind} registers {name!r} twice; expected each name once")
            names[kind][name] = factory

        for kind in KINDS:
            for implementation in getattr(self.manager.hook, f"dgrad_register_{kind}").get_hookimpls():
                if implementation.plugin is plugin.module:
                    implementation.function(*[functools.partial(register, kind) for _ in implementation.argnames])
        return names

    def factories(self, kind: str) -> dict[str, Factory]:
        """The factory of each name of a kind; names with two claims are left out."""
        return {name: claims[0][1] for name, claims in sorted(self._claims[kind].items()) if len(claims) == 1}

    def claimed(self, kind: str, name: str) -> bool:
        """Whether any plugin claims the name."""
        return name in self._claims[kind]

    def claimed_twice(self, plugin: Plugin | None = None) -> list[str]:
        """A line for each name (of `plugin`, or of all) that several plugins claim: which they are, and what to do."""
        return [
            self._contest(kind, name)
            for kind in KINDS
            for name, claims in sorted(self._claims[kind].items())
            if len(claims) > 1 and (plugin is None or any(claimant is plugin for claimant, _ in claims))
        ]

    def _contest(self, kind: str, name: str) -> str:
        plugins = sorted(
            (plugin for plugin, _ in self._claims[kind][name]),
            key=lambda plugin: (not plugin.installed, plugin.distribution != "dgrad", plugin.distribution, plugin.name),
        )
        given = [plugin for plugin in plugins if not plugin.installed]
        strangers = [plugin.distribution for plugin in plugins if plugin.distribution != "dgrad"]
        if given:
            remedy = f"register another name there, or leave out --plugin {given[-1].distribution}"
        elif len(set(strangers)) == 1:
            remedy = f"uninstall {strangers[0]}, or have it register another name"
        else:
            remedy = "uninstall one of them"
        return f"{kind[:-1]} {name!r} is claimed by {' and '.join(map(_who, plugins))}; {remedy}"

    def factory(self, kind: str, name: str) -> Factory:
        """The factory of a name.

        Raises:
            InputError: nobody, or more than one plugin, claims the name.
        """
        claims = self._claims[kind].get(name, [])
        if len(claims) > 1:
            raise InputError(self._contest(kind, name))
        if not claims:
            remedy = (
                "" if self.plugins else "No plugin is loaded, not even the built-in one: install dgrad (pip install .)"
            )
            raise unknown_name(kind[:-1], name, self._claims[kind], remedy)
        return claims[0][1]


def _who(plugin: Plugin) -> str:
    return f"{plugin.distribution} ({plugin.name})" if plugin.installed else f"--plugin {plugin.distribution}"


def _distribution_of(entry_point: Any) -> tuple[str, str]:
    """The name and version of the distribution behind an entry point, as far as its metadata tells."""
    try:
        found = entry_point.dist
        return (found and found.name) or UNKNOWN, (found and found.version) or ""
    except Exception:  # a damaged METADATA file
        return UNKNOWN, ""


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, DgradError) else f"{type(error).__name__}: {text}"


@functools.cache
def registry() -> Registry:
    """The registry of this process, its plugins loaded: built-in ones alone under DGRAD_DISABLE_PLUGIN_AUTOLOAD=1."""
    result = Registry()
    result.load_entry_points(builtins_only=os.environ.get("DGRAD_DISABLE_PLUGIN_AUTOLOAD", "") not in ("", "0"))
    return result


def load_plugin(spec: str) -> Plugin:
    """Load a plugin without packaging it: a module's name, or the path of a `.py` file. Loading one twice is one load.

    Raises:
        InputError: it cannot be found or imported, or its hooks do not fit.
    """
    path = Path(spec)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise InputError(f"no plugin file {spec!r}; expected an existing .py file or the name of a module")
    name = path.stem if is_file else spec
    try:
        module = _import_file(path.resolve()) if is_file else importlib.import_module(spec)
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot import plugin {spec!r}: {_brief(error)}") from error
    for plugin in registry().plugins:
        if plugin.module is module:
            return plugin
    plugin = Plugin(name, str(path) if is_file else spec, "", module, installed=False)
    registry().add(plugin)
    if not registry().manager.get_hookcallers(module):
        registry().remove(module)
        raise InputError(
            f"plugin {spec!r} has no hooks; mark its functions (dgrad_register_estimators ...) with @dgrad.hookimpl"
        )
    return plugin


def _import_file(path: Path) -> object:
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None:
        raise ImportError(
            f"a module named {path.stem!r} is loaded already from {getattr(known, '__file__', 'elsewhere')}; rename "
            "the file"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that what the plugin defines can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def build(kind: str, name: str, expected: type[Built], *arguments: Any, **keywords: Any) -> Built:
    """What the factory of a name makes; a factory that fails is named with its plugin.

    Raises:
        InputError: the name is unknown, or its factory fails or makes something else than `expected`.
    """
    result: Any = None
    factory = registry().factory(kind, name)
    try:
        result = factory(*arguments, **keywords)
    except DgradError:
        raise
    except Exception as error:  # whatever a stranger's factory does
        if _is_ours(factory):
            raise
        raise InputError(
            f"the factory of {kind[:-1]} {name!r} failed: {_brief(error)}; ask its plugin's author"
        ) from error
    if not isinstance(result, expected):
        raise InputError(
            f"the factory of {kind[:-1]} {name!r} made a {type(result).__name__}; expected a {expected.__name__}: "
            "ask its plugin's author"
        )
    return result


def _is_ours(factory: Factory) -> bool:
    return str(getattr(factory, "__module__", "")).partition(".")[0] in ("dgrad", "dgrad_plugins")


def estimators() -> dict[str, Callable[..., GradientEstimator]]:
    """The registered estimators: each name with its factory."""
    return registry().factories("estimators")


def latents() -> dict[str, Callable[[str], LatentLayer]]:
    """The registered latents: each name with the function that reads its spec."""
    return registry().factories("latents")


def datasets() -> dict[str, Factory]:
    """The registered data sets: each name with the function that loads it from a data root."""
    return registry().factories("datasets")


def models() -> dict[str, Factory]:
    """The registered models: each name with its factory."""
    return registry().factories("models")


def estimator(name: str, **hyperparameters: Any) -> GradientEstimator:
    """A gradient estimator by its registered name.

    Args:
        hyperparameters: numbers, schedules, or their text (`epsilon="geometric:1:0.02"`).

    Raises:
        InputError: the name or a hyper-parameter is unknown, or a value is out of range.
    """
    factory = registry().factory("estimators", check_name(name))
    given = read_hyperparameters(name, factory, hyperparameters)
    with torch.inference_mode(False):  # inside, later updates of what it learns would be refused
        return build("estimators", name, GradientEstimator, **given)  # type: ignore[type-abstract]


def latent(spec: str, *more: Never) -> LatentLayer:
    """A latent layer from its spec: `20x10`, or `name:...` for one that is not categorical.

    Raises:
        InputError: the spec cannot be read, or is no text.
    """
    spec = check_spec(spec, *more)
    name, separator, rest = spec.partition(":")
    if not separator:
        name, rest = (spec, "") if registry().claimed("latents", spec) else ("categorical", spec)
    return build("latents", name, LatentLayer, rest)  # type: ignore[type-abstract]


def code_losses(batch: Any, config: Any) -> list[Callable[..., Any]]:
    """What the plugins' `dgrad_code_losses` hooks add to the objective of a batch."""
    return list(registry().manager.hook.dgrad_code_losses(batch=batch, config=config))


def describe(factories: Mapping[str, Factory]) -> dict[str, str]:
    """The first line of each factory's docstring, and of a layer's where it inherits `parse`."""
    inherited = LatentLayer.parse.__doc__
    documented = {
        name: factory.__self__ if factory.__doc__ == inherited else factory  # type: ignore[attr-defined]
        for name, factory in factories.items()
    }
    return {name: (inspect.getdoc(source) or "").partition("\n")[0] for name, source in documented.items()}
